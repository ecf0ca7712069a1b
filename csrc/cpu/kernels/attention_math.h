// The arithmetic of the attention kernels: what attention_block.h and attention_backward_block.h are written over.
#pragma once

#include "cpu/kernels/attention_rows.h"

namespace lamina::LAMINA_ISA {
namespace {

template <class T>
struct FloatMath {
  using Storage = T;
  static constexpr int dims_per_word = 1, keys_per_word = 1;
  static constexpr bool int8_scores = false;
  static constexpr bool scales_query = true;
  static constexpr bool reads_in_place = sizeof(T) == sizeof(float);

  static LAMINA_INLINE F32 multiply_add(F32 a, F32 b, F32 c) { return fmadd(a, b, c); }
  static LAMINA_INLINE F32 score_multiply_add(F32 a, F32 b, F32 c) { return fmadd(a, b, c); }
  static LAMINA_INLINE F32 load_words(const T* p, int n) { return load_up_to(p, n); }
  static LAMINA_INLINE F32 gather_words(const T* p, int64_t stride, int n) { return row_elements(p, stride, n); }
  // The bound keeps -inf out, which would give NaN; max returns its second operand on NaN, so that one passes.
  static LAMINA_INLINE F32 exp2(F32 x) { return LAMINA_ISA::exp2(max(set1(-200.0f), x)); }
  static LAMINA_INLINE F32 join(const F32 (&w)[1]) { return w[0]; }
  static LAMINA_INLINE F32 add_weights(F32 word, F32 sum) { return sum + word; }
  static LAMINA_INLINE void join_adjacent(const F32 (&w)[1], float* to) { store(to, w[0]); }
  static LAMINA_INLINE void store_words(float* to, F32 w) { store(to, w); }
  static LAMINA_INLINE uint32_t nonzero_bits(float word) { return word == 0.0f ? 0 : ~uint32_t{0}; }
};

#if defined(__AVX512BF16__)
template <class T>
struct PairMath {
  using Storage = T;
  static constexpr int dims_per_word = 2, keys_per_word = 2;
  static constexpr bool int8_scores = false;
  static constexpr bool scales_query = false;  // the scaled query would be rounded a second time
  static constexpr bool reads_in_place = sizeof(T) == 2;

  static LAMINA_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
    return {_mm512_dpbf16_ps(c.r, (__m512bh)a.r, (__m512bh)b.r)};
  }
  static LAMINA_INLINE F32 score_multiply_add(F32 a, F32 b, F32 c) { return multiply_add(a, b, c); }
  static LAMINA_INLINE F32 load_words(const bf16* p, int n) {
    if (n == 2 * kLanes) return {_mm512_loadu_ps(p)};
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(__mmask32((uint64_t{1} << n) - 1), p))};
  }
  static LAMINA_INLINE F32 load_words(const float* p, int n) {
    if (n > kLanes) return rounded(load(p), load_up_to(p + kLanes, n - kLanes));
    return rounded(load_up_to(p, n), zero());
  }
  static LAMINA_INLINE F32 gather_words(const T* p, int64_t stride, int n) {
    alignas(64) T t[2 * kLanes] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i * stride];
    return load_words(t, 2 * kLanes);
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
    const __m512i both = _mm512_castps_si512(rounded(w[0], w[1]).r);
    const __m512i halves = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                            21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(halves, both))};
  }
  static LAMINA_INLINE F32 add_weights(F32 word, F32 sum) {
    return multiply_add(word, {_mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80))}, sum);
  }
  static LAMINA_INLINE void join_adjacent(const F32 (&w)[2], float* to) { store(to, rounded(w[0], w[1])); }
  static LAMINA_INLINE void store_words(float* to, F32 w) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(w.r));
  }
  static LAMINA_INLINE uint32_t nonzero_bits(float word) {
    uint32_t bits;
    memcpy(&bits, &word, 4);
    return (bits & 0x7fff0000 ? 0xffff0000 : 0) | (bits & 0x7fff ? 0xffff : 0);
  }

  // Rows v[j], v[j + 1] -> one row of pairs; behind the last row zeros.
  static void pack_pairs(const T* v, int64_t row, int64_t col, int rows, int columns, float* to, int to_stride) {
    for (int j = 0; j < rows; j += 2) {
      const T* low = v + j * row;
      for (int c = 0; c < columns; c += kLanes) {
        const int n = smaller(kLanes, columns - c);
        const F32 pair[2] = {row_elements(low + c * col, col, n),
                             j + 1 < rows ? row_elements(low + row + c * col, col, n) : zero()};
        store(to + c, join(pair));
      }
      to += to_stride;
    }
  }

 private:
  // Neighbours in a and in b are pairs.
  static LAMINA_INLINE F32 rounded(F32 a, F32 b) {
    return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(b.r, a.r))};
  }
};
#endif

}  // namespace
}  // namespace lamina::LAMINA_ISA
