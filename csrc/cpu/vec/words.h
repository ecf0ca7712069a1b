// Registers of 16-bit words, and exact sums of their products: what vec.h is for int32.
//
// Bytes become words without a shuffle: the even bytes of a register are one register of words, the odd ones another.
// + and - wrap modulo 2^16, dot2 and times modulo 2^32.
#pragma once

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

#if defined(__AVX512BW__)

struct I16 {
  static constexpr int bytes = 64;
  __m512i r;
};

LAMINA_INLINE I16 load_words(const void* p) { return {_mm512_loadu_si512(p)}; }
LAMINA_INLINE void store(int16_t* p, I16 x) { _mm512_storeu_si512(p, x.r); }
LAMINA_INLINE I16 operator+(I16 a, I16 b) { return {_mm512_add_epi16(a.r, b.r)}; }
LAMINA_INLINE I16 operator-(I16 a, I16 b) { return {_mm512_sub_epi16(a.r, b.r)}; }
template <int N>
LAMINA_INLINE I16 shift_left(I16 x) {
  return {_mm512_slli_epi16(x.r, N)};
}
LAMINA_INLINE I16 odd_bytes(I16 x) { return {_mm512_srai_epi16(x.r, 8)}; }

// acc + the products of each lane's two words.
LAMINA_INLINE I32 dot2(I32 acc, I32 a, I32 b) {
#if defined(__AVX512VNNI__)
  // Inline assembly for the reason in vec/dot.h.
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc.r) : "v"(a.r), "v"(b.r));
  return acc;
#else
  return {_mm512_add_epi32(acc.r, _mm512_madd_epi16(a.r, b.r))};
#endif
}

#elif defined(__AVX2__)

struct I16 {
  static constexpr int bytes = 32;
  __m256i r;
};

LAMINA_INLINE I16 load_words(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
LAMINA_INLINE void store(int16_t* p, I16 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.r); }
LAMINA_INLINE I16 operator+(I16 a, I16 b) { return {_mm256_add_epi16(a.r, b.r)}; }
LAMINA_INLINE I16 operator-(I16 a, I16 b) { return {_mm256_sub_epi16(a.r, b.r)}; }
template <int N>
LAMINA_INLINE I16 shift_left(I16 x) {
  return {_mm256_slli_epi16(x.r, N)};
}
LAMINA_INLINE I16 odd_bytes(I16 x) { return {_mm256_srai_epi16(x.r, 8)}; }

LAMINA_INLINE I32 dot2(I32 acc, I32 a, I32 b) { return {_mm256_add_epi32(acc.r, _mm256_madd_epi16(a.r, b.r))}; }

#else

typedef int16_t i16x8 __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

struct I16 {
  static constexpr int bytes = 16;
  i16x8 r;
};

LAMINA_INLINE I16 load_words(const void* p) {
  I16 x;
  memcpy(&x.r, p, sizeof x.r);
  return x;
}
LAMINA_INLINE void store(int16_t* p, I16 x) { memcpy(p, &x.r, sizeof x.r); }
LAMINA_INLINE I16 operator+(I16 a, I16 b) { return {(i16x8)((u16x8)a.r + (u16x8)b.r)}; }
LAMINA_INLINE I16 operator-(I16 a, I16 b) { return {(i16x8)((u16x8)a.r - (u16x8)b.r)}; }
template <int N>
LAMINA_INLINE I16 shift_left(I16 x) {
  return {(i16x8)((u16x8)x.r << N)};
}
LAMINA_INLINE I16 odd_bytes(I16 x) { return {x.r >> 8}; }

LAMINA_INLINE I32 dot2(I32 acc, I32 a, I32 b) {
  const i16x8 x = (i16x8)a.r, y = (i16x8)b.r;
  for (int i = 0; i < 4; ++i) {
    const uint32_t sum = uint32_t(x[2 * i] * y[2 * i]) + uint32_t(x[2 * i + 1] * y[2 * i + 1]);
    acc.r[i] = int32_t(uint32_t(acc.r[i]) + sum);
  }
  return acc;
}

#endif

LAMINA_INLINE I32 times(I32 a, uint32_t b) {
#if defined(__AVX512BW__)
  return {_mm512_mullo_epi32(a.r, _mm512_set1_epi32(int32_t(b)))};
#elif defined(__AVX2__)
  return {_mm256_mullo_epi32(a.r, _mm256_set1_epi32(int32_t(b)))};
#else
  typedef uint32_t u32x4 __attribute__((vector_size(16)));
  return {(i32x4)((u32x4)a.r * b)};
#endif
}

LAMINA_INLINE I16 even_bytes(I16 x) { return odd_bytes(shift_left<8>(x)); }

// n <= I16::bytes bytes; the rest is zero.
LAMINA_INLINE I16 load_words_n(const void* p, int n) {
#if defined(__AVX512BW__)
  return {_mm512_maskz_loadu_epi8(n == 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1, p)};
#else
  alignas(32) char bytes[I16::bytes] = {};
  memcpy(bytes, p, size_t(n));
  return load_words(bytes);
#endif
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
