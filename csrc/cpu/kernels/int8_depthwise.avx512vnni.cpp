// int8_depthwise on vpdpbusd, a register of 64 channels at a time.
//
// The instruction adds up four neighbouring bytes; here they are four rows of one column and channel. Unpacking bytes
// and then words interleaves four rows of a register into four, each with 4 channels of every 128-bit lane; the packs
// of the epilogue are the exact inverse, so the codes come out in order without another shuffle. What is per channel
// (weights, scales, bias) is brought into the order of the registers once per call.
//
// Interleaved columns serve all output rows whose taps lie in the same four (or eight) rows: two of a 3 x 3 kernel,
// with weights w0 w1 w2 0 and 0 w0 w1 w2, four of a 5 x 5 one. A load costs as much as a product, so few are left:
//   3 x 3: the weights of half of the channels stay in registers, and three columns of them slide along a row; the
//   other half of each column goes to L1 for a second pass.
//   All else: columns go to L1, and neighbouring outputs share the loads of columns, weights, scales and biases.
//
// Where 32 or 16 channels are left, the parts of a register are strips of rows below each other.
#include "cpu/kernels/int8_depthwise.h"

#include "cpu/kernels/int8_conv_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

// What four registers hold of a column: four channels of every lane each.
struct Quad {
  __m512i r[4];
};

// acc += a (unsigned) . b (signed); inline assembly for the reason in int8_conv.
LAMINA_INLINE void dot4(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "vm"(b));
}

LAMINA_INLINE Quad interleave(const __m512i (&rows)[4]) {
  const __m512i ab = _mm512_unpacklo_epi8(rows[0], rows[1]), ab_high = _mm512_unpackhi_epi8(rows[0], rows[1]);
  const __m512i cd = _mm512_unpacklo_epi8(rows[2], rows[3]), cd_high = _mm512_unpackhi_epi8(rows[2], rows[3]);
  return {{_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd), _mm512_unpacklo_epi16(ab_high, cd_high),
           _mm512_unpackhi_epi16(ab_high, cd_high)}};
}

// Lane i of register j -> lane j of register i.
LAMINA_INLINE Quad turn_lanes(const __m512i (&r)[4]) {
  const __m512i ab = _mm512_shuffle_i32x4(r[0], r[1], 0x44), ab_high = _mm512_shuffle_i32x4(r[0], r[1], 0xee);
  const __m512i cd = _mm512_shuffle_i32x4(r[2], r[3], 0x44), cd_high = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
  return {{_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd),
           _mm512_shuffle_i32x4(ab_high, cd_high, 0x88), _mm512_shuffle_i32x4(ab_high, cd_high, 0xdd)}};
}

// Output rows [y, y + count) of an image: what a part of a register computes.
struct Place {
  int64_t image, y;
  int count;
};

// A block of 64 / Parts channels of a call, or, `Masked`, of fewer than 16.
template <int Parts, bool Masked>
struct Block {
  const Int8DepthwiseArgs& a;
  const int64_t first;
  const int channels;
  Quad negative;  // -128 sum w

  Block(const Int8DepthwiseArgs& a, int64_t first)
      : a(a), first(first), channels(Masked ? int(a.channels - first) : 64 / Parts) {
    const int32_t* compensation[Parts];
    for (int p = 0; p < Parts; ++p) compensation[p] = a.compensation + first;
    negative = turned(compensation);
    for (int j = 0; j < 4; ++j) negative.r[j] = _mm512_sub_epi32(_mm512_setzero_si512(), negative.r[j]);
  }

