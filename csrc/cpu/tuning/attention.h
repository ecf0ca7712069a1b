// The tuned numbers of attention, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Keys that go by between two steps of the online softmax. With 64 rows their scores are 64 KiB, as are K and V at head
// size 64: a quarter of L2 together. 128 and 512 are 3 to 6% slower.
inline constexpr int kAttentionChunk = 256;

// A rest of up to 64 keys joins the last chunk: a chunk of its own would rescale all sums for a few keys.
inline constexpr int kAttentionMaxChunk = kAttentionChunk + 64;

// Query rows of one task: four 512-bit vectors, the wide side of the score tile. Narrower ISAs take several blocks.
inline constexpr int kAttentionTaskRows = 64;

// Keys and values of a head in packed form, in floats, that are kept for all of its blocks: half of 1 MiB of L2, which
// bfloat16 pairs fill by half.
inline constexpr long kAttentionPackedFloats = 256L << 10;

// Fewer rows of queries for each head than this do not pay for quantizing K.
inline constexpr int kAttentionInt8Rows = 16;

// Models in use stop at 256, where Q, K, V and scores of a chunk still fit L2 together. Larger heads go to torch.
inline constexpr int kAttentionMaxHeadSize = 256;

// Fewer multiply-adds than this are not worth waking a second thread for (about 5 us at the FMA peak of one core).
inline constexpr long kAttentionWorkPerThread = 1L << 18;

// Work is dealt out in so many shares for each thread: enough for an even load, and few, since only inside a share does
// a task fetch what the next one will read.
inline constexpr int kAttentionSharesPerThread = 8;

// Q, K, V and output of a call from which on rows are fetched ahead, and keys and values of a head. Below, they come
// from L2 and L3 early enough by themselves, and fetching costs 2 to 15%; at 8 x 12 x 128 x 64 it gains 3 to 21%.
inline constexpr long kAttentionFarBytes = 3L << 20;
inline constexpr long kAttentionFarHeadBytes = 16L << 10;

}  // namespace lamina::tuning
