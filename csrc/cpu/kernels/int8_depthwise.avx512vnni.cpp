// int8_depthwise on vpdpbusd, 64 channels at a time, or 32 where no more are left.
//
// The instruction adds up four neighbouring bytes; here they are four rows of one column and channel. Unpacking bytes
// and then words interleaves four rows of a register into four, each with 4 channels of every 128-bit lane;
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

constexpr int kColumns = kDepthwiseColumns;

// The instructions on registers of so many bytes.
template <int Bytes>
struct Reg;

#define LAMINA_DEPTHWISE_REG(bytes, bits, suffix)                                                               \
  template <>                                                                                                   \
  struct Reg<bytes> {                                                                                           \
    using I = __m##bits##i;                                                                                     \
    using F = __m##bits;                                                                                        \
    using Mask = __mmask##bytes;                                                                                \
    static LAMINA_INLINE I load(const void* p) { return _mm##bits##_loadu_##suffix(static_cast<const I*>(p)); } \
    static LAMINA_INLINE I load_n(Mask m, const void* p) { return _mm##bits##_maskz_loadu_epi8(m, p); }         \
    static LAMINA_INLINE void store(void* p, I x) { _mm##bits##_storeu_##suffix(static_cast<I*>(p), x); }       \
    static LAMINA_INLINE void store_n(void* p, Mask m, I x) { _mm##bits##_mask_storeu_epi8(p, m, x); }          \
    static LAMINA_INLINE I zero() { return _mm##bits##_setzero_##suffix(); }                                    \
    static LAMINA_INLINE I bytes_of(int x) { return _mm##bits##_set1_epi8(char(x)); }                           \
    static LAMINA_INLINE I flip(I x) { return _mm##bits##_xor_##suffix(x, bytes_of(0x80)); }                    \
    static LAMINA_INLINE I minus(I x) { return _mm##bits##_sub_epi32(zero(), x); }                              \
    static LAMINA_INLINE I low8(I a, I b) { return _mm##bits##_unpacklo_epi8(a, b); }                           \
    static LAMINA_INLINE I high8(I a, I b) { return _mm##bits##_unpackhi_epi8(a, b); }                          \
    static LAMINA_INLINE I low16(I a, I b) { return _mm##bits##_unpacklo_epi16(a, b); }                         \
    static LAMINA_INLINE I high16(I a, I b) { return _mm##bits##_unpackhi_epi16(a, b); }                        \
    static LAMINA_INLINE I linear(I sum, I scale, I bias) {                                                     \
      const F y = _mm##bits##_mul_ps(_mm##bits##_cvtepi32_ps(sum), _mm##bits##_castsi##bits##_ps(scale));       \
      return _mm##bits##_cvtps_epi32(_mm##bits##_add_ps(y, _mm##bits##_castsi##bits##_ps(bias)));               \
    }                                                                                                           \
    static LAMINA_INLINE I pack(I a, I b, I c, I d) {                                                           \
      return _mm##bits##_packs_epi16(_mm##bits##_packs_epi32(a, b), _mm##bits##_packs_epi32(c, d));             \
    }                                                                                                           \
    static LAMINA_INLINE I clamp(I x, I low, I high) {                                                          \
      return _mm##bits##_min_epi8(_mm##bits##_max_epi8(x, low), high);                                          \
    }                                                                                                           \
  }

LAMINA_DEPTHWISE_REG(64, 512, si512);
LAMINA_DEPTHWISE_REG(32, 256, si256);
#undef LAMINA_DEPTHWISE_REG

// What four registers hold of a column: four channels of every lane each.
template <int Bytes>
struct Quad {
  typename Reg<Bytes>::I r[4];
};

// acc += a (unsigned) . b (signed); inline assembly for the reason in int8_conv.
template <class I>
LAMINA_INLINE void dot4(I& acc, I a, I b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "vm"(b));
}

template <int Bytes>
LAMINA_INLINE Quad<Bytes> interleave(typename Reg<Bytes>::I a, typename Reg<Bytes>::I b, typename Reg<Bytes>::I c,
                                     typename Reg<Bytes>::I d) {
  using R = Reg<Bytes>;
  const auto ab = R::low8(a, b), ab_high = R::high8(a, b), cd = R::low8(c, d), cd_high = R::high8(c, d);
  return {{R::low16(ab, cd), R::high16(ab, cd), R::low16(ab_high, cd_high), R::high16(ab_high, cd_high)}};
}

// int32 of all channels in order -> the order of interleave: four channels of lane 0, of lane 1, ... And back.
template <int Bytes>
Quad<Bytes> load_turned(const void* p) {
  const int32_t* from = static_cast<const int32_t*>(p);
  alignas(64) int32_t to[Bytes];
  for (int j = 0; j < 4; ++j) {
    for (int c = 0; c < Bytes / 4; ++c) to[j * Bytes / 4 + c] = from[c / 4 * 16 + 4 * j + c % 4];
  }
  Quad<Bytes> q;
  for (int j = 0; j < 4; ++j) q.r[j] = Reg<Bytes>::load(to + j * Bytes / 4);
  return q;
}

template <int Bytes>
void store_turned(int32_t* to, const Quad<Bytes>& q) {
  alignas(64) int32_t from[Bytes];
  for (int j = 0; j < 4; ++j) Reg<Bytes>::store(from + j * Bytes / 4, q.r[j]);
  for (int j = 0; j < 4; ++j) {
    for (int c = 0; c < Bytes / 4; ++c) to[c / 4 * 16 + 4 * j + c % 4] = from[j * Bytes / 4 + c];
  }
}

// One block of up to `Bytes` channels of a call.
template <int Bytes>
struct Block {
  using R = Reg<Bytes>;
  using I = typename R::I;
  const Int8DepthwiseArgs& a;
  int64_t first;
  int channels;
  typename R::Mask mask;
  Quad<Bytes> negative;  // -128 sum w

  Block(const Int8DepthwiseArgs& a, int64_t first)
      : a(a), first(first), channels(int(a.channels - first < Bytes ? a.channels - first : Bytes)) {
    mask = typename R::Mask(~uint64_t{0} >> (64 - channels));
    negative = load_turned<Bytes>(a.compensation + first);
    for (int j = 0; j < 4; ++j) negative.r[j] = R::minus(negative.r[j]);
  }

  // Pixel 0 of four rows and the bytes between pixels, none for a row outside the image: all of its pixels are one.
  struct Rows {
    const int8_t* pixel[4];
    int64_t step[4];
  };
  LAMINA_INLINE void set_row(Rows& rows, int i, int64_t image, int64_t y) const {
    const bool inside = y >= 0 && y < a.height;
    rows.pixel[i] = inside ? a.x + image * a.image + y * a.row + first : a.zeros + first;
    rows.step[i] = inside ? a.pixel : 0;
  }
  template <bool Full>
  LAMINA_INLINE Quad<Bytes> column(const Rows& rows, int64_t x) const {
    return interleave<Bytes>(load<Full>(rows.pixel[0] + x * rows.step[0]), load<Full>(rows.pixel[1] + x * rows.step[1]),
                             load<Full>(rows.pixel[2] + x * rows.step[2]),
                             load<Full>(rows.pixel[3] + x * rows.step[3]));
  }
  static LAMINA_INLINE Quad<Bytes> column_outside() {
    const I zero = R::bytes_of(0x80);
    return {{zero, zero, zero, zero}};
  }
  // Codes with an offset of 128.
  template <bool Full>
  LAMINA_INLINE I load(const int8_t* p) const {
    return R::flip(Full ? R::load(p) : R::load_n(mask, p));
  }
  LAMINA_INLINE I weights(int ky, int kx) const {
    if (ky < 0 || ky >= a.taps_y) return R::zero();
    return R::load(a.weights + (ky * a.taps_x + kx) * a.ld_weights + first);
  }
  LAMINA_INLINE void store(int8_t* p, I codes) const {
    if (channels == Bytes) {
      R::store(p, codes);
    } else {
      R::store_n(p, mask, codes);
    }
  }
};

// What turns the sums of a pixel into codes, where the epilogue is folded and there is no residual.
template <int Bytes>
struct Folded {
  using R = Reg<Bytes>;
  Quad<Bytes> scale, bias;
  typename R::I lowest, highest;

  LAMINA_INLINE Folded(const Block<Bytes>& b, const float* scales)
      : scale(load_turned<Bytes>(scales + b.first)),
        bias(load_turned<Bytes>(b.a.end.bias + b.first)),
        lowest(R::bytes_of(int(b.a.end.lowest))),
        highest(R::bytes_of(int(b.a.end.highest))) {}

  // The codes of N pixels.
  template <int N>
  LAMINA_INLINE void codes(const Quad<Bytes> (&sums)[N], typename R::I (&to)[N]) const {
    typename R::I i[N][4];
    LAMINA_UNROLL
    for (int j = 0; j < 4; ++j) {
      LAMINA_UNROLL
      for (int n = 0; n < N; ++n) i[n][j] = R::linear(sums[n].r[j], scale.r[j], bias.r[j]);
    }
    LAMINA_UNROLL
    for (int n = 0; n < N; ++n) to[n] = R::clamp(R::pack(i[n][0], i[n][1], i[n][2], i[n][3]), lowest, highest);
  }
};

// The sums of a pixel through the epilogue that all kernels share.
template <int Bytes>
__attribute__((noinline)) void finish_pixel(const Block<Bytes>& b, int64_t image, int64_t y, int64_t ox,
                                            const Quad<Bytes>& turned) {
  const ConvEpilogue& end = b.a.end;
  ConvTile tile;
  tile.count = 1;
  tile.scale = end.scale + image * end.image_scale;
  tile.out[0] = image * end.out.image + y * end.out.row + ox * end.out.column;
  tile.residual[0] = image * end.residual.image + y * end.residual.row + ox * end.residual.column;
  alignas(64) int32_t sums[Bytes];
  store_turned(sums, turned);
  for (int c = 0; c < b.channels; c += kConvPanel) {
    const int n = b.channels - c < kConvPanel ? b.channels - c : kConvPanel;
    finish_conv_tile(end, tile, sums + c, b.first + c, n);
  }
}

// Output rows y and, of Rows 2, y + 1 of a 3 x 3 kernel with stride 1.
template <bool Full, int Rows, int Bytes, class Take>
LAMINA_INLINE void rows_of_3x3(const Block<Bytes>& b, const Quad<Bytes> (&w)[2][3], int64_t image, int64_t y,
                               const Take& take) {
  const Int8DepthwiseArgs& a = b.a;
  const int64_t top = y - a.pad_y;
  typename Block<Bytes>::Rows rows;
  for (int i = 0; i < 4; ++i) b.set_row(rows, i, image, top + i);
  int64_t at = -a.pad_x;
  const auto column = [&]() __attribute__((always_inline)) {
    const int64_t x = at++;
    return x < 0 || x >= a.width ? b.column_outside() : b.template column<Full>(rows, x);
  };
  // N neighbouring outputs, which share the loads of weights, scales and biases.
  const auto outputs = [&]<int N>(int64_t ox, const Quad<Bytes>(&c)[N + 2]) __attribute__((always_inline)) {
    LAMINA_UNROLL
    for (int h = 0; h < Rows; ++h) {
      Quad<Bytes> acc[N];
      LAMINA_UNROLL
      for (int j = 0; j < 4; ++j) {
        LAMINA_UNROLL
        for (int i = 0; i < N; ++i) acc[i].r[j] = b.negative.r[j];
        LAMINA_UNROLL
        for (int kx = 0; kx < 3; ++kx) {
          const auto weight = w[h][kx].r[j];
          LAMINA_UNROLL
          for (int i = 0; i < N; ++i) dot4(acc[i].r[j], c[i + kx].r[j], weight);
        }
      }
      take(h, ox, acc);
    }
  };
  Quad<Bytes> c[4] = {column(), column(), {}, {}};
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
template <int Bytes, class Take>
void row_of_any(const Block<Bytes>& b, const Quad<Bytes>* w, int64_t image, int64_t y, Quad<Bytes>* columns,
                const Take& take) {
  const Int8DepthwiseArgs& a = b.a;
  const int64_t top = y * a.stride_y - a.pad_y;
  const int quads = (a.taps_y + 3) / 4;
  // As many outputs as their columns fit.
  const int reach = (a.taps_x - 1) * a.dilation_x + 1;
  for (int64_t first = 0; first < a.out_width; first += kColumns) {
    const int count = int(a.out_width - first < kColumns ? a.out_width - first : kColumns);
    const int width = (count - 1) * a.stride_x + reach;
    for (int q = 0; q < quads; ++q) {
      typename Block<Bytes>::Rows rows;
      for (int i = 0; i < 4; ++i) {
        const int ky = 4 * q + i;
        b.set_row(rows, i, image, ky < a.taps_y ? top + ky * a.dilation_y : -1);
      }
      Quad<Bytes>* to = columns + q;
      const int64_t start = first * a.stride_x - a.pad_x;
      const auto fill = [&]<bool Full>() __attribute__((always_inline)) {
        for (int64_t x = start; x < start + width; ++x, to += quads) {
          *to = x < 0 || x >= a.width ? b.column_outside() : b.template column<Full>(rows, x);
        }
      };
      if (b.channels == Bytes) {
        fill.template operator()<true>();
      } else {
        fill.template operator()<false>();
      }
    }
    const auto outputs = [&]<int N>(int at) __attribute__((always_inline)) {
      Quad<Bytes> acc[N];
      LAMINA_UNROLL
      for (int i = 0; i < N; ++i) acc[i] = b.negative;
      const Quad<Bytes>* weight = w;
      for (int kx = 0; kx < a.taps_x; ++kx) {
        for (int q = 0; q < quads; ++q, ++weight) {
          const Quad<Bytes>* x = columns + (at * a.stride_x + kx * a.dilation_x) * quads + q;
          LAMINA_UNROLL
          for (int j = 0; j < 4; ++j) {
            const auto wj = weight->r[j];
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
template <int Bytes, class Take>
void block_rows(const Block<Bytes>& b, Quad<Bytes>* scratch, const Take& take) {
  const Int8DepthwiseArgs& a = b.a;
  if (a.taps_y == 3 && a.taps_x == 3 && a.stride_y == 1 && a.stride_x == 1 && a.dilation_y == 1 && a.dilation_x == 1) {
    Quad<Bytes> w[2][3];
    for (int h = 0; h < 2; ++h) {
      for (int kx = 0; kx < 3; ++kx) {
        w[h][kx] =
            interleave<Bytes>(b.weights(-h, kx), b.weights(1 - h, kx), b.weights(2 - h, kx), b.weights(3 - h, kx));
      }
    }
    for_each_row(a, true, [&](int64_t image, int64_t y, int count) {
      const auto taken = take(image, y);
      if (b.channels < Bytes) {
        if (count == 2) return rows_of_3x3<false, 2>(b, w, image, y, taken);
        return rows_of_3x3<false, 1>(b, w, image, y, taken);
      }
      if (count == 2) return rows_of_3x3<true, 2>(b, w, image, y, taken);
      rows_of_3x3<true, 1>(b, w, image, y, taken);
    });
    return;
  }
  const int quads = (a.taps_y + 3) / 4;
  Quad<Bytes>* w = scratch;
  for (int kx = 0; kx < a.taps_x; ++kx) {
    for (int q = 0; q < quads; ++q) {
      w[kx * quads + q] = interleave<Bytes>(b.weights(4 * q, kx), b.weights(4 * q + 1, kx), b.weights(4 * q + 2, kx),
                                            b.weights(4 * q + 3, kx));
    }
  }
  for_each_row(a, false, [&](int64_t image, int64_t y, int) {
    row_of_any(b, w, image, y, scratch + a.taps_x * quads, take(image, y));
  });
}

template <int Bytes>
void block(const Int8DepthwiseArgs& a, int64_t first) {
  const ConvEpilogue& end = a.end;
  const Block<Bytes> b(a, first);
  Quad<Bytes>* scratch = static_cast<Quad<Bytes>*>(a.scratch);
  if (!end.folded || end.residual.data) {
    return block_rows(b, scratch, [&](int64_t image, int64_t y) {
      return [=, &b]<int N>(int h, int64_t ox, const Quad<Bytes>(&sums)[N]) {
        for (int i = 0; i < N; ++i) finish_pixel(b, image, y + h, ox + i, sums[i]);
      };
    });
  }
  int8_t* out = static_cast<int8_t*>(end.out.data) + first;
  const Folded<Bytes> shared(b, end.scale);
  block_rows(b, scratch, [&](int64_t image, int64_t y) {
    const Folded<Bytes> folded = end.image_scale ? Folded<Bytes>(b, end.scale + image * end.image_scale) : shared;
    int8_t* row = out + image * end.out.image + y * end.out.row;
    return [=, &b]<int N>(int h, int64_t ox, const Quad<Bytes>(&sums)[N]) __attribute__((always_inline)) {
      typename Reg<Bytes>::I codes[N];
      folded.codes(sums, codes);
      int8_t* to = row + h * end.out.row + ox * end.out.column;
      LAMINA_UNROLL
      for (int i = 0; i < N; ++i) b.store(to + i * end.out.column, codes[i]);
    };
  });
}

void int8_depthwise(const Int8DepthwiseArgs& a) {
  for (int64_t first = 0; first < a.channels;) {
    if (a.channels - first > 32) {
      block<64>(a, first);
      first += 64;
    } else {
      block<32>(a, first);
      first += 32;
    }
  }
}

REGISTER_KERNEL(int8_depthwise_table, int8_depthwise);

}  // namespace
}  // namespace lamina::LAMINA_ISA
