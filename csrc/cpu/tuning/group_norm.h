// The tuned numbers of group norm, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Fewer elements than this are not worth waking a second thread for (about 4 us of three passes in L2).
inline constexpr long kGroupNormWorkPerThread = 1L << 14;

}  // namespace lamina::tuning
