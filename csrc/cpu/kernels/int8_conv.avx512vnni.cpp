// int8_conv on vpdpbusd: 64 multiply-adds an instruction, one instruction a cycle.
//
// A tile of 14 pixels x 32 channels keeps its 28 accumulators in registers over all taps. Per group of four k it loads
// two weight vectors, and one 32-bit piece of each pixel, which comes with its sign bits flipped by the same
// instruction that broadcasts it (see [NOTE] s8s8 compensation in int8_gemm.h): 16 loads for 28 products, and no copy
// of the input in another format. What the flips add to a sum is subtracted where it starts, and depends only on which
// rows of taps the tile has.
//
// All panels that fit L2 together pass over a tile before the next tile comes: its pixels stay in L1, and the weights
// come from L2 at a line in 14 cycles.
#include "cpu/kernels/int8_conv_folded.h"

namespace lamina::LAMINA_ISA {
namespace {

// acc += (x ^ 0x80..) . b, four unsigned by four signed bytes. Inline assembly, since GCC 12 spills the accumulators of
// a large tile when they pass through the intrinsics, and does not fold the broadcast.
LAMINA_INLINE __m512i flipped(const int8_t* x, __m512i signs) {
  __m512i v;
  __asm__("vpxord %2%{1to16%}, %1, %0" : "=v"(v) : "v"(signs), "m"(*reinterpret_cast<const int32_t (*)[1]>(x)));
  return v;
}
LAMINA_INLINE void dot4(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

// MR pixels x 16 NR channels from `first` on: all of their sums, and what becomes of them.
template <int MR, int NR>
__attribute__((noinline)) void tile_kernel(const Int8ConvArgs& a, const ConvTile& tile, const int8_t* w, int64_t first,
                                           int channels) {
  __m512i acc[MR][NR];
  {
    const int32_t* compensation = a.compensation + tile.tap_begin * a.ld_compensation + first;
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) acc[0][j] = _mm512_setzero_si512();
    for (int t = tile.tap_begin; t < tile.tap_end; ++t, compensation += a.ld_compensation) {
      LAMINA_UNROLL
      for (int j = 0; j < NR; ++j) {
        acc[0][j] = _mm512_sub_epi32(acc[0][j], _mm512_loadu_si512(compensation + 16 * j));
      }
    }
    LAMINA_UNROLL
    for (int i = 1; i < MR; ++i) {
      LAMINA_UNROLL
      for (int j = 0; j < NR; ++j) acc[i][j] = acc[0][j];
    }
  }
  __m512i signs = _mm512_set1_epi32(int32_t(0x80808080u));
  __asm__("" : "+v"(signs));  // keeps it in a register
  w += tile.tap_begin * a.taps_x * a.length * 16 * NR;
  const int8_t* x[MR];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) x[i] = tile.x[i];
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    __m512i b[NR];
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) b[j] = _mm512_loadu_si512(w + 64 * j);
    LAMINA_UNROLL
    for (int i = 0; i < MR; ++i) {
      const __m512i v = flipped(x[i] + k, signs);
      LAMINA_UNROLL
      for (int j = 0; j < NR; ++j) dot4(acc[i][j], v, b[j]);
    }
    w += 64 * NR;
  };
  for (int ty = 0; ty < tile.tap_end - tile.tap_begin; ++ty) {
    for (int tx = 0; tx < a.taps_x; ++tx) {
      int64_t k = ty * a.dilation_y * a.row + tx * a.tap_x;
      const int64_t end = k + a.length;
      for (; k + 16 <= end; k += 16) {
        step(k);
        step(k + 4);
        step(k + 8);
        step(k + 12);
      }
      for (; k < end; k += 4) step(k);
    }
  }
  if constexpr (NR == 2) {
    if (a.end.folded && channels == 32) {
      return store_folded<MR>(
          a.end, tile, [&](int i, int j) __attribute__((always_inline)) { return acc[i][j]; }, first);
    }
  }
  alignas(64) int32_t sums[MR * kConvPanel];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) _mm512_store_si512(sums + i * kConvPanel + 16 * j, acc[i][j]);
  }
  finish_conv_tile(a.end, tile, sums, first, channels);
}

using Tile = void (*)(const Int8ConvArgs&, const ConvTile&, const int8_t*, int64_t, int);

template <int NR>
constexpr Tile kTiles[kConvMaxPixels] = {
    tile_kernel<1, NR>,  tile_kernel<2, NR>,  tile_kernel<3, NR>,  tile_kernel<4, NR>, tile_kernel<5, NR>,
    tile_kernel<6, NR>,  tile_kernel<7, NR>,  tile_kernel<8, NR>,  tile_kernel<9, NR>, tile_kernel<10, NR>,
    tile_kernel<11, NR>, tile_kernel<12, NR>, tile_kernel<13, NR>, tile_kernel<14, NR>};

void int8_conv(const Int8ConvArgs& a) {
  const int64_t depth = a.taps_y * a.taps_x * a.length;
  int64_t most = tuning::kInt8ConvWeightBytes / (depth > 0 ? depth : 1) / kConvPanel * kConvPanel;
  if (most < kConvPanel) most = kConvPanel;
  for (int64_t begin = 0; begin < a.channels; begin += most) {
    const int64_t end = begin + most < a.channels ? begin + most : a.channels;
    for_each_conv_tile(a, kConvMaxPixels, [&](const ConvTile& tile) {
      for_each_conv_panel(a, begin, end, [&](const int8_t* panel, int64_t first, int channels, int width) {
        (width == 32 ? kTiles<2> : kTiles<1>)[tile.count - 1](a, tile, panel, first, channels);
      });
    });
  }
}

REGISTER_KERNEL(int8_conv_table, int8_conv);

}  // namespace
}  // namespace lamina::LAMINA_ISA
