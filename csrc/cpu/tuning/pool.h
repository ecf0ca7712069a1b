// The tuned numbers of pooling floats, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Fewer values to compare or add than this are not worth waking a second thread for.
inline constexpr long kPoolWorkPerThread = 1L << 17;

}  // namespace lamina::tuning
