// attention in float32 arithmetic, for every storage but float64, which has a plain kernel of its own (see
// attention_block.h and attention_double.h).
//
// float32 keys and values are read where they lie; half-width ones are widened chunk by chunk, once per block of query
// rows, which costs one part in as many as the block has rows.
#include "cpu/kernels/attention_block.h"
#include "cpu/kernels/attention_double.h"
#include "cpu/kernels/attention_math.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(attention_f32_table, attention<FloatMath<float>>);
REGISTER_KERNEL(attention_bf16_table, attention<FloatMath<bf16>>);
// Where nothing faster exists for them, float32 is the answer to those who allow less.
REGISTER_KERNEL(attention_f32_as_bf16_table, attention<FloatMath<float>>);
REGISTER_KERNEL(attention_f32_int8_table, attention<FloatMath<float>>);
REGISTER_KERNEL(attention_f32_as_bf16_int8_table, attention<FloatMath<float>>);
REGISTER_KERNEL(attention_bf16_int8_table, attention<FloatMath<bf16>>);
REGISTER_KERNEL(attention_f16_table, attention<FloatMath<f16>>);
REGISTER_KERNEL(attention_f64_table, attention_of_doubles);

}  // namespace
}  // namespace lamina::LAMINA_ISA