  LAMINA_INLINE __m128i load_lane(const int8_t* p) const {
    if (Masked) return _mm_maskz_loadu_epi8(__mmask16((1u << channels) - 1), p);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  // The codes of all parts.
  LAMINA_INLINE __m512i load(const int8_t* const (&p)[Parts]) const {
    if constexpr (Parts == 1) {
      return _mm512_loadu_si512(p[0]);
    } else if constexpr (Parts == 2) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p[0]));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p[1]));
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    } else {
      const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load_lane(p[0])), load_lane(p[1]), 1);
      const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(load_lane(p[2])), load_lane(p[3]), 1);
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
  }
  LAMINA_INLINE void store(int8_t* to, __m512i codes, int part) const {
    if constexpr (Parts == 1) {
      _mm512_storeu_si512(to, codes);
    } else if constexpr (Parts == 2) {
      const __m256i half = part == 0 ? _mm512_castsi512_si256(codes) : _mm512_extracti64x4_epi64(codes, 1);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
    } else {
      const __m128i lane = part == 0   ? _mm512_castsi512_si128(codes)
                           : part == 1 ? _mm512_extracti32x4_epi32(codes, 1)
                           : part == 2 ? _mm512_extracti32x4_epi32(codes, 2)
                                       : _mm512_extracti32x4_epi32(codes, 3);
      if (Masked) {
        _mm_mask_storeu_epi8(to, __mmask16((1u << channels) - 1), lane);
      } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), lane);
      }
    }
  }

  // 32-bit words of the channels, for part p from p[p] on, in the order of interleave.
  static Quad turned(const void* const (&p)[Parts]) {
    __m512i r[4];
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_loadu_si512(static_cast<const char*>(p[i * Parts / 4]) + i % (4 / Parts) * 64);
    }
    return turn_lanes(r);
  }
  template <class T>
  static Quad turned(const T* const (&p)[Parts]) {
    const void* any[Parts];
    for (int i = 0; i < Parts; ++i) any[i] = p[i];
    return turned(any);
  }

  // Of the taps ky and the three below it in column kx.
  Quad weights(int ky, int kx) const {
    __m512i rows[4];
    for (int i = 0; i < 4; ++i) {
      const bool is = ky + i >= 0 && ky + i < a.taps_y;
      const int8_t* from[Parts];
      for (int p = 0; p < Parts; ++p) from[p] = a.weights + (is ? (ky + i) * a.taps_x + kx : 0) * a.ld_weights + first;
      rows[i] = is ? load(from) : _mm512_setzero_si512();
    }
    return interleave(rows);
  }

  int8_t* out(const Place& place, int h, int64_t ox) const {
    return static_cast<int8_t*>(a.end.out.data) + place.image * a.end.out.image + (place.y + h) * a.end.out.row +
           ox * a.end.out.column + first;
  }
};

// Four rows of the input of every part, under taps ky and following.
template <int Parts, bool Masked>
struct InRows {
  const Block<Parts, Masked>& b;
  const int8_t* pixel[4][Parts];
  int64_t step[4][Parts];  // bytes between pixels: none for a row outside the image, all of its pixels are one

  LAMINA_INLINE InRows(const Block<Parts, Masked>& b, const Place (&places)[Parts], int ky) : b(b) {
    const Int8DepthwiseArgs& a = b.a;
    for (int p = 0; p < Parts; ++p) {
      const Place& place = places[p];
      // What lies below the last tap meets weights of zero: the row of that tap will do.
      const int last = a.taps_y - 1 + (place.count - 1) * a.stride_y;  // dilation is 1 where count is more than 1
      for (int i = 0; i < 4; ++i) {
        const int64_t tap = ky + i < last ? ky + i : last;
        const int64_t y = place.y * a.stride_y - a.pad_y + tap * a.dilation_y;
        const bool inside = place.count > 0 && y >= 0 && y < a.height;
        pixel[i][p] = inside ? a.x + place.image * a.image + y * a.row + b.first : a.zeros + b.first;
        step[i][p] = inside ? a.pixel : 0;
      }
    }
  }
  // Codes with an offset of 128.
  LAMINA_INLINE Quad column(int64_t x) const {
    __m512i rows[4];
    LAMINA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int8_t* from[Parts];
      LAMINA_UNROLL
      for (int p = 0; p < Parts; ++p) from[p] = pixel[i][p] + x * step[i][p];
      rows[i] = _mm512_xor_si512(b.load(from), _mm512_set1_epi8(char(0x80)));
    }
    return interleave(rows);
  }
  static LAMINA_INLINE Quad column_outside() {
    const __m512i zero = _mm512_set1_epi8(char(0x80));
    return {{zero, zero, zero, zero}};
  }
  // Columns [start, start + width) -> every `stride`-th of `to`.
  void columns(int64_t start, int width, Quad* to, int stride) const {
    const int64_t end = start + width, inside = end < b.a.width ? end : b.a.width;
    int64_t x = start;
    for (; x < 0 && x < end; ++x, to += stride) *to = column_outside();
    for (; x < inside; ++x, to += stride) *to = column(x);
    for (; x < end; ++x, to += stride) *to = column_outside();
  }
};

// What turns sums into codes, where the epilogue is folded and there is no residual.
template <int Parts>
struct Folded {
  Quad scale, bias;
  __m512i lowest, highest;
  bool relu;

