// The folded epilogue of int8_conv on AVX-512: 32 sums of two pixels become 64 codes in one register.
#pragma once

#include "cpu/kernels/int8_conv_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

// One pixel's 16 NR sums as floats, scaled, with bias and residual.
template <int NR>
struct Scales {
  __m512 scale[NR], bias[NR];
};

template <int NR>
LAMINA_INLINE void linear(const __m512i (&acc)[NR], const Scales<NR>& s, __m512 (&y)[NR]) {
  LAMINA_UNROLL
  for (int j = 0; j < NR; ++j) {
    // The sum as a fused product with 1, which rounds the same: the adders are busy with conversions.
    y[j] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[j]), s.scale[j]), _mm512_set1_ps(1.0f), s.bias[j]);
  }
}

template <int NR>
LAMINA_INLINE void add_codes(__m512 (&y)[NR], const int8_t* residual, __m512 factor) {
  LAMINA_UNROLL
  for (int j = 0; j < NR; ++j) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(residual + 16 * j));
    const __m512 r = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    y[j] = _mm512_fmadd_ps(_mm512_mul_ps(r, factor), _mm512_set1_ps(1.0f), y[j]);
  }
}

// The codes of MR x 32 sums whose epilogue is folded; 32 channels are there to be written. sums(i, j): of pixel i,
// channels 16 j and following.
template <int MR, class Sums>
LAMINA_INLINE void store_folded(const ConvEpilogue& end, const ConvTile& tile, const Sums& sums, int64_t first) {
  const Scales<2> s = {{_mm512_loadu_ps(tile.scale + first), _mm512_loadu_ps(tile.scale + first + 16)},
                       {_mm512_loadu_ps(end.bias + first), _mm512_loadu_ps(end.bias + first + 16)}};
  const __m512 factor = _mm512_set1_ps(end.residual_scale);
  const __m512i lowest = _mm512_set1_epi8(char(int(end.lowest))), highest = _mm512_set1_epi8(char(int(end.highest)));
  // packs works in 128-bit lanes: this puts the channels of each pixel together again.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const int8_t* residual = static_cast<const int8_t*>(end.residual.data);
  int8_t* out = static_cast<int8_t*>(end.out.data) + first;
  LAMINA_UNROLL
  for (int i = 0; i < MR; i += 2) {
    __m512i words[2];
    LAMINA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int p = i + h < MR ? i + h : i;
      __m512 y[2];
      linear({sums(p, 0), sums(p, 1)}, s, y);
      if (residual) add_codes(y, residual + tile.residual[p] + first, factor);
      words[h] = _mm512_packs_epi32(_mm512_cvtps_epi32(y[0]), _mm512_cvtps_epi32(y[1]));
    }
    __m512i codes = _mm512_packs_epi16(words[0], words[1]);
    codes = _mm512_min_epi8(_mm512_max_epi8(codes, lowest), highest);
    codes = _mm512_permutexvar_epi32(order, codes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + tile.out[i]), _mm512_castsi512_si256(codes));
    if (i + 1 < MR) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + tile.out[i + 1]), _mm512_extracti64x4_epi64(codes, 1));
    }
  }
}

// The codes of MR x 64 sums, whole lines of an output whose pixels begin at one.
template <int MR, class Sums>
LAMINA_INLINE void store_folded_lines(const ConvEpilogue& end, const ConvTile& tile, const Sums& sums, int64_t first) {
  const float* scale = tile.scale + first;
  const float* bias = end.bias + first;
  const Scales<4> s = {
      {_mm512_loadu_ps(scale), _mm512_loadu_ps(scale + 16), _mm512_loadu_ps(scale + 32), _mm512_loadu_ps(scale + 48)},
      {_mm512_loadu_ps(bias), _mm512_loadu_ps(bias + 16), _mm512_loadu_ps(bias + 32), _mm512_loadu_ps(bias + 48)}};
  const __m512 factor = _mm512_set1_ps(end.residual_scale);
  const __m512i lowest = _mm512_set1_epi8(char(int(end.lowest))), highest = _mm512_set1_epi8(char(int(end.highest)));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const int8_t* residual = static_cast<const int8_t*>(end.residual.data);
  int8_t* out = static_cast<int8_t*>(end.out.data) + first;
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    __m512 y[4];
    linear({sums(i, 0), sums(i, 1), sums(i, 2), sums(i, 3)}, s, y);
    if (residual) add_codes(y, residual + tile.residual[i] + first, factor);
    const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(y[0]), _mm512_cvtps_epi32(y[1]));
    const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(y[2]), _mm512_cvtps_epi32(y[3]));
    const __m512i codes = _mm512_min_epi8(_mm512_max_epi8(_mm512_packs_epi16(low, high), lowest), highest);
    _mm512_storeu_si512(out + tile.out[i], _mm512_permutexvar_epi32(order, codes));
  }
}

