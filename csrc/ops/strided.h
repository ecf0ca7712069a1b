// How operands of one shape are walked through together: in as few dimensions as their strides allow.
#pragma once

#include "ops/tensor.h"

namespace lamina {

// The most dimensions of a tensor that is walked through this way.
constexpr int kMostDims = 16;

// shape: not empty, at most kMostDims; strides[operand][dim] in its order. Writes sizes and walked[operand] from the
// innermost dimension outwards: dimensions of size 1 are gone, neighbours that every operand steps through alike are
// one. The first operand decides the order: its smallest stride is innermost. Returns how many are left, at least one.
int collapse_dims(int ndim, const int64_t* shape, int operands, const int64_t (*strides)[kMostDims], int64_t* sizes,
                  int64_t (*walked)[kMostDims]);

// Whether some elements are one, as those of an expanded tensor are.
bool repeats_memory(const TensorView& t);

}  // namespace lamina