  template <bool Masked>
  Folded(const Block<Parts, Masked>& b, const Place (&places)[Parts]) {
    const ConvEpilogue& end = b.a.end;
    const float *scales[Parts], *biases[Parts];
    for (int p = 0; p < Parts; ++p) {
      scales[p] = end.scale + places[p].image * end.image_scale + b.first;
      biases[p] = end.bias + b.first;
    }
    scale = b.turned(scales);
    bias = b.turned(biases);
    relu = end.lowest == 0;
    lowest = _mm512_set1_epi8(char(int(end.lowest)));
    highest = _mm512_set1_epi8(char(int(end.highest)));
  }
  LAMINA_INLINE __m512i linear(__m512i sum, int j) const {
    const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_castsi512_ps(scale.r[j]));
    return _mm512_cvtps_epi32(_mm512_add_ps(y, _mm512_castsi512_ps(bias.r[j])));
  }
  // Words of j = 0, 1 and of j = 2, 3. The saturation is the bound that is not computed: without relu `highest` is 127.
  LAMINA_INLINE __m512i codes(__m512i low, __m512i high) const {
    return relu ? _mm512_min_epu8(_mm512_packus_epi16(low, high), highest)
                : _mm512_max_epi8(_mm512_packs_epi16(low, high), lowest);
  }
};

// Two channels of four: half of a Quad.
struct Half {
  __m512i r[2];
};

// Half of the sums of a 3 x 3 kernel's outputs, those of registers First and First + 1.
template <int First, int Rows, int Parts>
struct HalfOf3x3 {
  __m512i w[Rows][3][2], negative[2];
  const Folded<Parts>& folded;

  LAMINA_INLINE HalfOf3x3(const Quad* weights, const Quad& all_negative, const Folded<Parts>& folded) : folded(folded) {
    LAMINA_UNROLL
    for (int j = 0; j < 2; ++j) {
      negative[j] = all_negative.r[First + j];
      LAMINA_UNROLL
      for (int h = 0; h < Rows; ++h) {
        LAMINA_UNROLL
        for (int kx = 0; kx < 3; ++kx) w[h][kx][j] = weights[h * 3 + kx].r[First + j];
      }
    }
  }
  // The words of row h under three columns.
  LAMINA_INLINE __m512i words(int h, const Half& c0, const Half& c1, const Half& c2) const {
    __m512i i32[2];
    LAMINA_UNROLL
    for (int j = 0; j < 2; ++j) {
      __m512i acc = negative[j];
      dot4(acc, c0.r[j], w[h][0][j]);
      dot4(acc, c1.r[j], w[h][1][j]);
      dot4(acc, c2.r[j], w[h][2][j]);
      i32[j] = folded.linear(acc, First + j);
    }
    return _mm512_packs_epi32(i32[0], i32[1]);
  }
};