// Codes of MR x 32 sums with a bfloat16 residual, the shortcut of a residual block: what finish_conv_pixels computes,
// with relu or no activation. Values too large for a conversion are cut before it; NaN and values too small become the
// smallest int32.
template <int MR, class Sums>
LAMINA_INLINE void store_codes_of_sums(const ConvEpilogue& end, const ConvTile& tile, const Sums& sums, int64_t first) {
  const Scales<2> s = {{_mm512_loadu_ps(tile.scale + first), _mm512_loadu_ps(tile.scale + first + 16)},
                       {_mm512_loadu_ps(end.bias + first), _mm512_loadu_ps(end.bias + first + 16)}};
  const __m512 inverse = _mm512_set1_ps(end.out_inverse), limit = _mm512_set1_ps(end.highest);
  const __m512 floor = _mm512_set1_ps(end.activation == Activation::relu ? 0.0f : -__builtin_inff());
  const __m512i lowest = _mm512_set1_epi8(char(int(end.lowest)));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const bf16* residual = static_cast<const bf16*>(end.residual.data) + first;
  int8_t* out = static_cast<int8_t*>(end.out.data) + first;
  LAMINA_UNROLL
  for (int i = 0; i < MR; i += 2) {
    __m512i words[2];
    LAMINA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int p = i + h < MR ? i + h : i;
      __m512 y[2];
      linear({sums(p, 0), sums(p, 1)}, s, y);
      LAMINA_UNROLL
      for (int j = 0; j < 2; ++j) {
        y[j] = _mm512_max_ps(floor, _mm512_add_ps(y[j], load(residual + tile.residual[p] + 16 * j).r));
        y[j] = _mm512_min_ps(limit, _mm512_mul_ps(y[j], inverse));  // NaN, the second, passes both
      }
      words[h] = _mm512_packs_epi32(_mm512_cvtps_epi32(y[0]), _mm512_cvtps_epi32(y[1]));
    }
    __m512i codes = _mm512_max_epi8(_mm512_packs_epi16(words[0], words[1]), lowest);
    codes = _mm512_permutexvar_epi32(order, codes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + tile.out[i]), _mm512_castsi512_si256(codes));
    if (i + 1 < MR) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + tile.out[i + 1]), _mm512_extracti64x4_epi64(codes, 1));
    }
  }
}

// bfloat16 of MR x 32 sums as such, with nothing behind the bias: both halves of a pixel are rounded as 32-bit words,
// and one permutation takes their upper words. A NaN, which rounding may turn into infinity, is put back.
template <int MR, class Sums>
LAMINA_INLINE void store_bf16_of_sums(const ConvEpilogue& end, const ConvTile& tile, const Sums& sums, int64_t first) {
  const Scales<2> s = {{_mm512_loadu_ps(tile.scale + first), _mm512_loadu_ps(tile.scale + first + 16)},
                       {_mm512_loadu_ps(end.bias + first), _mm512_loadu_ps(end.bias + first + 16)}};
  const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff);
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_load_si512(kUpper);
  bf16* out = static_cast<bf16*>(end.out.data) + first;
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    __m512 y[2];
    linear({sums(i, 0), sums(i, 1)}, s, y);
    __m512i bits[2];
    LAMINA_UNROLL
    for (int j = 0; j < 2; ++j) {
      const __m512i b = _mm512_castps_si512(y[j]);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), one);
      bits[j] = _mm512_add_epi32(b, _mm512_add_epi32(odd, half));
    }
    _mm512_storeu_si512(out + tile.out[i], _mm512_permutex2var_epi16(bits[0], upper, bits[1]));
    const __mmask16 nan = _mm512_cmp_ps_mask(y[0], y[1], _CMP_UNORD_Q);
    if (nan) [[unlikely]] {
      for (int j = 0; j < 2; ++j) store(out + tile.out[i] + 16 * j, F32{y[j]});
    }
  }
}

// The same as store_folded for 16 channels of up to 4 pixels of a row: a register of codes.
struct FoldedRow {
  Scales<1> scales;
  __m512 factor;
  __m512i lowest, highest;

  LAMINA_INLINE FoldedRow(const ConvEpilogue& end, const float* scale, int64_t first)
      : scales{{_mm512_loadu_ps(scale + first)}, {_mm512_loadu_ps(end.bias + first)}},
        factor(_mm512_set1_ps(end.residual_scale)),
        lowest(_mm512_set1_epi8(char(int(end.lowest)))),
        highest(_mm512_set1_epi8(char(int(end.highest)))) {}

  template <bool Residual>
  LAMINA_INLINE void store(const __m512i (&sums)[4], int8_t* out, int64_t column, const int8_t* residual,
                           int64_t residual_column, int count) const {
    __m512i i32[4];
    LAMINA_UNROLL
    for (int i = 0; i < 4; ++i) {
      __m512 y[1];
      linear({sums[i]}, scales, y);
      if (Residual) add_codes(y, residual + (i < count ? i : 0) * residual_column, factor);
      i32[i] = _mm512_cvtps_epi32(y[0]);
    }
    __m512i codes = _mm512_packs_epi16(_mm512_packs_epi32(i32[0], i32[1]), _mm512_packs_epi32(i32[2], i32[3]));
    codes = _mm512_min_epi8(_mm512_max_epi8(codes, lowest), highest);
    codes = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), codes);
    const auto put = [&](int i, __m128i x) __attribute__((always_inline)) {
      if (i < count) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * column), x);
    };
    put(0, _mm512_castsi512_si128(codes));
    put(1, _mm512_extracti32x4_epi32(codes, 1));
    put(2, _mm512_extracti32x4_epi32(codes, 2));
    put(3, _mm512_extracti32x4_epi32(codes, 3));
  }
};

}  // namespace
}  // namespace lamina::LAMINA_ISA
