// Peak of vpdpbusd: 64 multiply-adds an instruction, twelve independent chains.
#include "cpu/kernels/peak_probe.h"

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kChains = 12;

double peak_int8(int64_t iterations) {
  __m512i acc[kChains];
  LAMINA_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_setzero_si512();
  const __m512i a = _mm512_set1_epi8(1);
  for (int64_t n = 0; n < iterations; ++n) {
    LAMINA_UNROLL
    for (int i = 0; i < kChains; ++i) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(acc[i]) : "v"(a));
  }
  return 2.0 * 64 * kChains * double(iterations);
}

REGISTER_KERNEL(peak_int8_table, peak_int8);

}  // namespace
}  // namespace lamina::LAMINA_ISA
