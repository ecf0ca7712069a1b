// int8_winograd on the vector vocabulary: the products are its time, the rest wants to be hidden behind them.
//
// A product takes tiles of 14 x 32 sums (of 32 registers; fewer where there are less) over all channels. Its inputs lie
// 64 bytes apart, so that every address of the loop is a constant away from one pointer.
#pragma once

#include "cpu/kernels/int8_conv_tile.h"
#include "cpu/kernels/int8_winograd.h"
#include "cpu/kernels/row_tiles.h"
#include "cpu/vec/words.h"
#if defined(__AVX512BW__)
#include "cpu/kernels/int8_conv_folded.h"
#endif

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kWords = I16::bytes / 2;
constexpr int kParts = kWinogradChunk / I16::bytes;  // registers of a chunk
constexpr int kSlices = kConvPanel / F32::lanes;     // registers of a panel's sums

// -- inputs

// One dimension of B^T d.
LAMINA_INLINE void transform_input(const I16 (&d)[6], I16 (&r)[6]) {
  const I16 even = d[4] - shift_left<2>(d[2]), odd = d[3] - shift_left<2>(d[1]);
  r[1] = even + odd;
  r[2] = even - odd;
  const I16 even2 = d[4] - d[2], odd2 = shift_left<1>(d[3] - d[1]);
  r[3] = even2 + odd2;
  r[4] = even2 - odd2;
  r[0] = shift_left<2>(d[0] - d[2]) + even2;
  r[5] = d[5] - d[3] - shift_left<1>(odd2);
}

// The even or odd ones of up to I16::bytes channels of a tile.
template <bool Odd, class Load>
LAMINA_INLINE void transform_words(const Load& load, int16_t* to, int64_t point) {
  I16 half[6][6];
  LAMINA_UNROLL
  for (int j = 0; j < 6; ++j) {
    I16 d[6], r[6];
    LAMINA_UNROLL
    for (int i = 0; i < 6; ++i) {
      const I16 bytes = load(i, j);
      d[i] = Odd ? odd_bytes(bytes) : even_bytes(bytes);
    }
    transform_input(d, r);
    LAMINA_UNROLL
    for (int i = 0; i < 6; ++i) half[i][j] = r[i];
  }
  LAMINA_UNROLL
  for (int i = 0; i < 6; ++i) {
    I16 r[6];
    transform_input(half[i], r);
    LAMINA_UNROLL
    for (int j = 0; j < 6; ++j) store(to + (6 * i + j) * point, r[j]);
  }
}

// `Whole`: all pixels of the tile are there.
template <bool Whole>
void transform_tile(const Int8WinogradInputArgs& a, int64_t tile, int64_t image, int64_t y, int64_t x) {
  const Int8WinogradTiles& t = a.tiles;
  const int64_t point = winograd_input_point(t);
  int16_t* block = t.inputs + tile / t.block * kWinogradPoints * point + tile % t.block * 32;
  const int8_t* from = a.x + image * a.image + y * a.row + x * a.pixel;
  alignas(64) static constexpr int8_t kZeros[64] = {};
  const int8_t* pixels[6][6];
  if constexpr (!Whole) {
    for (int i = 0; i < 6; ++i) {
      for (int j = 0; j < 6; ++j) {
        const bool inside = y + i >= 0 && y + i < a.height && x + j >= 0 && x + j < a.width;
        pixels[i][j] = inside ? from + i * a.row + j * a.pixel : nullptr;
      }
    }
  }
  for (int64_t c = 0; c < t.channels; c += I16::bytes) {
    const int n = int(t.channels - c < I16::bytes ? t.channels - c : I16::bytes);
    const auto load = [&](int i, int j) __attribute__((always_inline)) {
      const int8_t* p = Whole ? from + i * a.row + j * a.pixel : pixels[i][j];
      if constexpr (!Whole) {
        if (!p) return load_words(kZeros);
      }
      return n == I16::bytes ? load_words(p + c) : load_words_n(p + c, n);
    };
    const int64_t chunk = c / kWinogradChunk, part = c % kWinogradChunk / I16::bytes;
    int16_t* to = block + chunk * 2 * t.block * 32 + part * kWords;
    transform_words<false>(load, to, point);
    transform_words<true>(load, to + t.block * 32, point);
  }
}

