// int8_depthwise on vpdpbusd, 64 channels at a time.
//
// The instruction adds up four neighbouring bytes; here they are four rows of one column and channel. Unpacking bytes
// and then words interleaves four rows of 64 channels into four registers, each with 4 channels of every 128-bit lane;
// the packs of the epilogue are the exact inverse, so the codes come out in order without another shuffle. What is per
// channel (weights, scales, bias) is brought into the order of the registers once per call.
//
// 3 x 3 with stride 1: the four rows serve two output rows (weights w0 w1 w2 0 and 0 w0 w1 w2), and four interleaved
// columns in registers serve two neighbouring outputs, which share the loads of weights.
// All else: interleaved columns of 16 outputs go through L1, and four outputs share each weight.
#include "cpu/kernels/int8_depthwise.h"

#include "cpu/kernels/int8_conv_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kBlock = 64;
constexpr int kColumns = kDepthwiseColumns;

struct Quad {
  __m512i r[4];
};

// acc += a (unsigned) . b (signed); inline assembly for the reason in int8_conv.
LAMINA_INLINE void dot4(__m512i& acc, __m512i a, const __m512i& b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "vm"(b));
}

LAMINA_INLINE Quad interleave(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
  const __m512i cd = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
  return {{_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd), _mm512_unpacklo_epi16(ab_high, cd_high),
           _mm512_unpackhi_epi16(ab_high, cd_high)}};
}

// From 64 channels in order to the order of interleave, and back: the 4 x 4 transpose of 128-bit lanes.
LAMINA_INLINE Quad turn(const Quad& z) {
  const __m512i a = _mm512_shuffle_i32x4(z.r[0], z.r[1], 0x44), b = _mm512_shuffle_i32x4(z.r[0], z.r[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(z.r[2], z.r[3], 0x44), d = _mm512_shuffle_i32x4(z.r[2], z.r[3], 0xee);
  return {{_mm512_shuffle_i32x4(a, c, 0x88), _mm512_shuffle_i32x4(a, c, 0xdd), _mm512_shuffle_i32x4(b, d, 0x88),
           _mm512_shuffle_i32x4(b, d, 0xdd)}};
}

LAMINA_INLINE Quad load_turned(const void* p) {
  const char* at = static_cast<const char*>(p);
  return turn({{_mm512_loadu_si512(at), _mm512_loadu_si512(at + 64), _mm512_loadu_si512(at + 128),
                _mm512_loadu_si512(at + 192)}});
}

// One block of 64 channels of a call.
struct Block {
  const Int8DepthwiseArgs& a;
  int64_t first;
  int channels;
  __mmask64 mask;
  Quad negative;  // -128 sum w

  Block(const Int8DepthwiseArgs& a, int64_t first)
      : a(a), first(first), channels(int(a.channels - first < kBlock ? a.channels - first : kBlock)) {
    mask = channels == kBlock ? ~__mmask64{0} : (__mmask64{1} << channels) - 1;
    const Quad c = load_turned(a.compensation + first);
    for (int j = 0; j < 4; ++j) negative.r[j] = _mm512_sub_epi32(_mm512_setzero_si512(), c.r[j]);
  }

  // Row `y` of an image, or zeros, at tap column 0 of output column 0.
  LAMINA_INLINE const int8_t* row(int64_t image, int64_t y) const {
    if (y < 0 || y >= a.height) return a.zeros + first;
    return a.x + image * a.image + y * a.row + first;
  }
  // 64 codes with an offset of 128.
  template <bool Full>
  LAMINA_INLINE __m512i load(const int8_t* p) const {
    const __m512i x = Full ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(mask, p);
    return _mm512_xor_si512(x, _mm512_set1_epi8(char(0x80)));
  }
  LAMINA_INLINE __m512i weights(int ky, int kx) const {
    if (ky < 0 || ky >= a.taps_y) return _mm512_setzero_si512();
    return _mm512_loadu_si512(a.weights + (ky * a.taps_x + kx) * a.ld_weights + first);
  }
};

// What turns the sums of a pixel into codes, where the epilogue is folded and there is no residual.
struct Folded {
  Quad scale, bias;
  __m512i lowest, highest;

  LAMINA_INLINE Folded(const Block& b, const float* scales)
      : scale(load_turned(scales + b.first)),
        bias(load_turned(b.a.end.bias + b.first)),
        lowest(_mm512_set1_epi8(char(int(b.a.end.lowest)))),
        highest(_mm512_set1_epi8(char(int(b.a.end.highest)))) {}

  // The codes of N pixels.
  template <int N>
  LAMINA_INLINE void codes(const Quad (&sums)[N], __m512i (&to)[N]) const {
    __m512i i[N][4];
    LAMINA_UNROLL
    for (int j = 0; j < 4; ++j) {
      LAMINA_UNROLL
      for (int n = 0; n < N; ++n) {
        const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[n].r[j]), _mm512_castsi512_ps(scale.r[j]));
        i[n][j] = _mm512_cvtps_epi32(_mm512_add_ps(y, _mm512_castsi512_ps(bias.r[j])));
      }
    }
    LAMINA_UNROLL
    for (int n = 0; n < N; ++n) {
      const __m512i words = _mm512_packs_epi32(i[n][0], i[n][1]), more = _mm512_packs_epi32(i[n][2], i[n][3]);
      to[n] = _mm512_min_epi8(_mm512_max_epi8(_mm512_packs_epi16(words, more), lowest), highest);
    }
  }
};

