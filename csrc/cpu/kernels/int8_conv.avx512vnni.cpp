// int8_conv on vpdpbusd: 64 multiply-adds an instruction, one instruction a cycle.
//
// A tile of 14 pixels x 32 channels keeps its 28 accumulators in registers over all taps. Per group of four k it loads
// two weight vectors, and one 32-bit piece of each pixel, which comes with its sign bits flipped by the same
// instruction that broadcasts it (see [NOTE] s8s8 compensation in int8_gemm.h): 16 loads for 28 products, and no copy
// of the input in another format. What the flips add to a sum is subtracted where it starts, and depends only on which
// rows of taps the tile has.
//
// Where the epilogue is folded, a tile is 7 pixels x 64 channels: as many accumulators and 5% faster with a residual
// and on small images, since lines of the output and of the residual are whole, and pixels' addresses stay in
// registers.
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

LAMINA_INLINE void dot4_memory(__m512i& acc, __m512i a, const int8_t* b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "m"(*reinterpret_cast<const int8_t (*)[64]>(b)));
}

// The lines of a tile's residual and output come while its sums are made; a store that misses holds up the next tile.
template <int MR>
LAMINA_INLINE void prefetch_ends(const ConvEpilogue& end, const ConvTile& tile, int64_t first, int64_t channels) {
  const auto fetch = [&](const ConvImages& m, const int64_t* at) __attribute__((always_inline)) {
    const int64_t bytes = channels * m.format;
    const char* base = static_cast<const char*>(m.data) + first * m.format;
    for (int64_t byte = 0; byte < bytes; byte += 64) {
      LAMINA_UNROLL
      for (int i = 0; i < MR; ++i) __builtin_prefetch(base + at[i] * m.format + byte);
    }
  };
  if (end.residual.data) fetch(end.residual, tile.residual);
  fetch(end.out, tile.out);
}

