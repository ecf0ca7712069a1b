// Eight lanes in ymm registers: AVX2 with FMA.
#pragma once

#include <immintrin.h>

namespace lamina::LAMINA_ISA {
namespace {

struct F32 {
  static constexpr int lanes = 8;
  static constexpr int registers = 16;
  __m256 r;
};
struct I32 {
  __m256i r;
};
struct Mask {
  __m256 r;
};

LAMINA_INLINE F32 set1(float x) { return {_mm256_set1_ps(x)}; }
LAMINA_INLINE F32 zero() { return {_mm256_setzero_ps()}; }
LAMINA_INLINE F32 iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }

// All ones in the first n lanes.
LAMINA_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

LAMINA_INLINE F32 from_bf16(__m128i x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
LAMINA_INLINE __m128i to_bf16(F32 x) {
  const __m256i b = _mm256_castps_si256(x.r);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.r, x.r, _CMP_UNORD_Q));
  const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
}

LAMINA_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
LAMINA_INLINE F32 load(const bf16* p) { return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
LAMINA_INLINE F32 load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
LAMINA_INLINE F32 load_n(const bf16* p, int n) {
  alignas(16) uint16_t t[8] = {0};
  memcpy(t, p, size_t(n) * 2);
  return from_bf16(_mm_load_si128(reinterpret_cast<const __m128i*>(t)));
}

LAMINA_INLINE F32 load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
LAMINA_INLINE F32 load_n(const f16* p, int n) {
  alignas(16) f16 t[8] = {};
  memcpy(t, p, size_t(n) * 2);
  return load(t);
}

LAMINA_INLINE F32 load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
LAMINA_INLINE F32 load_n(const int8_t* p, int n) {
  alignas(8) int8_t t[8] = {0};
  memcpy(t, p, size_t(n));
  return load(t);
}

LAMINA_INLINE void store(float* p, F32 x) { _mm256_storeu_ps(p, x.r); }
LAMINA_INLINE void store(bf16* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(x)); }
LAMINA_INLINE void store_n(float* p, F32 x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x.r); }
LAMINA_INLINE void store_n(bf16* p, F32 x, int n) {
  alignas(16) uint16_t t[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(t), to_bf16(x));
  memcpy(p, t, size_t(n) * 2);
}

LAMINA_INLINE void store(f16* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LAMINA_INLINE void store_n(f16* p, F32 x, int n) {
  alignas(16) f16 t[8];
  store(t, x);
  memcpy(p, t, size_t(n) * 2);
}

LAMINA_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.r, b.r)}; }
LAMINA_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.r, b.r)}; }
LAMINA_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.r, b.r)}; }
LAMINA_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.r, b.r)}; }
LAMINA_INLINE F32 fmadd(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }
LAMINA_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.r, b.r)}; }
LAMINA_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.r, b.r)}; }

LAMINA_INLINE Mask less(F32 a, F32 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LT_OQ)}; }
LAMINA_INLINE Mask is_nan(F32 x) { return {_mm256_cmp_ps(x.r, x.r, _CMP_UNORD_Q)}; }
LAMINA_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.r, b.r)}; }
LAMINA_INLINE Mask all_lanes() { return {_mm256_castsi256_ps(_mm256_set1_epi32(-1))}; }
LAMINA_INLINE bool all(Mask m) { return _mm256_movemask_ps(m.r) == 0xff; }
// Bit i is lane i.
LAMINA_INLINE uint32_t bits_of_lanes(Mask m) { return uint32_t(_mm256_movemask_ps(m.r)); }
// n <= 64 bytes, 0 or 1, as bits.
LAMINA_INLINE uint64_t bool_bits(const uint8_t* p, int n) {
  alignas(32) uint8_t t[64] = {0};
  if (n < 64) {
    memcpy(t, p, size_t(n));
    p = t;
  }
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = _mm256_cmpgt_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), zero);
  const __m256i high = _mm256_cmpgt_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)), zero);
  return uint64_t(uint32_t(_mm256_movemask_epi8(high))) << 32 | uint32_t(_mm256_movemask_epi8(low));
}
// Lane i is bit i.
LAMINA_INLINE Mask lanes_of_bits(uint32_t bits) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int32_t(bits)), each);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, each))};
}
LAMINA_INLINE F32 select(Mask m, F32 a, F32 b) { return {_mm256_blendv_ps(b.r, a.r, m.r)}; }

// The same bits of every lane.
LAMINA_INLINE F32 and_bits(F32 x, uint32_t bits) {
  return {_mm256_and_ps(x.r, _mm256_castsi256_ps(_mm256_set1_epi32(int32_t(bits))))};
}

LAMINA_INLINE F32 or_bits(F32 x, uint32_t bits) {
  return {_mm256_or_ps(x.r, _mm256_castsi256_ps(_mm256_set1_epi32(int32_t(bits))))};
}

LAMINA_INLINE F32 round_even(F32 x) { return {_mm256_round_ps(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// p * 2^n for integer-valued n; n below -126 gives 0.
LAMINA_INLINE F32 scale_exponent(F32 p, F32 n) {
  const __m256i e = _mm256_cvtps_epi32(_mm256_max_ps(n.r, _mm256_set1_ps(-127.0f)));
  const __m256i factor = _mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(p.r, _mm256_castsi256_ps(factor))};
}

LAMINA_INLINE F32 reciprocal(F32 x) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), x.r)}; }
LAMINA_INLINE F32 reciprocal_of_normal(F32 x) { return reciprocal(x); }

