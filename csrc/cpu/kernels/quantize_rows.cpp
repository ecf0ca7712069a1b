// Symmetric quantization: code = round_half_even(x * inverse), with inverse = 127 / max|x| of the row, or 1 / scale.
//
// Two passes over a row that fits L1, or one when the scale is given. The maximum is taken over the bit patterns of
// |x|, which order like the values and put NaN above infinity: it is exact, equal on every ISA, and anything that is
// not finite shows in it. A product and one rounding follow, so the codes are bit-equal on every ISA as well.
#include "cpu/kernels/quantize_rows.h"

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;

LAMINA_INLINE float as_float(int32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <class T>
LAMINA_INLINE float row_abs_max(const T* x, int64_t k) {
  // Four chains hide the latency of the maximum.
  I32 m[4] = {set1_i32(0), set1_i32(0), set1_i32(0), set1_i32(0)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
    LAMINA_UNROLL
    for (int c = 0; c < 4; ++c) m[c] = max(m[c], abs_bits(load(x + i + c * kLanes)));
  }
  for (; i < k; i += kLanes) m[0] = max(m[0], abs_bits(load_up_to(x + i, int(k - i < kLanes ? k - i : kLanes))));
  return as_float(reduce_max(max(max(m[0], m[1]), max(m[2], m[3]))));
}

// The codes of one row whose products with `inverse` do not pass 127.
template <class T>
LAMINA_INLINE void write_codes(const T* x, int64_t k, F32 inverse, uint8_t zero, uint8_t* codes) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) store_codes(codes + i, load(x + i) * inverse, zero, kLanes);
  if (i < k) store_codes(codes + i, load_n(x + i, int(k - i)) * inverse, zero, int(k - i));
}

// The same with a clamp; returns max |x|.
template <class T>
LAMINA_INLINE float write_clamped_codes(const T* x, int64_t k, F32 inverse, uint8_t zero, uint8_t* codes) {
  const F32 most = set1(127.0f), least = set1(-127.0f);
  I32 m = set1_i32(0);
  for (int64_t i = 0; i < k; i += kLanes) {
    const int n = int(k - i < kLanes ? k - i : kLanes);
    const F32 v = load_up_to(x + i, n);
    m = max(m, abs_bits(v));
    store_codes(codes + i, min(max(v * inverse, least), most), zero, n);
  }
  return as_float(reduce_max(m));
}

template <class T>
void quantize_rows(const QuantizeRowsArgs<T>& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = a.x + row * a.ldx;
    uint8_t* codes = a.codes + row * a.ld_codes;
    float largest, scale = a.scale;
    if (scale > 0) {
      largest = write_clamped_codes(x, a.k, set1(1.0f / scale), a.zero, codes);
    } else {
      largest = row_abs_max(x, a.k);
      // Below 1e-36 the inverse would overflow; such a row counts as zero, an error of 1e-36.
      const bool tiny = largest < 1e-36f;
      scale = tiny ? 0.0f : largest / 127.0f;
      write_codes(x, a.k, set1(tiny ? 0.0f : 127.0f / largest), a.zero, codes);
    }
    // NaN for infinity too: a row that holds one must not come out as numbers of some sign.
    const float nan_or_zero = largest - largest;
    a.scales[row] = scale + nan_or_zero;
    if (nan_or_zero != 0.0f) memset(codes, a.zero, size_t(a.k));
    for (int64_t i = a.k; i < a.k_padded; ++i) codes[i] = a.zero;
  }
}

template <class T>
float abs_max(const T* x, int64_t n) {
  return row_abs_max(x, n);
}

REGISTER_KERNEL(abs_max_f32_table, abs_max<float>);
REGISTER_KERNEL(abs_max_bf16_table, abs_max<bf16>);
REGISTER_KERNEL(quantize_rows_f32_table, quantize_rows<float>);
REGISTER_KERNEL(quantize_rows_bf16_table, quantize_rows<bf16>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
