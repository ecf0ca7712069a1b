// Three planes of codes as pixels. Byte b of 48 is byte b / 3 of plane b % 3: each third of them is gathered from the
// three planes by a shuffle that leaves zeros where another plane's bytes belong. Compilers do not find that.
#include "cpu/kernels/interleave_codes.h"

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

#if defined(__AVX2__)
// [third][plane][byte]: from where in 16 bytes of the plane, or -1.
struct Shuffles {
  alignas(16) int8_t from[3][3][16];
};
constexpr Shuffles shuffles() {
  Shuffles s{};
  for (int third = 0; third < 3; ++third) {
    for (int plane = 0; plane < 3; ++plane) {
      for (int byte = 0; byte < 16; ++byte) {
        const int at = 16 * third + byte;
        s.from[third][plane][byte] = int8_t(at % 3 == plane ? at / 3 : -1);
      }
    }
  }
  return s;
}
constexpr Shuffles kShuffles = shuffles();

LAMINA_INLINE void interleave16(const int8_t* const (&planes)[3], int64_t at, int8_t* to) {
  __m128i in[3];
  LAMINA_UNROLL
  for (int p = 0; p < 3; ++p) in[p] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[p] + at));
  LAMINA_UNROLL
  for (int third = 0; third < 3; ++third) {
    __m128i out = _mm_setzero_si128();
    LAMINA_UNROLL
    for (int p = 0; p < 3; ++p) {
      const __m128i from = _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.from[third][p]));
      out = _mm_or_si128(out, _mm_shuffle_epi8(in[p], from));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 3 * at + 16 * third), out);
  }
}
#endif

void interleave_codes(const InterleaveCodesArgs& a) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 16 <= a.pixels; i += 16) interleave16(a.planes, i, a.to);
#endif
  for (; i < a.pixels; ++i) {
    for (int p = 0; p < 3; ++p) a.to[3 * i + p] = a.planes[p][i];
  }
}

REGISTER_KERNEL(interleave_codes_table, interleave_codes);

}  // namespace
}  // namespace lamina::LAMINA_ISA
