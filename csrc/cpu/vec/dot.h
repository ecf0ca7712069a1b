// Exact sums of products of bytes: four codes of one row, unsigned with an offset of 128 in [1, 255], times four signed
// weights in [-127, 127] of each lane.
//
//   acc = dot4_start(compensation); acc = dot4(acc, codes, weights) over k   ->   sum_k (code - 128) weight
//
// vpdpbusd multiplies the codes as they are; what their offset adds is the compensation, which dot4_start takes off
// ([NOTE] s8s8 compensation in cpu/kernels/int8_gemm.h). Without it vpmaddubsw would saturate, so the offset is taken
// off first and the sign of the code moves to the weight: |x| <= 128 and 128 * 127 * 2 fits 16 bits.
//
// kDotKeepsOffset: whether sums of dot4 that started from zero still have the compensation in them.
#pragma once

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

#if defined(__AVX512VNNI__)
constexpr bool kDotKeepsOffset = true;
#else
constexpr bool kDotKeepsOffset = false;
#endif

#if defined(__AVX512VNNI__)

// Inline assembly, since GCC 12 spills the accumulators of a large tile when they pass through the intrinsic.
LAMINA_INLINE I32 dot4(I32 acc, I32 codes, I32 weights) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.r) : "v"(codes.r), "v"(weights.r));
  return acc;
}
LAMINA_INLINE I32 dot4_start(const int32_t* compensation) { return set1_i32(0) - load_i32(compensation); }

#elif defined(__AVX512BW__)

LAMINA_INLINE I32 dot4(I32 acc, I32 codes, I32 weights) {
  const __m512i x = _mm512_xor_si512(codes.r, _mm512_set1_epi8(char(0x80)));
  const __m512i w = _mm512_mask_sub_epi8(weights.r, _mm512_movepi8_mask(x), _mm512_setzero_si512(), weights.r);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(x), w);
  return {_mm512_add_epi32(acc.r, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
LAMINA_INLINE I32 dot4_start(const int32_t*) { return set1_i32(0); }

#elif defined(__AVX2__)

LAMINA_INLINE I32 dot4(I32 acc, I32 codes, I32 weights) {
  const __m256i x = _mm256_xor_si256(codes.r, _mm256_set1_epi8(char(0x80)));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(weights.r, x));
  return {_mm256_add_epi32(acc.r, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
LAMINA_INLINE I32 dot4_start(const int32_t*) { return set1_i32(0); }

#else

LAMINA_INLINE I32 dot4(I32 acc, I32 codes, I32 weights) {
  uint8_t x[16];
  int8_t w[16];
  memcpy(x, &codes.r, 16);
  memcpy(w, &weights.r, 16);
  for (int i = 0; i < 4; ++i) {
    int32_t sum = 0;
    for (int j = 0; j < 4; ++j) sum += (x[4 * i + j] - 128) * w[4 * i + j];
    acc.r[i] = int32_t(uint32_t(acc.r[i]) + uint32_t(sum));
  }
  return acc;
}
LAMINA_INLINE I32 dot4_start(const int32_t*) { return set1_i32(0); }

#endif

}  // namespace
}  // namespace lamina::LAMINA_ISA
