// attention for bfloat16 storage on vdpbf16ps: two products and two sums per lane, twice the rate of float32.
//
// A word is a pair of bfloat16 (see attention_block.h). Neighbours in a row of Q and K are pairs as they lie, so K is
// still read in place: 32 bits of it are one broadcast. Only V is packed, [key / 2][column] pairs of two keys, and the
// weights are rounded to such pairs when they are made. Sums are float32.
#include "cpu/kernels/attention_block.h"
#include "cpu/kernels/attention_math.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(attention_bf16_table, attention<PairMath>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
