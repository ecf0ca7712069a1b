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

// The same for 16 channels of up to 4 pixels of a row: a register of codes.
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
