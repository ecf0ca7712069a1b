// Sixteen lanes in zmm registers: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

namespace lamina::LAMINA_ISA {
namespace {

struct F32 {
  static constexpr int lanes = 16;
  static constexpr int registers = 32;
  __m512 r;
};
struct I32 {
  __m512i r;
};
struct Mask {
  __mmask16 r;
};

LAMINA_INLINE F32 set1(float x) { return {_mm512_set1_ps(x)}; }
LAMINA_INLINE F32 zero() { return {_mm512_setzero_ps()}; }
LAMINA_INLINE F32 iota() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }

LAMINA_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }

LAMINA_INLINE F32 from_bf16(__m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
LAMINA_INLINE __m256i to_bf16(F32 x) {
  const __m512i b = _mm512_castps_si512(x.r);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.r, x.r, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, b, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

LAMINA_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
LAMINA_INLINE F32 load(const bf16* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
LAMINA_INLINE F32 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
LAMINA_INLINE F32 load_n(const bf16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

LAMINA_INLINE F32 load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
LAMINA_INLINE F32 load_n(const f16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }

LAMINA_INLINE F32 load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
LAMINA_INLINE F32 load_n(const int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)))};
}

LAMINA_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x.r); }
LAMINA_INLINE void store(bf16* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x)); }
LAMINA_INLINE void store_n(float* p, F32 x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.r); }
LAMINA_INLINE void store_n(bf16* p, F32 x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(x)); }

LAMINA_INLINE __m256i to_f16(F32 x) { return _mm512_cvtps_ph(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
LAMINA_INLINE void store(f16* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(x)); }
LAMINA_INLINE void store_n(f16* p, F32 x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_f16(x)); }

LAMINA_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.r, b.r)}; }
LAMINA_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.r, b.r)}; }
LAMINA_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.r, b.r)}; }
LAMINA_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.r, b.r)}; }
LAMINA_INLINE F32 fmadd(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
LAMINA_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.r, b.r)}; }
LAMINA_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.r, b.r)}; }

LAMINA_INLINE Mask less(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_LT_OQ)}; }
LAMINA_INLINE Mask is_nan(F32 x) { return {_mm512_cmp_ps_mask(x.r, x.r, _CMP_UNORD_Q)}; }
LAMINA_INLINE Mask operator&(Mask a, Mask b) { return {__mmask16(a.r & b.r)}; }
LAMINA_INLINE Mask all_lanes() { return {__mmask16(0xffff)}; }
LAMINA_INLINE bool all(Mask m) { return m.r == 0xffff; }
// Bit i is lane i.
LAMINA_INLINE uint32_t bits_of_lanes(Mask m) { return m.r; }
// n <= 64 bytes, 0 or 1, as bits.
LAMINA_INLINE uint64_t bool_bits(const uint8_t* p, int n) {
  const __m512i x = _mm512_maskz_loadu_epi8(n == 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1, p);
  return _mm512_test_epi8_mask(x, x);
}
// Lane i is bit i.
LAMINA_INLINE Mask lanes_of_bits(uint32_t bits) { return {__mmask16(bits)}; }
LAMINA_INLINE F32 select(Mask m, F32 a, F32 b) { return {_mm512_mask_blend_ps(m.r, b.r, a.r)}; }

// The same bits of every lane.
LAMINA_INLINE F32 and_bits(F32 x, uint32_t bits) {
  return {_mm512_and_ps(x.r, _mm512_castsi512_ps(_mm512_set1_epi32(int32_t(bits))))};
}

LAMINA_INLINE F32 or_bits(F32 x, uint32_t bits) {
  return {_mm512_or_ps(x.r, _mm512_castsi512_ps(_mm512_set1_epi32(int32_t(bits))))};
}

LAMINA_INLINE F32 round_even(F32 x) {
  return {_mm512_roundscale_ps(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// p * 2^n for integer-valued n.
LAMINA_INLINE F32 scale_exponent(F32 p, F32 n) { return {_mm512_scalef_ps(p.r, n.r)}; }

// Within 2 ulp: the 14-bit estimate and one Newton step. Infinity gives 0.
LAMINA_INLINE F32 reciprocal(F32 x) {
  const __m512 y = _mm512_rcp14_ps(x.r);
  const __m512 e = _mm512_fnmadd_ps(x.r, y, _mm512_set1_ps(1.0f));
  return {_mm512_mask_fmadd_ps(y, _mm512_cmp_ps_mask(e, e, _CMP_ORD_Q), e, y)};
}

// The same where neither x nor its inverse is zero, infinite or subnormal.
LAMINA_INLINE F32 reciprocal_of_normal(F32 x) {
  const __m512 y = _mm512_rcp14_ps(x.r);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(x.r, y, _mm512_set1_ps(1.0f)), y, y)};
}

// The lanes x lanes matrix whose rows are r becomes its transpose.
LAMINA_INLINE void transpose(F32 (&r)[16]) {
  __m512 t[16];
  LAMINA_UNROLL
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].r, r[2 * i + 1].r);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].r, r[2 * i + 1].r);
  }
  __m512 u[16];
  LAMINA_UNROLL
  for (int i = 0; i < 4; ++i) {
    LAMINA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const __m512d a = _mm512_castps_pd(t[4 * i + h]), b = _mm512_castps_pd(t[4 * i + 2 + h]);
      u[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  LAMINA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 even = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88), odd = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
    r[i].r = _mm512_shuffle_f32x4(even, even2, 0x88);
    r[8 + i].r = _mm512_shuffle_f32x4(even, even2, 0xdd);
    r[4 + i].r = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    r[12 + i].r = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}

