// The tuned numbers of layer and RMS norm, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Fewer elements than this are not worth waking a second thread for (about 3 us of rows in L2).
inline constexpr long kNormWorkPerThread = 1L << 15;

}  // namespace lamina::tuning
