// attention_backward in float32 arithmetic, for every storage but float64, which has a plain kernel of its own (see
// attention_backward_block.h and attention_backward_double.h).
#include "cpu/kernels/attention_backward_block.h"
#include "cpu/kernels/attention_backward_double.h"
#include "cpu/kernels/attention_math.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(attention_backward_f32_table, attention_backward<FloatMath<float>>);
REGISTER_KERNEL(attention_backward_bf16_table, attention_backward<FloatMath<bf16>>);
REGISTER_KERNEL(attention_backward_f16_table, attention_backward<FloatMath<f16>>);
REGISTER_KERNEL(attention_backward_f64_table, attention_backward_of_doubles);
REGISTER_KERNEL(attention_backward_sum_f32_table, attention_backward_sum<float>);
REGISTER_KERNEL(attention_backward_sum_bf16_table, attention_backward_sum<bf16>);
REGISTER_KERNEL(attention_backward_sum_f16_table, attention_backward_sum<f16>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