// Lane i is the sum of the lanes of x[i].
LAMINA_INLINE F32 reduce_add_each(const F32 (&x)[16]) {
  __m512 four[4];  // [128-bit lane][register of four]: partial sums
  LAMINA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 a = x[4 * i].r, b = x[4 * i + 1].r, c = x[4 * i + 2].r, d = x[4 * i + 3].r;
    const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  const __m512 low =
      _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
  const __m512 high =
      _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88), _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
}

LAMINA_INLINE float reduce_max(F32 x) { return _mm512_reduce_max_ps(x.r); }
LAMINA_INLINE float reduce_add(F32 x) { return _mm512_reduce_add_ps(x.r); }

LAMINA_INLINE I32 set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
LAMINA_INLINE I32 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
LAMINA_INLINE void store_i32(int32_t* p, I32 x) { _mm512_storeu_si512(p, x.r); }
LAMINA_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.r, b.r)}; }
LAMINA_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.r, b.r)}; }
LAMINA_INLINE I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.r, b.r)}; }
LAMINA_INLINE I32 operator^(I32 a, I32 b) { return {_mm512_xor_si512(a.r, b.r)}; }
// The 64-bit products of unsigned a and b.
LAMINA_INLINE void multiply_wide(I32 a, uint32_t b, I32& low, I32& high) {
  const __m512i m = _mm512_set1_epi32(int32_t(b));
  const __m512i even = _mm512_mul_epu32(a.r, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.r, 32), m);
  low.r = _mm512_mullo_epi32(a.r, m);
  high.r = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
}
// Bit i: lane i is below the limit, unsigned.
LAMINA_INLINE uint32_t bits_below(I32 a, uint32_t limit) {
  return _mm512_cmplt_epu32_mask(a.r, _mm512_set1_epi32(int32_t(limit)));
}
LAMINA_INLINE I32 shift_left(I32 x, int n) { return {_mm512_slli_epi32(x.r, unsigned(n))}; }
LAMINA_INLINE I32 shift_right(I32 x, int n) { return {_mm512_srai_epi32(x.r, unsigned(n))}; }
LAMINA_INLINE F32 to_float(I32 x) { return {_mm512_cvtepi32_ps(x.r)}; }
LAMINA_INLINE I32 bits_of(F32 x) { return {_mm512_castps_si512(x.r)}; }
LAMINA_INLINE F32 floats_of(I32 x) { return {_mm512_castsi512_ps(x.r)}; }
LAMINA_INLINE I32 abs_bits(F32 x) {
  return {_mm512_and_si512(_mm512_castps_si512(x.r), _mm512_set1_epi32(0x7fffffff))};
}
LAMINA_INLINE I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.r, b.r)}; }
// table[low five bits of each lane].
LAMINA_INLINE F32 lookup32(const float (&table)[32], I32 at) {
  return {_mm512_permutex2var_ps(_mm512_load_ps(table), at.r, _mm512_load_ps(table + 16))};
}
LAMINA_INLINE int32_t reduce_max(I32 x) { return _mm512_reduce_max_epi32(x.r); }

// n <= lanes int8 codes, round half to even, saturated to [-128, 127]; `zero` (0 or 128) is the code of zero.
LAMINA_INLINE void store_codes(uint8_t* p, F32 x, uint8_t zero, int n) {
  const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.r));
  const __m128i codes = _mm_xor_si128(bytes, _mm_set1_epi8(char(zero)));
  if (n == 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
  } else {
    _mm_mask_storeu_epi8(p, first_lanes(n), codes);
  }
}

// The codes of four registers, round half to even, saturated, with an offset of 128: those of lane i are the bytes of
// word i.
LAMINA_INLINE I32 join_codes(F32 a, F32 b, F32 c, F32 d) {
  const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a.r), _mm512_cvtps_epi32(b.r));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c.r), _mm512_cvtps_epi32(d.r));
  // In every 128 bits the four codes of a, then those of b, c and d.
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i codes = _mm512_shuffle_epi8(_mm512_packs_epi16(ab, cd), order);
  return {_mm512_xor_si512(codes, _mm512_set1_epi8(char(0x80)))};
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