void int8_winograd_inputs(const Int8WinogradInputArgs& a) {
  const Int8WinogradTiles& t = a.tiles;
  for (int64_t tile = 0; tile < t.count; ++tile) {
    const int64_t image = (t.first + tile) / t.per_image, at = (t.first + tile) % t.per_image;
    const int64_t y = at / t.across * 4 - a.pad_top, x = at % t.across * 4 - a.pad_left;
    const bool whole = y >= 0 && x >= 0 && y + 6 <= a.height && x + 6 <= a.width;
    (whole ? transform_tile<true> : transform_tile<false>)(a, tile, image, y, x);
  }
}

// -- weights

// One dimension of G g, times 4, -6, -6, 24, 24 and 1.
LAMINA_INLINE void transform_weight(const I16 (&g)[3], I16 (&r)[6]) {
  const I16 outer = g[0] + g[2], wide = g[0] + shift_left<2>(g[2]), twice = shift_left<1>(g[1]);
  r[0] = g[0];
  r[1] = outer + g[1];
  r[2] = outer - g[1];
  r[3] = wide + twice;
  r[4] = wide - twice;
  r[5] = g[2];
}

template <bool Odd>
LAMINA_INLINE void transform_filters(const int8_t* from, int64_t tap, int16_t* to, int64_t point) {
  I16 half[6][3];
  LAMINA_UNROLL
  for (int j = 0; j < 3; ++j) {
    I16 g[3], r[6];
    LAMINA_UNROLL
    for (int i = 0; i < 3; ++i) {
      const I16 bytes = load_words(from + (3 * i + j) * tap);
      g[i] = Odd ? odd_bytes(bytes) : even_bytes(bytes);
    }
    transform_weight(g, r);
    LAMINA_UNROLL
    for (int i = 0; i < 6; ++i) half[i][j] = r[i];
  }
  LAMINA_UNROLL
  for (int i = 0; i < 6; ++i) {
    I16 r[6];
    transform_weight(half[i], r);
    LAMINA_UNROLL
    for (int j = 0; j < 6; ++j) store(to + (6 * i + j) * point, r[j]);
  }
}

void int8_winograd_weights(const Int8WinogradWeightArgs& a) {
  const int64_t point = winograd_weight_point(a.channels), tap = a.channels * kConvPanel;
  const int64_t quads = a.channels / 4;
  int16_t* to = a.weights;
  for (int64_t chunk = 0; chunk < quads; chunk += kWinogradChunk / 4) {
    const int64_t rest = quads - chunk, count = rest < kWinogradChunk / 4 ? rest : kWinogradChunk / 4;
    for (int64_t q = 0; q < count; ++q) {
      const int8_t* from = a.panel + (chunk + q) * 4 * kConvPanel;
      for (int n = 0; n < 4 * kConvPanel; n += I16::bytes) {
        int16_t* even = to + q * 2 * kConvPanel + n / 2;
        transform_filters<false>(from + n, tap, even, point);
        transform_filters<true>(from + n, tap, even + count * 2 * kConvPanel, point);
      }
    }
    to += count * 4 * kConvPanel;
  }
}

// -- products

// Accumulators of a product: rows x two registers.
constexpr int kMaxRows = F32::registers >= 32 ? 14 : 6;

