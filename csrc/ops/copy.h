// The values of a tensor in other memory: other strides, another dtype.
#pragma once

#include "ops/tensor.h"

namespace lamina {

// Any strides on both sides; x of the shape of out, not overlapping it. The same dtype on both sides, or a conversion:
// between float32, bfloat16, float16 and bool; from int8 to the first three; from int32 and int64 to float32.
void copy(const TensorView& x, const TensorView& out);

}  // namespace lamina
