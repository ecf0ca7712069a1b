// The tuned numbers of the CUDA kernels, each with its reason.
#pragma once

#include <stdint.h>

namespace lamina::cuda::tuning {

// -- attention_decode
//
// A multiprocessor of an H200 takes 4.8 TB/s / 132 = 36 bytes a nanosecond, so with 600 to 1000 ns from a load to its
// data 22 to 36 KB must be under way in each at any time.

// Keys that a warp takes at once: the rows of a tensor-core product.
inline constexpr int kDecodeKeys = 16;

// Warps of a block; each has its own keys and its own copies under way, and waits for no other until the end. Twelve or
// more in a multiprocessor hide the chain of products, maxima and powers of one another.
inline constexpr int kDecodeWarps = 4;

// Bytes that a warp keeps under way, in whole tiles of keys and values and at least one: four warps have 48 KB, twice
// what a multiprocessor needs where a block is alone in it.
inline constexpr int kDecodeWarpBytesAhead = 12 << 10;

// Tiles that a warp has room for: the one it works on and those under way. copy_async_wait knows as many.
inline constexpr int kDecodeMostStages = 4;

// Shared memory of a block, which keeps less under way and then has fewer warps where rows are long: two blocks in the
// 227 KB of compute capability 9.0 and 10.0. As much as the device allows where that is less (99 KB on 8.6 and 8.9),
// which is enough for one warp of any row.
inline constexpr int kDecodeSharedBytes = 112 << 10;

// Keys of a block below which more blocks do not pay: 256 keys of head size 128 in bfloat16 are 128 KB, 4 us of one
// multiprocessor's part of the bandwidth, beside which the sums of 8 rows that are written and read again are 8 KB.
inline constexpr int kDecodeSplitKeys = 256;

// Blocks for each multiprocessor, where the cache is long enough: the last wave of 8 at two at a time is a quarter of
// the whole at worst, and blocks of short sequences make room for those of long ones.
inline constexpr int kDecodeBlocksPerMultiprocessor = 16;

// And the fewest and the most keys of a block, when lengths turn out to be other than the room there is for them: eight
// tiles are 64 KB of bfloat16, and a long sequence among short ones must not end as a few blocks: the 64 KB that one
// has under way are, at 700 ns, a fiftieth of what the memory gives.
inline constexpr int kDecodeSplitTiles = 8;
inline constexpr int kDecodeMostSplitKeys = 8192;

// Parts of one sequence: what the merge keeps the weights of in shared memory.
inline constexpr int kDecodeMostSplits = 1024;

// Threads of a block of the merge: warps take splits in turn, eight loads at a time, and bring their sums together at
// the end. With 264 splits of one sequence that is five rounds to memory.
inline constexpr int kDecodeMergeThreads = 256;

// Warps of a block that appends, one row of keys or values each.
inline constexpr int kAppendWarps = 4;

// -- int8_gemm with mma.sync. Shared memory is below 99 KiB, which all devices from 8.0 to 8.9 have.

// A warp's tile of 64 x 64 is the largest whose sums fit in registers, 128 a thread, and reads the least of shared
// memory for a product: 2 bytes for 64 multiply-adds.
struct Int8LargeSm80 {
  static constexpr int kRows = 128, kChannels = 256, kK = 64;
  static constexpr int kWarpRows = 64, kWarpChannels = 64, kWarpK = 64;
  static constexpr int kStages = 3;
};

struct Int8MediumSm80 {
  static constexpr int kRows = 128, kChannels = 128, kK = 64;
  static constexpr int kWarpRows = 64, kWarpChannels = 64, kWarpK = 64;
  static constexpr int kStages = 4;
};

// Few rows wait for the weights: narrow tiles, so that many multiprocessors read, and long stretches of k in flight.
// The warps of a tile split k.
struct Int8FewRowsSm80 {
  static constexpr int kRows = 32, kChannels = 64, kK = 128;
  static constexpr int kWarpRows = 16, kWarpChannels = 64, kWarpK = 64;
  static constexpr int kStages = 5;
};

// -- int8_gemm with wgmma. Rows of 128 bytes are what the copy engine's widest swizzle takes.

// Both warp groups work on one tile: 128 sums for each thread is what registers hold, and 128 x 256 reads the least for
// a product. Two tiles above each other, which share the weights by multicast, read two thirds of what they would
// alone.
struct Int8LargeSm90 {
  static constexpr int kRows = 128, kChannels = 256, kK = 128;
  static constexpr int kClusterRows = 2, kClusterChannels = 1;
  static constexpr bool kCooperative = true;
  // An odd number of tiles leaves one without its partner: at most a tenth of the work from here on.
  static constexpr int kLeastRows = 1024;
};

// Warp groups take turns: one finishes its tile while the other multiplies. Two tiles side by side share the rows.
struct Int8MediumSm90 {
  static constexpr int kRows = 128, kChannels = 128, kK = 128;
  static constexpr int kClusterRows = 1, kClusterChannels = 2;
  static constexpr bool kCooperative = false;
};

// Few rows wait for the weights: 4096 channels in tiles of 32 are read by 128 of the 132 multiprocessors of an H200.
struct Int8FewRowsSm90 {
  static constexpr int kRows = 64, kChannels = 32, kK = 256;
  static constexpr int kClusterRows = 1, kClusterChannels = 1;
  static constexpr bool kCooperative = false;
};

template <class Tile>
int64_t tiles_of(int64_t rows, int64_t channels) {
  return ((rows + Tile::kRows - 1) / Tile::kRows) * ((channels + Tile::kChannels - 1) / Tile::kChannels);
}

// There are tiles for two rounds of all multiprocessors: with fewer, a last round that is half empty costs more than
// larger tiles save.
template <class Tile>
bool fills(int64_t rows, int64_t channels, int multiprocessors) {
  return tiles_of<Tile>(rows, channels) >= 2 * int64_t{multiprocessors};
}

}  // namespace lamina::cuda::tuning
