// Symmetric dynamic quantization: per row, scale = max|x| / 127 and code = round_half_even(x * (127 / max|x|)).
//
// Two passes over a row that fits L1. The maximum is taken over the bit patterns of |x|, which order like the values
// and put NaN above infinity: it is exact, equal on every ISA, and a NaN anywhere shows in the scale. A product and one
// rounding follow, so the codes are bit-equal on every ISA as well.
#include "cpu/kernels/quantize_rows.h"

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;

template <class T>
float row_abs_max(const T* x, int64_t k) {
  // Four chains hide the latency of the maximum.
  I32 m[4] = {set1_i32(0), set1_i32(0), set1_i32(0), set1_i32(0)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
    LAMINA_UNROLL
    for (int c = 0; c < 4; ++c) m[c] = max(m[c], abs_bits(load(x + i + c * kLanes)));
  }
  for (; i < k; i += kLanes) m[0] = max(m[0], abs_bits(load_up_to(x + i, int(k - i < kLanes ? k - i : kLanes))));
  const int32_t bits = reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <class T>
void quantize_rows(const QuantizeRowsArgs<T>& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = a.x + row * a.ldx;
    uint8_t* codes = a.codes + row * a.ld_codes;
    const float largest = row_abs_max(x, a.k);
    // Below 1e-36 the inverse would overflow; such a row counts as zero, an error of 1e-36.
    const bool tiny = largest < 1e-36f;
    // largest - largest is NaN for infinity: a row that holds one must not come out as numbers of some sign.
    a.scales[row] = tiny ? 0.0f : largest / 127.0f + (largest - largest);
    const F32 inverse = set1(tiny ? 0.0f : 127.0f / largest);
    int64_t i = 0;
    for (; i + kLanes <= a.k; i += kLanes) store_codes(codes + i, load(x + i) * inverse, kLanes);
    if (i < a.k) store_codes(codes + i, load_n(x + i, int(a.k - i)) * inverse, int(a.k - i));
    for (i = a.k; i < a.k_padded; ++i) codes[i] = 128;
  }
}

REGISTER_KERNEL(quantize_rows_f32_table, quantize_rows<float>);
REGISTER_KERNEL(quantize_rows_bf16_table, quantize_rows<bf16>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
