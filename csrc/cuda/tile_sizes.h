// The tuned numbers of the CUDA kernels, each with its reason.
#pragma once

#include <stdint.h>

namespace lamina::cuda::tuning {

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
