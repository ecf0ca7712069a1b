// The tuned numbers of float convolutions, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Input or output rows of a task: a quarter of L2, beside the panel of weights that passes over them.
inline constexpr long kConvBandBytes = 256 * 1024;

// Fewer multiply-adds than this are not worth waking a second thread for (about 5 us at the FMA peak of one core).
inline constexpr long kConvWorkPerThread = 1L << 18;

}  // namespace lamina::tuning
