// What the float convolution kernels share: a register tile of pixels x one panel, and the end of a pixel.
#pragma once

#include "cpu/kernels/conv_output.h"
#include "cpu/vec/activate.h"

namespace lamina::LAMINA_ISA {
namespace {

// Rows of the tallest tile, two vectors wide: accumulators, two weights and a broadcast fill the registers.
constexpr int kTileRows = F32::registers >= 32 ? 14 : 6;

// sums[r][NV vectors] = sum over runs of x[r] . w, for MR rows `step` floats apart. w: [runs * length][width].
template <int MR, int NV>
__attribute__((noinline)) void tile(const float* x, int64_t step, int runs, const int64_t* starts, int64_t length,
                                    const float* w, int width, float* sums, int64_t ld) {
  F32 acc[MR][NV];
  LAMINA_UNROLL
  for (int r = 0; r < MR; ++r) {
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) acc[r][v] = zero();
  }
  for (int run = 0; run < runs; ++run) {
    const float* p = x + starts[run];
    for (int64_t k = 0; k < length; ++k, w += width) {
      F32 b[NV];
      LAMINA_UNROLL
      for (int v = 0; v < NV; ++v) b[v] = load(w + v * F32::lanes);
      // The panel streams from L2 or beyond; its lines are asked for 32 of k ahead.
      __builtin_prefetch(w + 32 * width);
      if constexpr (NV * F32::lanes > 16) __builtin_prefetch(w + 32 * width + 16);
      LAMINA_UNROLL
      for (int r = 0; r < MR; ++r) {
        const F32 a = set1(p[r * step + k]);
        LAMINA_UNROLL
        for (int v = 0; v < NV; ++v) acc[r][v] = fmadd(a, b[v], acc[r][v]);
      }
    }
  }
  LAMINA_UNROLL
  for (int r = 0; r < MR; ++r) {
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) store(sums + r * ld + v * F32::lanes, acc[r][v]);
  }
}

using Tile = void (*)(const float*, int64_t, int, const int64_t*, int64_t, const float*, int, float*, int64_t);

template <int MR, int NV>
constexpr Tile tile_if_it_fits() {
  if constexpr (MR <= kTileRows) {
    return tile<MR, NV>;
  } else {
    return nullptr;  // never asked for
  }
}

template <int NV>
constexpr Tile kTiles[14] = {tile_if_it_fits<1, NV>(),  tile_if_it_fits<2, NV>(),  tile_if_it_fits<3, NV>(),
                             tile_if_it_fits<4, NV>(),  tile_if_it_fits<5, NV>(),  tile_if_it_fits<6, NV>(),
                             tile_if_it_fits<7, NV>(),  tile_if_it_fits<8, NV>(),  tile_if_it_fits<9, NV>(),
                             tile_if_it_fits<10, NV>(), tile_if_it_fits<11, NV>(), tile_if_it_fits<12, NV>(),
                             tile_if_it_fits<13, NV>(), tile_if_it_fits<14, NV>()};

// The same for up to kTileRows rows and a whole panel, 16 or 32 wide.
LAMINA_INLINE void panel_tile(int rows, const float* x, int64_t step, int runs, const int64_t* starts, int64_t length,
                              const float* w, int width, float* sums, int64_t ld) {
  int at = 0;
  for (; at + 2 * F32::lanes <= width; at += 2 * F32::lanes) {
    kTiles<2>[rows - 1](x, step, runs, starts, length, w + at, width, sums + at, ld);
  }
  if (at < width) kTiles<1>[rows - 1](x, step, runs, starts, length, w + at, width, sums + at, ld);
}

// Calls body(first, count) over [0, rows) with counts that differ by at most one: 16 rows as 8 + 8, not as 14 + 2.
template <class Body>
LAMINA_INLINE void balanced(int64_t rows, const Body& body) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int count = int((rows - row + tiles - t - 1) / (tiles - t));
    body(row, count);
    row += count;
  }
}

LAMINA_INLINE F32 activated(Activation activation, F32 x) {
  F32 y = x;
  with_activation(activation, [&]<Activation A>() { y = activate<A>(x); });
  return y;
}

// n <= lanes finished sums of a pixel, from channel c on.
LAMINA_INLINE void finish(const ConvOutput& to, F32 y, int64_t row, int64_t column, int64_t c, int n) {
  if (to.bias) y = y + load_up_to(to.bias + c, n);
  if (to.residual) {
    const int64_t at = row * to.residual_row + column * to.residual_pixel + c;
    y = y + (to.residual_is_bf16 ? load_up_to(static_cast<const bf16*>(to.residual) + at, n)
                                 : load_up_to(static_cast<const float*>(to.residual) + at, n));
  }
  if (to.activation != Activation::none) y = activated(to.activation, y);
  const int64_t at = row * to.out_row + column * to.out_pixel + c;
  if (to.out_is_bf16) return store_up_to(static_cast<bf16*>(to.out) + at, y, n);
  store_up_to(static_cast<float*>(to.out) + at, y, n);
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
