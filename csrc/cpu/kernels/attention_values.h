// Sums of weighted values of a chunk of keys: register tiles of rows x value vectors, rescaled by what the chunk did to
// the maximum, and written out where the chunk is the last.
#pragma once

#include "cpu/kernels/attention_scores.h"

namespace lamina::LAMINA_ISA {
namespace {

// What the O tiles of one chunk share.
template <class T>
struct ValueTiles {
  const float* weights;  // words, strides given by the tile
  const float* v;        // words, [key / keys_per_word][v_stride]
  int64_t v_stride;
  const float* rescale;  // [row]: factor of the sums so far; null when there are none
  const float* inverse;  // [row]: factor of the finished sums; null when keys follow
  float* sums;           // [row][sum_stride]
  int sum_stride;
  T* out;  // finished rows go to out + out_offset[row]
  const int64_t* out_offset;
  int columns;
  F32* watch;  // becomes NaN when a finished sum is not finite
};

// R rows from `row` on times C vectors of value columns from `column` on, over the key words [begin, end).
// kCareful: the same sums bit for bit, but values of weight 0 count as 0 (for a single row).
template <class Math, int R, int C, int kRowStride, int kKeyStride, bool kCareful = false>
__attribute__((noinline)) void value_tile(const ValueTiles<typename Math::Storage>& t, int row, int column, int begin,
                                          int end) {
  F32 acc[R][C];
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) {
    LAMINA_UNROLL
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  }
  const int64_t v_stride = t.v_stride;
  const float* p = t.weights + row * kRowStride + begin * kKeyStride;
  const float* v = t.v + column + begin * v_stride;
#pragma GCC unroll 2
  for (int j = begin; j < end; ++j) {
    F32 x[C];
    LAMINA_UNROLL
    for (int c = 0; c < C; ++c) x[c] = load(v + c * kLanes);
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (kCareful) {
        static_assert(R == 1);
        LAMINA_UNROLL
        for (int c = 0; c < C; ++c) x[c] = and_bits(x[c], Math::nonzero_bits(p[0]));
      }
      const F32 b = set1(p[r * kRowStride]);
      LAMINA_UNROLL
      for (int c = 0; c < C; ++c) acc[r][c] = Math::multiply_add(x[c], b, acc[r][c]);
    }
    p += kKeyStride;
    v += v_stride;
  }
  // The chunk is summed by itself before it joins the sums so far: shorter chains, half the rounding error.
  float* sums = t.sums + row * t.sum_stride + column;
  if (t.rescale) {
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      const F32 f = set1(t.rescale[row + r]);
      LAMINA_UNROLL
      for (int c = 0; c < C; ++c) acc[r][c] = fmadd(f, load(sums + r * t.sum_stride + c * kLanes), acc[r][c]);
    }
  }
  if (!t.inverse) {
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      LAMINA_UNROLL
      for (int c = 0; c < C; ++c) store(sums + r * t.sum_stride + c * kLanes, acc[r][c]);
    }
    return;
  }
  F32 watch = *t.watch;
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) {
    const F32 f = set1(t.inverse[row + r]);
    auto* out = t.out + t.out_offset[row + r] + column;
    LAMINA_UNROLL
    for (int c = 0; c < C; ++c) {
      const F32 x = f * acc[r][c];
      watch = fmadd(x, zero(), watch);
      if (column + (c + 1) * kLanes <= t.columns) {
        store(out + c * kLanes, x);
      } else {
        store_n(out + c * kLanes, x, t.columns - column - c * kLanes);
      }
    }
  }
  *t.watch = watch;
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