// MR tiles x two registers of outputs. x: of the first tile; `next`: words to the next half of a chunk.
template <int MR>
__attribute__((noinline)) void product(const int16_t* x, int64_t next, int64_t channels, const int16_t* w,
                                       int32_t* sums) {
  constexpr int kLanes = F32::lanes;
  I32 acc[MR][2];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = set1_i32(0);
  const auto step = [&](const int16_t* p, const int16_t* b) __attribute__((always_inline)) {
    const I32 low = load_i32(reinterpret_cast<const int32_t*>(b));
    const I32 high = load_i32(reinterpret_cast<const int32_t*>(b) + kLanes);
    LAMINA_UNROLL
    for (int i = 0; i < MR; ++i) {
      int32_t pair;
      memcpy(&pair, p + i * 32, 4);
      const I32 v = set1_i32(pair);
      acc[i][0] = dot2(acc[i][0], v, low);
      acc[i][1] = dot2(acc[i][1], v, high);
    }
  };
  for (int64_t c = 0; c < channels; c += kWinogradChunk) {
    const int64_t rest = channels - c, pairs = (rest < kWinogradChunk ? rest : kWinogradChunk) / 4;
    for (int half = 0; half < 2; ++half, x += next) {
      const int16_t *p = x, *stop = x + 2 * pairs;
      for (; p + 8 <= stop; p += 8) {
        LAMINA_UNROLL
        for (int k = 0; k < 4; ++k) step(p + 2 * k, w + k * 2 * kConvPanel);
        w += 8 * kConvPanel;
      }
      for (; p < stop; p += 2) {
        step(p, w);
        w += 2 * kConvPanel;
      }
    }
  }
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    store_i32(sums + i * kConvPanel, acc[i][0]);
    store_i32(sums + i * kConvPanel + kLanes, acc[i][1]);
  }
}

using Product = void (*)(const int16_t*, int64_t, int64_t, const int16_t*, int32_t*);

template <int MR>
constexpr Product product_if_it_fits() {
  if constexpr (MR <= kMaxRows) {
    return product<MR>;
  } else {
    return nullptr;  // never asked for
  }
}

constexpr Product kProducts[14] = {product_if_it_fits<1>(),  product_if_it_fits<2>(),  product_if_it_fits<3>(),
                                   product_if_it_fits<4>(),  product_if_it_fits<5>(),  product_if_it_fits<6>(),
                                   product_if_it_fits<7>(),  product_if_it_fits<8>(),  product_if_it_fits<9>(),
                                   product_if_it_fits<10>(), product_if_it_fits<11>(), product_if_it_fits<12>(),
                                   product_if_it_fits<13>(), product_if_it_fits<14>()};

// -- outputs

// Adders are more than shifters.
LAMINA_INLINE I32 twice(I32 x) { return x + x; }

// One dimension of A^T m without the factors that the weights lack: outputs times 24, 12, 6 and 6.
LAMINA_INLINE void transform_output(const I32 (&m)[6], I32 (&y)[4]) {
  const I32 s = m[1] + m[2], d = m[1] - m[2], p = m[3] + m[4], q = m[3] - m[4];
  y[0] = twice(twice(m[0] - s) + m[0]) + p;
  y[1] = q - twice(d);
  y[2] = p - s;
  y[3] = twice(q + twice(m[5]) + m[5]) - d;
}

// A row of 4 outputs, 9 times and 2^(shift + 3, 2, 1, 1) times what it should be.
LAMINA_INLINE void take_factors(I32 (&y)[4], int shift) {
  constexpr uint32_t kNinth = 0x38e38e39;  // 9 times it is 1 modulo 2^32
  y[0] = shift_right(times(y[0], kNinth), shift + 3);
  y[1] = shift_right(times(y[1], kNinth), shift + 2);
  y[2] = shift_right(times(y[2], kNinth), shift + 1);
  y[3] = shift_right(times(y[3], kNinth), shift + 1);
}

// Calls finish(i, y) for the four rows of a tile: exact sums of a register of channels.
template <class Finish>
LAMINA_INLINE void sums_of_tile(const int32_t* products, int64_t point, const Finish& finish) {
  I32 half[4][6];
  LAMINA_UNROLL
  for (int j = 0; j < 6; ++j) {
    I32 m[6], y[4];
    LAMINA_UNROLL
    for (int i = 0; i < 6; ++i) m[i] = load_i32(products + (6 * i + j) * point);
    transform_output(m, y);
    LAMINA_UNROLL
    for (int i = 0; i < 4; ++i) half[i][j] = y[i];
  }
  LAMINA_UNROLL
  for (int i = 0; i < 4; ++i) {
    I32 y[4];
    transform_output(half[i], y);
    take_factors(y, i < 2 ? 3 - i : 1);
    finish(i, y);
  }
}

// A tile of outputs: how many of its 4 x 4 there are, and where the first is.
struct OutputTile {
  int rows, columns;
  const float* scale;
  int64_t out, residual;
};