// The sums of a pixel through the epilogue that all kernels share.
__attribute__((noinline)) void finish_pixel(const Block& b, int64_t image, int64_t y, int64_t ox, const Quad& turned) {
  const ConvEpilogue& end = b.a.end;
  ConvTile tile;
  tile.count = 1;
  tile.scale = end.scale + image * end.image_scale;
  tile.out[0] = image * end.out.image + y * end.out.row + ox * end.out.column;
  tile.residual[0] = image * end.residual.image + y * end.residual.row + ox * end.residual.column;
  alignas(64) int32_t sums[kBlock];
  const Quad q = turn(turned);
  for (int j = 0; j < 4; ++j) _mm512_store_si512(sums + 16 * j, q.r[j]);
  for (int c = 0; c < b.channels; c += kConvPanel) {
    const int n = b.channels - c < kConvPanel ? b.channels - c : kConvPanel;
    finish_conv_tile(end, tile, sums + c, b.first + c, n);
  }
}

LAMINA_INLINE void store_block(const Block& b, int8_t* p, __m512i codes) {
  if (b.channels == kBlock) {
    _mm512_storeu_si512(p, codes);
  } else {
    _mm512_mask_storeu_epi8(p, b.mask, codes);
  }
}

// Output rows y and, of Rows 2, y + 1 of a 3 x 3 kernel with stride 1.
template <bool Full, int Rows, class Take>
LAMINA_INLINE void rows_of_3x3(const Block& b, const Quad (&w)[2][3], int64_t image, int64_t y, const Take& take) {
  const Int8DepthwiseArgs& a = b.a;
  const int64_t top = y - a.pad_y;
  const int8_t* x[4];
  for (int i = 0; i < 4; ++i) x[i] = b.row(image, top + i);
  int64_t at = 0;
  const auto column = [&]() __attribute__((always_inline)) {
    const Quad q =
        interleave(b.load<Full>(x[0] + at), b.load<Full>(x[1] + at), b.load<Full>(x[2] + at), b.load<Full>(x[3] + at));
    at += a.pixel;
    return q;
  };
  // N neighbouring outputs, which share the loads of weights, scales and biases.
  const auto outputs = [&]<int N>(int64_t ox, const Quad(&c)[N + 2]) __attribute__((always_inline)) {
    LAMINA_UNROLL
    for (int h = 0; h < Rows; ++h) {
      Quad acc[N];
      LAMINA_UNROLL
      for (int j = 0; j < 4; ++j) {
        LAMINA_UNROLL
        for (int i = 0; i < N; ++i) acc[i].r[j] = b.negative.r[j];
        LAMINA_UNROLL
        for (int kx = 0; kx < 3; ++kx) {
          const __m512i weight = w[h][kx].r[j];
          LAMINA_UNROLL
          for (int i = 0; i < N; ++i) dot4(acc[i].r[j], c[i + kx].r[j], weight);
        }
      }
      take(h, ox, acc);
    }
  };
  Quad c[4] = {column(), column(), {}, {}};
  int64_t ox = 0;
  for (; ox + 2 <= a.out_width; ox += 2) {
    c[2] = column();
    c[3] = column();
    outputs.template operator()<2>(ox, c);
    c[0] = c[2];
    c[1] = c[3];
  }
  if (ox < a.out_width) outputs.template operator()<1>(ox, {c[0], c[1], column()});
}

