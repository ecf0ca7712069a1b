// attention_panels in float32 (see attention_panels_block.h): keys and values are read where they lie.
#include "cpu/kernels/attention_panels_block.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(attention_panels_f32_table, attention_panels<FloatMath<float>>);
// Where nothing faster exists for those who allow less, float32 is the answer.
REGISTER_KERNEL(attention_panels_as_bf16_table, attention_panels<FloatMath<float>>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
