// The tuned numbers of recurrent layers, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

#include <stdint.h>

namespace lamina::tuning {

// Input rows (steps x batch) whose gates are computed ahead by one product: enough that reading the input weights costs
// little, few enough that the gates (4 KiB a row at 256 units) do not leave the third-level cache.
inline constexpr int64_t kRnnChunkRows = 384;

// Fewer multiply-adds a step than this are not worth a second thread: threads meet once a step, which costs as much.
inline constexpr int64_t kRnnWorkPerThread = 1 << 16;

}  // namespace lamina::tuning
