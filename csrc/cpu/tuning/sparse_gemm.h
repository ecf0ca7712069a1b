// The tuned numbers of sparse float products, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Inputs of a chunk of a packed sparse weight, by channels that share a block. With one, each multiply-add reads a
// register of inputs, which should come from L1: 192 of 64 columns are 48 KiB, so that most do, and fewer ranges would
// load and store the sums less often. Blocks of four read 256 KiB from L2 at full speed.
inline constexpr int kSparseInputs1 = 192;
inline constexpr int kSparseInputs2 = 256;
inline constexpr int kSparseInputs4 = 1024;

// Channels of a chunk: a multiple of the first, so many that a weight has four chunks of them, but not more than the
// last. Groups are sorted by their length within a chunk, and the more there are, the fewer loops end unforeseen (10%
// at 64 channels); threads share a weight by chunks where rows are few.
inline constexpr int kSparseSlab = 64;
inline constexpr int kSparseSlabs = 4;
inline constexpr int kSparseMostSlab = 256;

// Bytes of values between those that are multiplied and those that are asked for: 5 to 15% where the weight comes from
// the third-level cache.
inline constexpr int kSparseAhead = 8192;

// Rows of x up to which the path without panels is the faster one, by channels that share a block.
inline constexpr int kSparseFewRows1 = 1;
inline constexpr int kSparseFewRows2 = 2;
inline constexpr int kSparseFewRows4 = 4;

// Fewer multiply-adds than this are not worth waking a second thread for.
inline constexpr long kSparseWorkPerThread = 1L << 16;

}  // namespace lamina::tuning
