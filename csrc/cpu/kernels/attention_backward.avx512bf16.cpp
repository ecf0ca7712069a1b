// attention_backward for bfloat16 storage on vdpbf16ps: two products and two sums per lane, twice the rate of float32.
//
// Weights and their gradients are rounded to pairs of bfloat16: of adjacent queries for dV and dK, of adjacent keys for
// dQ. Q and dO are packed once more per block, and K once per call, as pairs of rows. Sums are float32.
#include "cpu/kernels/attention_backward_block.h"
#include "cpu/kernels/attention_math.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(attention_backward_bf16_table, attention_backward<PairMath<bf16>>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
