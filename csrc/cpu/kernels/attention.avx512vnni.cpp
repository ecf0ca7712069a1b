// attention with int8 scores on vpdpbusd, and values in float32 (see attention_codes.h).
#include "cpu/kernels/attention_int8.h"

namespace lamina::LAMINA_ISA {
namespace {

template <class T>
struct Int8Math : FloatMath<T> {
  using Wide = FloatMath<T>;
  static constexpr int dims_per_word = 4;
  static constexpr bool int8_scores = true;

  static LAMINA_INLINE F32 score_multiply_add(F32 a, F32 b, F32 c) { return int8_multiply_add(a, b, c); }
};

REGISTER_KERNEL(attention_f32_int8_table, attention_int8<Int8Math<float>>);
REGISTER_KERNEL(attention_f32_as_bf16_int8_table, attention_int8<Int8Math<float>>);
REGISTER_KERNEL(attention_bf16_int8_table, attention_int8<Int8Math<bf16>>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