// MR pixels x 16 NR channels from `first` on: all of their sums, and what becomes of them.
template <int MR, int NR>
__attribute__((noinline)) void tile_kernel(const Int8ConvArgs& a, const ConvTile& tile, const int8_t* w, int64_t first,
                                           int channels) {
  __m512i acc[MR][NR];
  {
    const int32_t* compensation = tile.compensation + tile.tap_begin * tile.ld_compensation + first;
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) acc[0][j] = _mm512_setzero_si512();
    for (int t = tile.tap_begin; t < tile.tap_end; ++t, compensation += tile.ld_compensation) {
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
  prefetch_ends<MR>(a.end, tile, first, channels);
  __m512i signs = _mm512_set1_epi32(int32_t(0x80808080u));
  __asm__("" : "+v"(signs));  // keeps it in a register
  w += (tile.tap_begin * a.taps_x * a.length + tile.from) * 16 * NR;
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
      int64_t k = ty * a.dilation_y * a.row + tx * a.tap_x + tile.from;
      const int64_t end = k + tile.to - tile.from;
      for (; k + 16 <= end; k += 16) {
        step(k);
        step(k + 4);
        step(k + 8);
        step(k + 12);
      }
      for (; k < end; k += 4) step(k);
      w += (a.length - tile.to + tile.from) * 16 * NR;
    }
  }
  if constexpr (NR == 2) {
    const auto of = [&](int i, int j) __attribute__((always_inline)) { return acc[i][j]; };
    const ConvEpilogue& end = a.end;
    const bool none = end.activation == Activation::none;
    if (channels == 32) {
      if (end.folded) return store_folded<MR>(end, tile, of, first);
      if (end.out.format == EpilogueMatrix::b16 && none && !end.residual.data) {
        return store_bf16_of_sums<MR>(end, tile, of, first);
      }
      if (end.out.format == EpilogueMatrix::int8 && end.residual.data && end.residual.format == EpilogueMatrix::b16 &&
          (none || end.activation == Activation::relu)) {
        return store_codes_of_sums<MR>(end, tile, of, first);
      }
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

// MR pixels x two panels whose epilogue is folded. Half of the weights are operands in memory, or there would be more
// than 32 registers of them and of sums.
template <int MR>
__attribute__((noinline)) void wide_tile(const Int8ConvArgs& a, const ConvTile& tile, const int8_t* w, int64_t first) {
  const int64_t depth = a.taps_y * a.taps_x * a.length;
  __m512i acc[MR][4];
  {
    const int32_t* compensation = tile.compensation + tile.tap_begin * tile.ld_compensation + first;
    LAMINA_UNROLL
    for (int j = 0; j < 4; ++j) acc[0][j] = _mm512_setzero_si512();
    for (int t = tile.tap_begin; t < tile.tap_end; ++t, compensation += tile.ld_compensation) {
      LAMINA_UNROLL
      for (int j = 0; j < 4; ++j) {
        acc[0][j] = _mm512_sub_epi32(acc[0][j], _mm512_loadu_si512(compensation + 16 * j));
      }
    }
    LAMINA_UNROLL
    for (int i = 1; i < MR; ++i) {
      LAMINA_UNROLL
      for (int j = 0; j < 4; ++j) acc[i][j] = acc[0][j];
    }
  }
  prefetch_ends<MR>(a.end, tile, first, 64);
  __m512i signs = _mm512_set1_epi32(int32_t(0x80808080u));
  __asm__("" : "+v"(signs));  // keeps it in a register
  w += (tile.tap_begin * a.taps_x * a.length + tile.from) * kConvPanel;
  const int8_t* second = w + depth * kConvPanel;
  const int8_t* x[MR];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) x[i] = tile.x[i];
  const auto step = [&](int64_t k, int64_t at) __attribute__((always_inline)) {
    const __m512i b0 = _mm512_loadu_si512(w + at), b1 = _mm512_loadu_si512(w + at + 64);
    LAMINA_UNROLL
    for (int i = 0; i < MR; ++i) {
      const __m512i v = flipped(x[i] + k, signs);
      dot4(acc[i][0], v, b0);
      dot4(acc[i][1], v, b1);
      dot4_memory(acc[i][2], v, second + at);
      dot4_memory(acc[i][3], v, second + at + 64);
    }
  };
  for (int ty = 0; ty < tile.tap_end - tile.tap_begin; ++ty) {
    for (int tx = 0; tx < a.taps_x; ++tx) {
      int64_t k = ty * a.dilation_y * a.row + tx * a.tap_x + tile.from;
      const int64_t end = k + tile.to - tile.from;
      for (; k + 16 <= end; k += 16, w += 512, second += 512) {
        step(k, 0);
        step(k + 4, 128);
        step(k + 8, 256);
        step(k + 12, 384);
      }
      for (; k < end; k += 4, w += 128, second += 128) step(k, 0);
      const int64_t left_out = (a.length - tile.to + tile.from) * kConvPanel;
      w += left_out;
      second += left_out;
    }
  }
  store_folded_lines<MR>(a.end, tile, [&](int i, int j) __attribute__((always_inline)) { return acc[i][j]; }, first);
}

using WideTile = void (*)(const Int8ConvArgs&, const ConvTile&, const int8_t*, int64_t);

constexpr int kWidePixels = 7, kWideChannels = 2 * kConvPanel;
constexpr WideTile kWideTiles[kWidePixels] = {wide_tile<1>, wide_tile<2>, wide_tile<3>, wide_tile<4>,
                                              wide_tile<5>, wide_tile<6>, wide_tile<7>};

using Tile = void (*)(const Int8ConvArgs&, const ConvTile&, const int8_t*, int64_t, int);

template <int NR>
constexpr Tile kTiles[kConvMaxPixels] = {
    tile_kernel<1, NR>,  tile_kernel<2, NR>,  tile_kernel<3, NR>,  tile_kernel<4, NR>, tile_kernel<5, NR>,
    tile_kernel<6, NR>,  tile_kernel<7, NR>,  tile_kernel<8, NR>,  tile_kernel<9, NR>, tile_kernel<10, NR>,
    tile_kernel<11, NR>, tile_kernel<12, NR>, tile_kernel<13, NR>, tile_kernel<14, NR>};

constexpr int kEdgeChannels = 256;

// The compensation of rows of taps without one of their three taps, of channels [begin, end): [taps_y][kEdgeChannels].
void edge_compensation(const Int8ConvArgs& a, int64_t begin, int64_t end, int tap, int32_t* to) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int ty = 0; ty < a.taps_y; ++ty) {
    for (int64_t first = begin; first < end; first += kConvPanel) {
      const int8_t* w = a.panels + first * a.taps_y * a.length + (ty * a.length + tap * a.edge) * kConvPanel;
      __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int64_t k = 0; k < a.edge; k += 4, w += 128) {
        dot4_memory(sums[0], ones, w);
        dot4_memory(sums[1], ones, w + 64);
      }
      for (int j = 0; j < 2; ++j) {
        const __m512i all = _mm512_loadu_si512(a.compensation + ty * a.ld_compensation + first + 16 * j);
        _mm512_store_si512(to + ty * kEdgeChannels + first - begin + 16 * j,
                           _mm512_sub_epi32(all, _mm512_slli_epi32(sums[j], 7)));
      }
    }
  }
}