#if defined(__AVX512BW__)
template <bool Residual>
void finish_folded(const Int8WinogradOutputArgs& a, const OutputTile& tile, const int32_t* products) {
  const ConvEpilogue& end = a.end;
  const int64_t point = winograd_product_point(a.tiles.block);
  for (int first = 0; first < kConvPanel; first += F32::lanes) {
    const FoldedRow folded(end, tile.scale, first);
    int8_t* out = static_cast<int8_t*>(end.out.data) + tile.out + first;
    const int8_t* residual = static_cast<const int8_t*>(end.residual.data) + tile.residual + first;
    sums_of_tile(products + first, point, [&](int i, const I32(&y)[4]) __attribute__((always_inline)) {
      if (i >= tile.rows) return;
      const __m512i sums[4] = {y[0].r, y[1].r, y[2].r, y[3].r};
      folded.store<Residual>(sums, out + i * end.out.row, end.out.column, residual + i * end.residual.row,
                             end.residual.column, tile.columns);
    });
  }
}
#endif

void finish_any(const Int8WinogradOutputArgs& a, const OutputTile& tile, const int32_t* products) {
  const ConvEpilogue& end = a.end;
  ConvTile pixels;
  pixels.count = tile.columns;
  pixels.scale = tile.scale;
  for (int first = 0; first < kConvPanel; first += F32::lanes) {
    sums_of_tile(products + first, winograd_product_point(a.tiles.block), [&](int i, const I32(&y)[4]) {
      if (i >= tile.rows) return;
      alignas(64) int32_t sums[4 * kConvPanel];
      for (int j = 0; j < 4; ++j) {
        store_i32(sums + j * kConvPanel, y[j]);
        pixels.out[j] = tile.out + i * end.out.row + j * end.out.column;
        pixels.residual[j] = tile.residual + i * end.residual.row + j * end.residual.column;
      }
      finish_conv_tile(end, pixels, sums, first, F32::lanes);
    });
  }
}

void finish_tile(const Int8WinogradOutputArgs& a, int64_t tile, const int32_t* products) {
  const Int8WinogradTiles& t = a.tiles;
  const ConvEpilogue& end = a.end;
  const int64_t image = tile / t.per_image, at = tile % t.per_image;
  const int64_t y = at / t.across * 4, x = at % t.across * 4;
  const int64_t rows = t.out_height - y, columns = t.out_width - x;
  const OutputTile to = {.rows = int(rows < 4 ? rows : 4),
                         .columns = int(columns < 4 ? columns : 4),
                         .scale = end.scale + image * end.image_scale,
                         .out = image * end.out.image + y * end.out.row + x * end.out.column,
                         .residual = image * end.residual.image + y * end.residual.row + x * end.residual.column};
#if defined(__AVX512BW__)
  if (end.folded) return (end.residual.data ? finish_folded<true> : finish_folded<false>)(a, to, products);
#endif
  finish_any(a, to, products);
}

void int8_winograd_outputs(const Int8WinogradOutputArgs& a) {
  const Int8WinogradTiles& t = a.tiles;
  const int64_t of_inputs = winograd_input_point(t), of_weights = winograd_weight_point(t.channels);
  const int64_t of_products = winograd_product_point(t.block);
  const int16_t* inputs = t.inputs;
  for (int64_t begin = 0; begin < t.count; begin += t.block, inputs += kWinogradPoints * of_inputs) {
    const int count = int(t.count - begin < t.block ? t.count - begin : t.block);
    for (int point = 0; point < kWinogradPoints; ++point) {
      for_balanced_tiles(count, kMaxRows, [&](int64_t row, int rows) {
        const int16_t* x = inputs + point * of_inputs + row * 32;
        int32_t* sums = a.products + point * of_products + row * kConvPanel;
        for (int n = 0; n < kConvPanel; n += 2 * F32::lanes) {
          kProducts[rows - 1](x, t.block * 32, t.channels, a.weights + point * of_weights + 2 * n, sums + n);
        }
      });
    }
    for (int i = 0; i < count; ++i) finish_tile(a, t.first + begin + i, a.products + i * kConvPanel);
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
