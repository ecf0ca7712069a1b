// The tuned numbers of pooling int8 codes, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Fewer codes to compare or add than this are not worth waking a second thread for.
inline constexpr long kInt8PoolWorkPerThread = 1L << 17;

}  // namespace lamina::tuning
