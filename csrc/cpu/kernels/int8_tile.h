// The part of int8_gemm that every ISA shares: balanced row tiles, and the epilogue of one tile.
#pragma once

#include "cpu/kernels/epilogue.h"
#include "cpu/kernels/int8_gemm.h"
#include "cpu/tuning.h"

namespace lamina::LAMINA_ISA {
namespace {

// Where a block of sums [rows, width] belongs: rows from `row` on, channels from `first` on, `channels` of them.
struct Block {
  int64_t row, first;
  int rows, channels, width;
};

template <Activation A>
void finish_rows(const Int8GemmArgs& a, const int32_t* sums, const Block& b) {
  const F32 inverse = set1(a.out_inverse);
  for (int c = 0; c < b.channels; c += F32::lanes) {
    const int n = b.channels - c < F32::lanes ? b.channels - c : F32::lanes;
    const int64_t channel = b.first + c;
    const I32 compensation = load_i32(a.compensation + channel);
    const F32 w_scale = load_up_to(a.w_scales + channel, n);
    const F32 bias = a.bias ? load_up_to(a.bias + channel, n) : zero();
    for (int r = 0; r < b.rows; ++r) {
      const int64_t row = b.row + r;
      const F32 sum = to_float(load_i32(sums + r * b.width + c) - compensation);
      F32 y = sum * w_scale * set1(a.x_scales[row]) + bias;
      if (a.residual.data) y = y + load_from(a.residual.data, a.residual.format, row * a.residual.ld + channel, n);
      store_to(a.out.data, a.out.format, row * a.out.ld + channel, activate<A>(y), inverse, n);
    }
  }
}

// sums [b.rows, b.width] -> out.
void finish_tile(const Int8GemmArgs& a, const int32_t* sums, const Block& b) {
  with_activation(a.activation, [&]<Activation A>() { finish_rows<A>(a, sums, b); });
}

// Calls body(panel's weights, first channel, channels, width) for every panel from channel `start` on.
template <class Body>
LAMINA_INLINE void for_each_panel(const Int8GemmArgs& a, int64_t start, const Body& body) {
  for (int64_t first = start; first < a.channels; first += tuning::kInt8PanelChannels) {
    const int64_t left = a.channels - first;
    const int channels = int(left < tuning::kInt8PanelChannels ? left : tuning::kInt8PanelChannels);
    body(a.panels + first * a.k_padded, first, channels, (channels + 15) / 16 * 16);
  }
}

// Calls tile(row, count) over [0, rows) with counts that differ by at most one: 8 rows as 4 + 4, not as 6 + 2.
template <class Tile>
LAMINA_INLINE void for_balanced_tiles(int64_t rows, int most, const Tile& tile) {
  const int64_t tiles = (rows + most - 1) / most;
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int count = int((rows - row + tiles - t - 1) / (tiles - t));
    tile(row, count);
    row += count;
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
