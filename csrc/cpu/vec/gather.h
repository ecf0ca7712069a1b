// Words of four bytes taken from a table, each for one or several lanes.
#pragma once

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

// Lane i is p[at[i / N]]; N is 1, 2 or 4. Single loads: vpgatherdd takes twice as long (Zen 4).
template <int N>
LAMINA_INLINE I32 gather_words(const int32_t* p, const uint16_t* at) {
#if defined(__AVX512F__)
  if constexpr (N == 1) {
    return {_mm512_setr_epi32(p[at[0]], p[at[1]], p[at[2]], p[at[3]], p[at[4]], p[at[5]], p[at[6]], p[at[7]], p[at[8]],
                              p[at[9]], p[at[10]], p[at[11]], p[at[12]], p[at[13]], p[at[14]], p[at[15]])};
  } else if constexpr (N == 2) {
    const __m256i x = _mm256_setr_epi32(p[at[0]], p[at[1]], p[at[2]], p[at[3]], p[at[4]], p[at[5]], p[at[6]], p[at[7]]);
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return {_mm512_permutexvar_epi32(twice, _mm512_castsi256_si512(x))};
  } else {
    __m512i x = _mm512_set1_epi32(p[at[0]]);
    x = _mm512_mask_set1_epi32(x, 0x00f0, p[at[1]]);
    x = _mm512_mask_set1_epi32(x, 0x0f00, p[at[2]]);
    return {_mm512_mask_set1_epi32(x, 0xf000, p[at[3]])};
  }
#elif defined(__AVX2__)
  if constexpr (N == 4) {
    return {_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi32(p[at[0]])), _mm_set1_epi32(p[at[1]]), 1)};
  } else {
    return {_mm256_setr_epi32(p[at[0]], p[at[1 / N]], p[at[2 / N]], p[at[3 / N]], p[at[4 / N]], p[at[5 / N]],
                              p[at[6 / N]], p[at[7 / N]])};
  }
#else
  return {i32x4{p[at[0]], p[at[1 / N]], p[at[2 / N]], p[at[3 / N]]}};
#endif
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