// One output row of any kernel.
template <class Take>
void row_of_any(const Block& b, const Quad* w, int64_t image, int64_t y, Quad* columns, const Take& take) {
  const Int8DepthwiseArgs& a = b.a;
  const int64_t top = y * a.stride_y - a.pad_y;
  const int quads = (a.taps_y + 3) / 4;
  // As many outputs as their columns fit.
  const int reach = (a.taps_x - 1) * a.dilation_x + 1;
  for (int64_t first = 0; first < a.out_width; first += kColumns) {
    const int count = int(a.out_width - first < kColumns ? a.out_width - first : kColumns);
    const int width = (count - 1) * a.stride_x + reach;
    for (int q = 0; q < quads; ++q) {
      const int8_t* x[4];
      for (int i = 0; i < 4; ++i) {
        const int ky = 4 * q + i;
        x[i] =
            (ky < a.taps_y ? b.row(image, top + ky * a.dilation_y) : a.zeros + b.first) + first * a.stride_x * a.pixel;
      }
      for (int c = 0; c < width; ++c) {
        columns[c * quads + q] = interleave(b.load<false>(x[0] + c * a.pixel), b.load<false>(x[1] + c * a.pixel),
                                            b.load<false>(x[2] + c * a.pixel), b.load<false>(x[3] + c * a.pixel));
      }
    }
    const auto outputs = [&]<int N>(int at) __attribute__((always_inline)) {
      Quad acc[N];
      LAMINA_UNROLL
      for (int i = 0; i < N; ++i) acc[i] = b.negative;
      const Quad* weight = w;
      for (int kx = 0; kx < a.taps_x; ++kx) {
        for (int q = 0; q < quads; ++q, ++weight) {
          const Quad* x = columns + (at * a.stride_x + kx * a.dilation_x) * quads + q;
          LAMINA_UNROLL
          for (int j = 0; j < 4; ++j) {
            const __m512i wj = weight->r[j];
            LAMINA_UNROLL
            for (int i = 0; i < N; ++i) dot4(acc[i].r[j], x[i * a.stride_x * quads].r[j], wj);
          }
        }
      }
      take(0, first + at, acc);
    };
    int at = 0;
    for (; at + 4 <= count; at += 4) outputs.template operator()<4>(at);
    for (; at < count; ++at) outputs.template operator()<1>(at);
  }
}

// Calls rows(image, y, how many) over the rows of a call, two at a time where `pairs`.
template <class Rows>
LAMINA_INLINE void for_each_row(const Int8DepthwiseArgs& a, bool pairs, const Rows& rows) {
  for (int64_t r = a.row_begin; r < a.row_end;) {
    const int64_t image = r / a.out_height, y = r % a.out_height;
    const int count = pairs && r + 1 < a.row_end && y + 1 < a.out_height ? 2 : 1;
    rows(image, y, count);
    r += count;
  }
}

// A block whose sums go to take(image, y)(row of two, first column, sums of some columns).
template <class Take>
void block_rows(const Block& b, Quad* scratch, const Take& take) {
  const Int8DepthwiseArgs& a = b.a;
  if (a.taps_y == 3 && a.taps_x == 3 && a.stride_y == 1 && a.stride_x == 1 && a.dilation_y == 1 && a.dilation_x == 1) {
    Quad w[2][3];
    for (int h = 0; h < 2; ++h) {
      for (int kx = 0; kx < 3; ++kx) {
        w[h][kx] = interleave(b.weights(-h, kx), b.weights(1 - h, kx), b.weights(2 - h, kx), b.weights(3 - h, kx));
      }
    }
    for_each_row(a, true, [&](int64_t image, int64_t y, int count) {
      const auto taken = take(image, y);
      if (b.channels < kBlock) {
        if (count == 2) return rows_of_3x3<false, 2>(b, w, image, y, taken);
        return rows_of_3x3<false, 1>(b, w, image, y, taken);
      }
      if (count == 2) return rows_of_3x3<true, 2>(b, w, image, y, taken);
      rows_of_3x3<true, 1>(b, w, image, y, taken);
    });
    return;
  }
  const int quads = (a.taps_y + 3) / 4;
  Quad* w = scratch;
  for (int kx = 0; kx < a.taps_x; ++kx) {
    for (int q = 0; q < quads; ++q) {
      w[kx * quads + q] = interleave(b.weights(4 * q, kx), b.weights(4 * q + 1, kx), b.weights(4 * q + 2, kx),
                                     b.weights(4 * q + 3, kx));
    }
  }
  for_each_row(a, false, [&](int64_t image, int64_t y, int) {
    row_of_any(b, w, image, y, scratch + a.taps_x * quads, take(image, y));
  });
}

void int8_depthwise(const Int8DepthwiseArgs& a) {
  const ConvEpilogue& end = a.end;
  for (int64_t first = 0; first < a.channels; first += kBlock) {
    const Block b(a, first);
    Quad* scratch = static_cast<Quad*>(a.scratch);
    if (end.folded && !end.residual.data) {
      int8_t* out = static_cast<int8_t*>(end.out.data) + first;
      block_rows(b, scratch, [&](int64_t image, int64_t y) {
        const Folded folded(b, end.scale + image * end.image_scale);
        int8_t* row = out + image * end.out.image + y * end.out.row;
        return [=, &b]<int N>(int h, int64_t ox, const Quad(&sums)[N]) __attribute__((always_inline)) {
          __m512i codes[N];
          folded.codes(sums, codes);
          int8_t* to = row + h * end.out.row + ox * end.out.column;
          LAMINA_UNROLL
          for (int i = 0; i < N; ++i) store_block(b, to + i * end.out.column, codes[i]);
        };
      });
    } else {
      block_rows(b, scratch, [&](int64_t image, int64_t y) {
        return [=, &b]<int N>(int h, int64_t ox, const Quad(&sums)[N]) {
          for (int i = 0; i < N; ++i) finish_pixel(b, image, y + h, ox + i, sums[i]);
        };
      });
    }
  }
}

REGISTER_KERNEL(int8_depthwise_table, int8_depthwise);

}  // namespace
}  // namespace lamina::LAMINA_ISA
