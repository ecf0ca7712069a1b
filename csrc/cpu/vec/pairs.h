// Every second lane of two registers.
#pragma once

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

// Lanes 0, 2, 4, ... of a, then those of b.
LAMINA_INLINE F32 even_lanes(F32 a, F32 b) {
#if defined(__AVX512F__)
  const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(a.r, at, b.r)};
#elif defined(__AVX2__)
  const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(a.r, b.r, 0x88));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8))};
#else
  return {__builtin_shufflevector(a.r, b.r, 0, 2, 4, 6)};
#endif
}

// Lanes 1, 3, 5, ... of a, then those of b.
LAMINA_INLINE F32 odd_lanes(F32 a, F32 b) {
#if defined(__AVX512F__)
  const __m512i at = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_permutex2var_ps(a.r, at, b.r)};
#elif defined(__AVX2__)
  const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(a.r, b.r, 0xdd));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8))};
#else
  return {__builtin_shufflevector(a.r, b.r, 1, 3, 5, 7)};
#endif
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
