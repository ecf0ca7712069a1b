// Peak of float32 multiply-add and of plain reads: twelve independent chains hide the latency of four cycles on two
// ports; the values stay bounded, since subnormals or infinities would be slower on some machines.
#include "cpu/kernels/peak_probe.h"

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kChains = 12;

double peak_float32(int64_t iterations) {
  F32 acc[kChains];
  LAMINA_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = set1(float(i));
  const F32 a = set1(0.5f), b = set1(1.0f);
  for (int64_t n = 0; n < iterations; ++n) {
    LAMINA_UNROLL
    for (int i = 0; i < kChains; ++i) {
      acc[i] = fmadd(acc[i], a, b);
      __asm__ volatile("" : "+v"(acc[i].r));
    }
  }
  return 2.0 * kChains * F32::lanes * double(iterations);
}

float read_probe(const float* data, int64_t n) {
  F32 acc[8];
  LAMINA_UNROLL
  for (int i = 0; i < 8; ++i) acc[i] = zero();
  int64_t k = 0;
  for (; k + 8 * F32::lanes <= n; k += 8 * F32::lanes) {
    LAMINA_UNROLL
    for (int i = 0; i < 8; ++i) acc[i] = max(acc[i], load(data + k + i * F32::lanes));
  }
  F32 all = acc[0];
  for (int i = 1; i < 8; ++i) all = max(all, acc[i]);
  float result = reduce_max(all);
  for (; k < n; ++k) result = data[k] > result ? data[k] : result;
  return result;
}

REGISTER_KERNEL(peak_float32_table, peak_float32);
REGISTER_KERNEL(read_probe_table, read_probe);

}  // namespace
}  // namespace lamina::LAMINA_ISA