// The lanes x lanes matrix whose rows are r becomes its transpose.
LAMINA_INLINE void transpose(F32 (&r)[8]) {
  __m256 t[8];
  LAMINA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m256 low01 = _mm256_unpacklo_ps(r[4 * i].r, r[4 * i + 1].r);
    const __m256 high01 = _mm256_unpackhi_ps(r[4 * i].r, r[4 * i + 1].r);
    const __m256 low23 = _mm256_unpacklo_ps(r[4 * i + 2].r, r[4 * i + 3].r);
    const __m256 high23 = _mm256_unpackhi_ps(r[4 * i + 2].r, r[4 * i + 3].r);
    t[4 * i] = _mm256_shuffle_ps(low01, low23, 0x44);
    t[4 * i + 1] = _mm256_shuffle_ps(low01, low23, 0xee);
    t[4 * i + 2] = _mm256_shuffle_ps(high01, high23, 0x44);
    t[4 * i + 3] = _mm256_shuffle_ps(high01, high23, 0xee);
  }
  LAMINA_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i].r = _mm256_permute2f128_ps(t[i], t[4 + i], 0x20);
    r[4 + i].r = _mm256_permute2f128_ps(t[i], t[4 + i], 0x31);
  }
}

// Lane i is the sum of the lanes of x[i].
LAMINA_INLINE F32 reduce_add_each(const F32 (&x)[8]) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0].r, x[1].r), _mm256_hadd_ps(x[2].r, x[3].r));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4].r, x[5].r), _mm256_hadd_ps(x[6].r, x[7].r));
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
}

LAMINA_INLINE float reduce_max(F32 x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x.r), _mm256_extractf128_ps(x.r, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
LAMINA_INLINE float reduce_add(F32 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x.r), _mm256_extractf128_ps(x.r, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

LAMINA_INLINE I32 set1_i32(int32_t x) { return {_mm256_set1_epi32(x)}; }
LAMINA_INLINE I32 load_i32(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
LAMINA_INLINE void store_i32(int32_t* p, I32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.r); }
LAMINA_INLINE I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.r, b.r)}; }
LAMINA_INLINE I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.r, b.r)}; }
LAMINA_INLINE I32 operator&(I32 a, I32 b) { return {_mm256_and_si256(a.r, b.r)}; }
LAMINA_INLINE I32 operator^(I32 a, I32 b) { return {_mm256_xor_si256(a.r, b.r)}; }
// The 64-bit products of unsigned a and b.
LAMINA_INLINE void multiply_wide(I32 a, uint32_t b, I32& low, I32& high) {
  const __m256i m = _mm256_set1_epi32(int32_t(b));
  const __m256i even = _mm256_mul_epu32(a.r, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a.r, 32), m);
  low.r = _mm256_mullo_epi32(a.r, m);
  high.r = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
// Bit i: lane i is below the limit, unsigned.
LAMINA_INLINE uint32_t bits_below(I32 a, uint32_t limit) {
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);
  const __m256i below =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(limit ^ 0x80000000u)), _mm256_xor_si256(a.r, sign));
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(below)));
}
LAMINA_INLINE I32 shift_left(I32 x, int n) { return {_mm256_slli_epi32(x.r, n)}; }
LAMINA_INLINE I32 shift_right(I32 x, int n) { return {_mm256_srai_epi32(x.r, n)}; }
LAMINA_INLINE F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.r)}; }
LAMINA_INLINE I32 bits_of(F32 x) { return {_mm256_castps_si256(x.r)}; }
LAMINA_INLINE F32 floats_of(I32 x) { return {_mm256_castsi256_ps(x.r)}; }
LAMINA_INLINE I32 abs_bits(F32 x) {
  return {_mm256_and_si256(_mm256_castps_si256(x.r), _mm256_set1_epi32(0x7fffffff))};
}
LAMINA_INLINE I32 max(I32 a, I32 b) { return {_mm256_max_epi32(a.r, b.r)}; }
// table[low five bits of each lane].
LAMINA_INLINE F32 lookup32(const float (&table)[32], I32 at) {
  __m256 eight[4];
  LAMINA_UNROLL
  for (int i = 0; i < 4; ++i) eight[i] = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8 * i), at.r);
  const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(at.r, 28));
  const __m256 bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(at.r, 27));
  const __m256 low = _mm256_blendv_ps(eight[0], eight[1], bit3), high = _mm256_blendv_ps(eight[2], eight[3], bit3);
  return {_mm256_blendv_ps(low, high, bit4)};
}
LAMINA_INLINE int32_t reduce_max(I32 x) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x.r), _mm256_extracti128_si256(x.r, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}

// n <= lanes int8 codes, round half to even, saturated to [-128, 127]; `zero` (0 or 128) is the code of zero.
LAMINA_INLINE void store_codes(uint8_t* p, F32 x, uint8_t zero, int n) {
  const __m256i i = _mm256_cvtps_epi32(x.r);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  const __m128i bytes = _mm_xor_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(char(zero)));
  if (n == 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
  } else {
    alignas(16) uint8_t t[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(t), bytes);
    memcpy(p, t, size_t(n));
  }
}

// The codes of four registers, round half to even, saturated, with an offset of 128: those of lane i are the bytes of
// word i.
LAMINA_INLINE I32 join_codes(F32 a, F32 b, F32 c, F32 d) {
  const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a.r), _mm256_cvtps_epi32(b.r));
  const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c.r), _mm256_cvtps_epi32(d.r));
  // In every 128 bits the four codes of a, then those of b, c and d.
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i codes = _mm256_shuffle_epi8(_mm256_packs_epi16(ab, cd), order);
  return {_mm256_xor_si256(codes, _mm256_set1_epi8(char(0x80)))};
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
