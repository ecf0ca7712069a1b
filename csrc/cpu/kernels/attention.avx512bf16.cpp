// attention in bfloat16 on vdpbf16ps: two products and two sums per lane, twice the rate of float32.
//
// A word is a pair of bfloat16 (see attention_block.h). Neighbours in a row of Q and K are pairs as they lie, so
// bfloat16 K is still read in place: 32 bits of it are one broadcast. Only V is packed, [key / 2][column] pairs of two
// keys, and the weights are rounded to such pairs when they are made. float32 storage is rounded when it is packed.
// Sums are float32.
#include "cpu/kernels/attention_int8.h"

namespace lamina::LAMINA_ISA {
namespace {

// int8 scores, the values as above.
template <class T>
struct Int8PairMath : PairMath<T> {
  using Wide = PairMath<T>;
  static constexpr int dims_per_word = 4;
  static constexpr bool int8_scores = true;

  static LAMINA_INLINE F32 score_multiply_add(F32 a, F32 b, F32 c) { return int8_multiply_add(a, b, c); }
};

REGISTER_KERNEL(attention_bf16_table, attention<PairMath<bf16>>);
REGISTER_KERNEL(attention_f32_as_bf16_table, attention<PairMath<float>>);
REGISTER_KERNEL(attention_bf16_int8_table, attention_int8<Int8PairMath<bf16>>);
REGISTER_KERNEL(attention_f32_as_bf16_int8_table, attention_int8<Int8PairMath<float>>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