void int8_conv(const Int8ConvArgs& a) {
  const int64_t depth = a.taps_y * a.taps_x * a.length;
  int64_t most = tuning::kInt8ConvWeightBytes / (depth > 0 ? depth : 1) / kConvPanel * kConvPanel;
  if (most < kConvPanel) most = kConvPanel;
  const int64_t pixels = (a.row_end - a.row_begin) * a.out_width;
  const bool shallow = depth <= tuning::kInt8ConvShallowDepth || pixels <= tuning::kInt8ConvFewPixels;
  const bool wide = a.end.folded && a.channels % kWideChannels == 0 && (a.end.residual.data || shallow);
  if (wide) most = most < kWideChannels ? kWideChannels : most / kWideChannels * kWideChannels;
  // On a 7 x 7 map a tenth of the products of a 3 x 3 kernel are with columns of padding. The first and the last column
  // on their own are few pixels, enough for tiles only where there are several images.
  const bool edges = a.edge > 0 && a.taps_y == 3 && a.out_width >= 2 && a.out_width <= tuning::kInt8ConvNarrow &&
                     a.row_end - a.row_begin >= tuning::kInt8ConvNarrowImages * a.out_height &&
                     a.channels % kConvPanel == 0;
  if (edges && most > kEdgeChannels) most = kEdgeChannels;
  alignas(64) int32_t compensation[2][3 * kEdgeChannels];
  int rows_there = 0;  // bit 4 * taps_begin + taps_end
  for (ConvRow row(a, a.row_begin); edges && row.index < a.row_end; row.next(a)) {
    rows_there |= 1 << (4 * row.begin + row.end);
  }
  for (int64_t begin = 0; begin < a.channels; begin += most) {
    const int64_t end = begin + most < a.channels ? begin + most : a.channels;
    const auto tiles = [&](const ConvColumns& columns) {
      if (wide) {
        for_each_conv_tile(a, columns, kWidePixels, [&](const ConvTile& tile) {
          for (int64_t first = begin; first < end; first += kWideChannels) {
            kWideTiles[tile.count - 1](a, tile, a.panels + first * depth, first);
          }
        });
        return;
      }
      for_each_conv_tile(a, columns, kConvMaxPixels, [&](const ConvTile& tile) {
        for_each_conv_panel(a, begin, end, [&](const int8_t* panel, int64_t first, int channels, int width) {
          (width == 32 ? kTiles<2> : kTiles<1>)[tile.count - 1](a, tile, panel, first, channels);
        });
      });
    };
    ConvColumns columns{0, a.out_width, 0, a.length, a.compensation, a.ld_compensation};
    if (!edges) {
      tiles(columns);
      continue;
    }
    const auto all_rows = [&](ConvColumns columns) {
      columns.some_rows = true;
      for (int rows = 0; rows < 16; ++rows) {
        if (!(rows_there >> rows & 1)) continue;
        columns.taps_begin = rows / 4;
        columns.taps_end = rows % 4;
        tiles(columns);
      }
    };
    if (a.left_edge) {
      edge_compensation(a, begin, end, 0, compensation[0]);
      all_rows({0, 1, a.edge, a.length, compensation[0] - begin, kEdgeChannels});
      columns.begin = 1;
    }
    if (a.right_edge) {
      edge_compensation(a, begin, end, 2, compensation[1]);
      all_rows({a.out_width - 1, a.out_width, 0, a.length - a.edge, compensation[1] - begin, kEdgeChannels});
      columns.end = a.out_width - 1;
    }
    if (columns.begin < columns.end) all_rows(columns);
  }
}

REGISTER_KERNEL(int8_conv_table, int8_conv);

}  // namespace
}  // namespace lamina::LAMINA_ISA