// `count` outputs from ox on in Rows rows of each part.
template <int StrideX, int Rows, int Parts, bool Masked>
__attribute__((noinline)) void codes_of_3x3(const Block<Parts, Masked>& b, const Place (&places)[Parts],
                                            const Folded<Parts>& folded, const Quad* weights, int64_t ox, int count,
                                            Quad* scratch) {
  const Int8DepthwiseArgs& a = b.a;
  Half* const upper = reinterpret_cast<Half*>(scratch);                                        // [column]
  __m512i* const lower_words = reinterpret_cast<__m512i*>(upper + (count - 1) * StrideX + 3);  // [output][Rows]
  {
    const InRows<Parts, Masked> rows(b, places, 0);
    const HalfOf3x3<0, Rows, Parts> half(weights, b.negative, folded);
    int64_t x = ox * StrideX - a.pad_x;
    Half* put = upper;
    const auto take = [&](const Quad& q) __attribute__((always_inline)) {
      ++x;
      *put++ = {{q.r[2], q.r[3]}};
      return Half{{q.r[0], q.r[1]}};
    };
    const auto inside = [&]() __attribute__((always_inline)) { return take(rows.column(x)); };
    const auto any = [&]() __attribute__((always_inline)) {
      return take(x >= 0 && x < a.width ? rows.column(x) : rows.column_outside());
    };
    Half c0 = any(), c1 = c0;
    if (StrideX == 1) c1 = any();
    __m512i* to = lower_words;
    const auto output = [&](const auto& column) __attribute__((always_inline)) {
      if (StrideX == 2) c1 = column();
      const Half c2 = column();
      LAMINA_UNROLL
      for (int h = 0; h < Rows; ++h) *to++ = half.words(h, c0, c1, c2);
      c0 = StrideX == 2 ? c2 : c1;
      c1 = c2;
    };
    // Outputs whose columns end inside the image.
    const int64_t room = a.width + a.pad_x;
    const int64_t whole = (room < 3 ? 0 : (room - 3) / StrideX + 1) - ox;
    for (int i = 0; i < count;) {
      if (x < 0 || i >= whole) {
        output(any);
        ++i;
        continue;
      }
      for (const int64_t last = whole < count ? whole : count; i < last; ++i) output(inside);
    }
  }
  const HalfOf3x3<2, Rows, Parts> half(weights, b.negative, folded);
  int8_t* to[Rows][Parts];
  for (int h = 0; h < Rows; ++h) {
    for (int p = 0; p < Parts; ++p) to[h][p] = h < places[p].count ? b.out(places[p], h, ox) : nullptr;
  }
  Half c0 = upper[0], c1 = upper[1];
  int64_t at = 0;
  for (int i = 0; i < count; ++i, at += a.end.out.column) {
    if (StrideX == 2) c1 = upper[2 * i + 1];
    const Half c2 = upper[i * StrideX + 2];
    LAMINA_UNROLL
    for (int h = 0; h < Rows; ++h) {
      const __m512i codes = folded.codes(lower_words[i * Rows + h], half.words(h, c0, c1, c2));
      LAMINA_UNROLL
      for (int p = 0; p < Parts; ++p) {
        if (Parts == 1 || to[h][p]) b.store(to[h][p] + at, codes, p);
      }
    }
    c0 = StrideX == 2 ? c2 : c1;
    c1 = c2;
  }
}

// The sums of N neighbouring outputs: done(j, sums of register j) for each j.
template <int TapsX, int Quads, int StrideX, int N, class Done>
LAMINA_INLINE void sums_of(const Quad* columns, const Quad* w, const Quad& negative, const Done& done) {
  LAMINA_UNROLL
  for (int j = 0; j < 4; ++j) {
    __m512i acc[N];
    LAMINA_UNROLL
    for (int i = 0; i < N; ++i) acc[i] = negative.r[j];
    LAMINA_UNROLL
    for (int q = 0; q < Quads; ++q) {
      __m512i weight[TapsX];
      LAMINA_UNROLL
      for (int kx = 0; kx < TapsX; ++kx) weight[kx] = w[kx * Quads + q].r[j];
      LAMINA_UNROLL
      for (int c = 0; c < (N - 1) * StrideX + TapsX; ++c) {
        const __m512i x = columns[c * Quads + q].r[j];
        LAMINA_UNROLL
        for (int i = 0; i < N; ++i) {
          if (c >= i * StrideX && c < i * StrideX + TapsX) dot4(acc[i], x, weight[c - i * StrideX]);
        }
      }
    }
    done(j, acc);
  }
}

// The same of any kernel.
template <int N, class Done>
LAMINA_INLINE void sums_of_any(const Int8DepthwiseArgs& a, int quads, const Quad* columns, const Quad* w,
                               const Quad& negative, const Done& done) {
  LAMINA_UNROLL
  for (int j = 0; j < 4; ++j) {
    __m512i acc[N];
    LAMINA_UNROLL
    for (int i = 0; i < N; ++i) acc[i] = negative.r[j];
    for (int kx = 0; kx < a.taps_x; ++kx) {
      for (int q = 0; q < quads; ++q) {
        const Quad* x = columns + kx * a.dilation_x * quads + q;
        const __m512i weight = w[kx * quads + q].r[j];
        LAMINA_UNROLL
        for (int i = 0; i < N; ++i) dot4(acc[i], x[i * a.stride_x * quads].r[j], weight);
      }
    }
    done(j, acc);
  }
}

// Row h of each part.
template <int Parts, bool Masked>
struct OutRow {
  const Block<Parts, Masked>& b;
  const Place (&places)[Parts];
  int h;

