// attention for bfloat16 storage on vdpbf16ps: two products and two sums per lane, twice the rate of float32.
//
// A word is a pair of bfloat16 (see attention_block.h). Neighbours in a row of Q and K are pairs as they lie, so K is
// still read in place: 32 bits of it are one broadcast. Only V is packed, [key / 2][column] pairs of two keys, and the
// weights are rounded to such pairs when they are made. Sums are float32.
#include "cpu/kernels/attention_block.h"

namespace lamina::LAMINA_ISA {
namespace {

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

REGISTER_KERNEL(attention_bf16_table, attention<PairMath>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
