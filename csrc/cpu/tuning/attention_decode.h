// The tuned numbers of attention over a cache, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Keys of a piece, whose softmax is by itself: a fixed part of the cache, so that the bits do not depend on who
// computes it. A group of four rows then writes 2 KiB of sums for 128 KiB (int8) or more that it reads.
inline constexpr int kDecodePiece = 512;

// Keys whose values are read column by column: 32 KiB of float32 at head size 256.
inline constexpr int kDecodeValueGroup = 32;

// Places of a piece that are read side by side. Eight streams come from memory 6% faster than four, and four a third
// faster than two.
inline constexpr int kDecodeStreams = 8;

// Bytes between a key that is read and the one that is asked for from memory, in each of those places. 2 to 8 KiB are
// no better.
inline constexpr int kDecodeAheadBytes = 1024;

// Rows of one task: the heads of a group times the new queries.
inline constexpr int kDecodeTaskRows = 32;

// New queries that go through the cache together; more of them take turns, which bounds the memory for their sums.
inline constexpr int kDecodeQueries = 64;

// Fewer multiply-adds than this are not worth waking a second thread for.
inline constexpr long kDecodeWorkPerThread = 1L << 16;

}  // namespace lamina::tuning
