// The tuned numbers of elementwise programs, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Elements of a tile. What an instruction costs before its first element is spread over them, and half a dozen tiles
// stay in L1.
inline constexpr int kElementwiseTile = 1024;

// Fewer results of instructions than this are not worth waking a second thread for; one of a transcendental function
// counts as eight.
inline constexpr long kElementwiseWorkPerThread = 1L << 16;

}  // namespace lamina::tuning
