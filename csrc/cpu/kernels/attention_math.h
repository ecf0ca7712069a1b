// The arithmetic of the attention kernels: what attention_block.h and attention_backward_block.h are written over.
#pragma once

#include "cpu/kernels/attention_rows.h"

namespace lamina::LAMINA_ISA {
namespace {

LAMINA_INLINE float to_float(float x) { return x; }
LAMINA_INLINE float to_float(bf16 x) { return bf16_to_float(x); }
LAMINA_INLINE float to_float(f16 x) { return f16_to_float(x); }

template <class T>
struct FloatMath {
  using Storage = T;
  static constexpr int per_word = 1;
  static constexpr bool scales_query = true;
  static constexpr bool reads_in_place = sizeof(T) == sizeof(float);

  static LAMINA_INLINE F32 multiply_add(F32 a, F32 b, F32 c) { return fmadd(a, b, c); }
  static LAMINA_INLINE F32 load_words(const T* p, int n) { return load_up_to(p, n); }
  static LAMINA_INLINE F32 gather_words(const T* p, int64_t stride, int n) {
    float t[kLanes] = {0};
    for (int i = 0; i < n; ++i) t[i] = to_float(p[i * stride]);
    return load(t);
  }
  // The bound keeps -inf out, which would give NaN; max returns its second operand on NaN, so that one passes.
  static LAMINA_INLINE F32 exp2(F32 x) { return LAMINA_ISA::exp2(max(set1(-200.0f), x)); }
  static LAMINA_INLINE F32 join(const F32 (&w)[1]) { return w[0]; }
  static LAMINA_INLINE void join_adjacent(const F32 (&w)[1], float* to) { store(to, w[0]); }
  static LAMINA_INLINE void store_words(float* to, F32 w) { store(to, w); }
  static LAMINA_INLINE uint32_t nonzero_bits(float word) { return word == 0.0f ? 0 : ~uint32_t{0}; }
};

#if defined(__AVX512BF16__)
struct PairMath {
  using Storage = bf16;
  static constexpr int per_word = 2;
  static constexpr bool scales_query = false;  // the scaled query would be rounded a second time
  static constexpr bool reads_in_place = true;

  static LAMINA_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
    return {_mm512_dpbf16_ps(c.r, (__m512bh)a.r, (__m512bh)b.r)};
  }
  static LAMINA_INLINE F32 load_words(const bf16* p, int n) {
    if (n == 2 * kLanes) return {_mm512_loadu_ps(p)};
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(__mmask32((uint64_t{1} << n) - 1), p))};
  }
  static LAMINA_INLINE F32 gather_words(const bf16* p, int64_t stride, int n) {
    alignas(64) bf16 t[2 * kLanes] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i * stride];
    return {_mm512_load_ps(t)};
  }
  // A polynomial of degree 3 in x - floor(x), relative error 1e-4: weights are rounded to bfloat16. vreduceps and
  // vscalefps take the floor themselves and give 0 for -inf, so nothing is rounded or bounded beforehand.
  static LAMINA_INLINE F32 exp2(F32 x) {
    const F32 f = {_mm512_reduce_ps(x.r, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
    F32 p = set1(0.0780245215f);
    p = fmadd(p, f, set1(0.226067156f));
    p = fmadd(p, f, set1(0.695833564f));
    p = fmadd(p, f, set1(0.999925196f));
    return {_mm512_scalef_ps(p.r, x.r)};
  }
  static LAMINA_INLINE F32 join(const F32 (&w)[2]) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(w[1].r, w[0].r);
    const __m512i halves = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                            21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(halves, both))};
  }
  static LAMINA_INLINE void join_adjacent(const F32 (&w)[2], float* to) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(w[1].r, w[0].r));
  }
  static LAMINA_INLINE void store_words(float* to, F32 w) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(w.r));
  }
  static LAMINA_INLINE uint32_t nonzero_bits(float word) {
    uint32_t bits;
    memcpy(&bits, &word, 4);
    return (bits & 0x7fff0000 ? 0xffff0000 : 0) | (bits & 0x7fff ? 0xffff : 0);
  }

  // Rows v[j], v[j + 1] -> one row of pairs; behind the last row zeros.
  static void pack_pairs(const bf16* v, int64_t row, int64_t col, int rows, int columns, float* to, int to_stride) {
    for (int j = 0; j < rows; j += 2) {
      const bf16* low = v + j * row;
      for (int c = 0; c < columns; c += kLanes) {
        const int n = smaller(kLanes, columns - c);
        const __m512i a = upper_halves(low + c * col, col, n);
        const __m512i b = j + 1 < rows ? upper_halves(low + row + c * col, col, n) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + c, _mm512_or_si512(_mm512_srli_epi32(a, 16), b));
      }
      to += to_stride;
    }
  }

 private:
  static LAMINA_INLINE __m512i upper_halves(const bf16* p, int64_t col, int n) {
    if (col == 1) return _mm512_castps_si512(load_up_to(p, n).r);
    alignas(64) bf16 t[kLanes] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i * col];
    return _mm512_castps_si512(load(t).r);
  }
};

#endif

}  // namespace
}  // namespace lamina::LAMINA_ISA
