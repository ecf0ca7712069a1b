// attention in float32 arithmetic, for every storage but float64, which has a plain kernel of its own (see
// attention_block.h and attention_double.h).
//
// float32 keys and values are read where they lie; half-width ones are widened chunk by chunk, once per block of query
// rows, which costs one part in as many as the block has rows.
#include "cpu/kernels/attention_block.h"
#include "cpu/kernels/attention_double.h"

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
  static LAMINA_INLINE uint32_t nonzero_bits(float word) { return word == 0.0f ? 0 : ~uint32_t{0}; }
};

REGISTER_KERNEL(attention_f32_table, attention<FloatMath<float>>);
REGISTER_KERNEL(attention_bf16_table, attention<FloatMath<bf16>>);
REGISTER_KERNEL(attention_f32_as_bf16_table, attention<FloatMath<float>>);
REGISTER_KERNEL(attention_f16_table, attention<FloatMath<f16>>);
REGISTER_KERNEL(attention_f64_table, attention_of_doubles);

}  // namespace
}  // namespace lamina::LAMINA_ISA
