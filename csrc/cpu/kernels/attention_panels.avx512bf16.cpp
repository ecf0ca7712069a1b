// attention_panels in bfloat16 on vdpbf16ps: keys are packed as pairs of dimensions and values as pairs of keys once a
// head, weights are rounded to such pairs when they are made.
#include "cpu/kernels/attention_panels_block.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(attention_panels_as_bf16_table, attention_panels<PairMath<float>>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
