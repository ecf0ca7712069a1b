// The tuned numbers of float linear layers, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

#include <stdint.h>

namespace lamina::tuning {

// Output channels of one packed weight panel: four 512-bit registers, with six rows the 6x4 tile (24 accumulators, 4
// weights, 1 of x).
inline constexpr int kLinearPanelChannels = 64;

// Inputs of a partial sum. Sums in one run over all of k would have three to six times the rounding error of torch's,
// which has several; with 128 it is 1.4 times that at most inputs, less at many. Adding up costs 2%.
inline constexpr int64_t kLinearPartialSum = 128;

// Fewer multiply-adds than this are not worth waking a second thread for: 5 us of one core. Up to four rows take the
// time of four, since reading the weights is what takes it.
inline constexpr int64_t kLinearWorkPerThread = 1 << 18;
inline constexpr int64_t kLinearLeastRows = 4;

// Rows that have to be copied (strided, or bfloat16) go through this much memory at a time: enough for a call to be
// shared out well, and little enough to stay in the third-level cache.
inline constexpr int64_t kLinearCopyBytes = 8 << 20;

}  // namespace lamina::tuning
