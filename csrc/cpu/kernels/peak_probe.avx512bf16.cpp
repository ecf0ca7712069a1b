// Peak of vdpbf16ps: 32 multiply-adds an instruction, twelve independent chains.
#include "cpu/kernels/peak_probe.h"

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kChains = 12;

double peak_bf16(int64_t iterations) {
  __m512 acc[kChains];
  LAMINA_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_setzero_ps();
  const __m512 a = _mm512_setzero_ps();
  for (int64_t n = 0; n < iterations; ++n) {
    LAMINA_UNROLL
    for (int i = 0; i < kChains; ++i) __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(acc[i]) : "v"(a));
  }
  return 2.0 * 32 * kChains * double(iterations);
}

REGISTER_KERNEL(peak_bf16_table, peak_bf16);

}  // namespace
}  // namespace lamina::LAMINA_ISA