  // N outputs from ox on, whose sums compute(done) gives.
  template <int N, class Compute>
  LAMINA_INLINE void codes(const Folded<Parts>& folded, int64_t ox, const Compute& compute) const {
    __m512i even[N], words[2][N];
    compute([&](int j, const __m512i(&sums)[N]) __attribute__((always_inline)) {
      LAMINA_UNROLL
      for (int i = 0; i < N; ++i) {
        const __m512i i32 = folded.linear(sums[i], j);
        if (j % 2 == 0) {
          even[i] = i32;
        } else {
          words[j / 2][i] = _mm512_packs_epi32(even[i], i32);
        }
      }
    });
    __m512i codes[N];
    LAMINA_UNROLL
    for (int i = 0; i < N; ++i) codes[i] = folded.codes(words[0][i], words[1][i]);
    LAMINA_UNROLL
    for (int p = 0; p < Parts; ++p) {
      if (Parts > 1 && h >= places[p].count) continue;
      int8_t* to = b.out(places[p], h, ox);
      LAMINA_UNROLL
      for (int i = 0; i < N; ++i) b.store(to + i * b.a.end.out.column, codes[i], p);
    }
  }

  // The same through the epilogue that all kernels share.
  template <int N, class Compute>
  LAMINA_INLINE void finish(int64_t ox, const Compute& compute) const {
    Quad turned[N];
    compute([&](int j, const __m512i(&sums)[N]) __attribute__((always_inline)) {
      for (int i = 0; i < N; ++i) turned[i].r[j] = sums[i];
    });
    for (int i = 0; i < N; ++i) finish_pixel(ox + i, turned[i]);
  }
  __attribute__((noinline)) void finish_pixel(int64_t ox, const Quad& turned) const {
    const ConvEpilogue& end = b.a.end;
    const Quad q = turn_lanes(turned.r);
    for (int p = 0; p < Parts; ++p) {
      if (h >= places[p].count) continue;
      const int64_t image = places[p].image, y = places[p].y + h;
      ConvTile tile;
      tile.count = 1;
      tile.scale = end.scale + image * end.image_scale;
      tile.out[0] = image * end.out.image + y * end.out.row + ox * end.out.column;
      tile.residual[0] = image * end.residual.image + y * end.residual.row + ox * end.residual.column;
      alignas(64) int32_t sums[64];
      for (int j = 0; j < 4; ++j) _mm512_store_si512(sums + 16 * j, q.r[j]);
      for (int c = 0; c < b.channels; c += kConvPanel) {
        const int n = b.channels - c < kConvPanel ? b.channels - c : kConvPanel;
        finish_conv_tile(end, tile, sums + p * 64 / Parts + c, b.first + c, n);
      }
    }
  }
};

// Outputs [ox, ox + count) of a row; seven at a time are what registers hold.
template <int TapsX, int Quads, int StrideX, int Parts, bool Masked>
__attribute__((noinline)) void codes_of_row(const OutRow<Parts, Masked>& row, const Folded<Parts>& folded,
                                            const Quad* columns, const Quad* w, int64_t ox, int count) {
  const auto some = [&]<int N>() __attribute__((always_inline)) {
    row.template codes<N>(folded, ox, [&](const auto& done) __attribute__((always_inline)) {
      sums_of<TapsX, Quads, StrideX, N>(columns, w, row.b.negative, done);
    });
    ox += N;
    count -= N;
    columns += N * StrideX * Quads;
  };
  while (count >= 7) some.template operator()<7>();
  if (count >= 4) some.template operator()<4>();
  if (count >= 2) some.template operator()<2>();
  if (count >= 1) some.template operator()<1>();
}

template <int Parts, bool Masked>
__attribute__((noinline)) void any_row(const OutRow<Parts, Masked>& row, const Folded<Parts>* folded, int quads,
                                       const Quad* columns, const Quad* w, int64_t ox, int count) {
  const Int8DepthwiseArgs& a = row.b.a;
  const auto some = [&]<int N>() __attribute__((always_inline)) {
    const auto compute = [&](const auto& done) __attribute__((always_inline)) {
      sums_of_any<N>(a, quads, columns, w, row.b.negative, done);
    };
    if (folded) {
      row.template codes<N>(*folded, ox, compute);
    } else {
      row.template finish<N>(ox, compute);
    }
    ox += N;
    count -= N;
    columns += N * a.stride_x * quads;
  };
  while (count >= 4) some.template operator()<4>();
  while (count >= 1) some.template operator()<1>();
}

