// attention_decode for bfloat16 caches on vdpbf16ps: two products and two sums per lane, and nothing to convert.
//
// Neighbours in a row of queries and keys are pairs as they lie. Values of two adjacent keys become pairs by two
// permutations for 32 columns, and the weights are rounded to such pairs when they are made. Sums are float32.
#include "cpu/kernels/attention_decode_block.h"

namespace lamina::LAMINA_ISA {
namespace {

struct PairMath {
  using Storage = bf16;
  static constexpr int per_word = 2;
  static constexpr bool scales_query = false;  // the scaled query would be rounded a second time

  static LAMINA_INLINE __m512i load_halves(const bf16* p, int n) {
    if (n >= 2 * kLanes) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16(__mmask32((uint64_t{1} << n) - 1), p);
  }
  static LAMINA_INLINE F32 load_words(const bf16* p, int n) { return {_mm512_castsi512_ps(load_halves(p, n))}; }
  static LAMINA_INLINE void load_values(F32 (&x)[2], const bf16* const* rows, int column, int n) {
    const __m512i first = load_halves(rows[0] + column, n), second = load_halves(rows[1] + column, n);
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    x[0].r = _mm512_castsi512_ps(_mm512_permutex2var_epi16(first, low, second));
    x[1].r = _mm512_castsi512_ps(_mm512_permutex2var_epi16(first, high, second));
  }
  static LAMINA_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
    return {_mm512_dpbf16_ps(c.r, (__m512bh)a.r, (__m512bh)b.r)};
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
  static LAMINA_INLINE void store_weights(float* to, F32 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x.r));
  }
  static LAMINA_INLINE uint32_t nonzero_bits(float word) {
    uint32_t bits;
    memcpy(&bits, &word, 4);
    return (bits & 0x7fff0000 ? 0xffff0000 : 0) | (bits & 0x7fff ? 0xffff : 0);
  }
  static void pack_row(const bf16* q, int64_t col, int n, float, float* to) {
    bf16* half = reinterpret_cast<bf16*>(to);
    for (int e = 0; e < n; ++e) half[e] = q[e * col];
    for (int e = n; e < round_up(n, 2 * kLanes); ++e) half[e].bits = 0;
  }
  // The query of a bfloat16 cache is bfloat16.
  template <class Q>
  static void pack_row(const Q*, int64_t, int, float, float*) {
    __builtin_unreachable();
  }
};

REGISTER_KERNEL(attention_decode_bf16_table, attention_decode<PairMath>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
