// The tuned numbers of quantizing rows, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Fewer elements than this are not worth waking another thread for.
inline constexpr long kQuantizeWorkPerThread = 1L << 15;

}  // namespace lamina::tuning