// Output rows whose taps lie in the same quads of input rows.
int rows_together(const Int8DepthwiseArgs& a) {
  if (a.dilation_y != 1) return 1;
  const int rows = ((a.taps_y + 3) / 4 * 4 - a.taps_y) / a.stride_y + 1;
  return rows < kDepthwiseRows ? rows : kDepthwiseRows;
}

template <int Parts, bool Masked>
void block(const Int8DepthwiseArgs& a, int64_t first) {
  const Block<Parts, Masked> b(a, first);
  const int together = rows_together(a), quads = (a.taps_y + 3) / 4, taps = a.taps_x * quads;
  Quad* w = static_cast<Quad*>(a.scratch);  // [row of a place][taps_x][quads]
  for (int h = 0; h < together; ++h) {
    for (int kx = 0; kx < a.taps_x; ++kx) {
      for (int q = 0; q < quads; ++q) w[h * taps + kx * quads + q] = b.weights(4 * q - h * a.stride_y, kx);
    }
  }
  Quad* columns = w + together * taps;  // [column][quads]
  const int reach = (a.taps_x - 1) * a.dilation_x + 1;
  const int most = kDepthwiseColumns / quads > 7 ? kDepthwiseColumns / quads : 7;
  const int64_t chunks = (a.out_width + most - 1) / most;
  const bool folds = a.end.folded && !a.end.residual.data;
  const auto is = [&](int taps_x, int taps_y, int stride_x) {
    return folds && a.taps_x == taps_x && a.taps_y == taps_y && a.stride_x == stride_x && a.dilation_x == 1;
  };

  for (int64_t r = a.row_begin; r < a.row_end;) {
    Place places[Parts];
    int rows = 0;
    for (int p = 0; p < Parts; ++p) {
      const int64_t image = r / a.out_height, y = r % a.out_height;
      int64_t count = together;
      if (count > a.out_height - y) count = a.out_height - y;
      if (count > a.row_end - r) count = a.row_end - r;
      places[p] = count > 0 ? Place{image, y, int(count)} : Place{places[0].image, places[0].y, 0};
      if (count > rows) rows = int(count);
      r += places[p].count;
    }
    const Folded<Parts> folded(b, places);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t ox = a.out_width * chunk / chunks;
      const int count = int(a.out_width * (chunk + 1) / chunks - ox);
      if (is(3, 3, 1) || is(3, 3, 2)) {
        const auto codes = a.stride_x == 1
                               ? (rows == 2 ? codes_of_3x3<1, 2, Parts, Masked> : codes_of_3x3<1, 1, Parts, Masked>)
                               : (rows == 2 ? codes_of_3x3<2, 2, Parts, Masked> : codes_of_3x3<2, 1, Parts, Masked>);
        codes(b, places, folded, w, ox, count, columns);
        continue;
      }
      for (int q = 0; q < quads; ++q) {
        const InRows<Parts, Masked> in(b, places, 4 * q);
        in.columns(ox * a.stride_x - a.pad_x, (count - 1) * a.stride_x + reach, columns + q, quads);
      }
      for (int h = 0; h < rows; ++h) {
        const OutRow<Parts, Masked> row{b, places, h};
        const Quad* own = w + h * taps;
        if (is(5, 5, 1)) {
          codes_of_row<5, 2, 1>(row, folded, columns, own, ox, count);
        } else if (is(5, 5, 2)) {
          codes_of_row<5, 2, 2>(row, folded, columns, own, ox, count);
        } else if (is(7, 7, 1)) {
          codes_of_row<7, 2, 1>(row, folded, columns, own, ox, count);
        } else {
          any_row(row, folds ? &folded : nullptr, quads, columns, own, ox, count);
        }
      }
    }
  }
}

void int8_depthwise(const Int8DepthwiseArgs& a) {
  if (a.channels < 16) return block<4, true>(a, 0);
  for (int64_t done = 0; done < a.channels;) {
    // What is left at the end gets a whole part, with channels in it that were done already.
    const int64_t left = a.channels - done;
    const int64_t width = left > 32 && a.channels >= 64 ? 64 : left > 16 && a.channels >= 32 ? 32 : 16;
    const int64_t first = left < width ? a.channels - width : done;
    if (width == 64) {
      block<1, false>(a, first);
    } else if (width == 32) {
      block<2, false>(a, first);
    } else {
      block<4, false>(a, first);
    }
    done = first + width;
  }
}

REGISTER_KERNEL(int8_depthwise_table, int8_depthwise);

}  // namespace
}  // namespace lamina::LAMINA_ISA
