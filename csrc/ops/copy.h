// The values of a tensor in other memory: other strides, another dtype.
#pragma once

#include "ops/tensor.h"

namespace lamina {

// Any strides on both sides; x of the shape of out, not overlapping it. The same dtype on both sides, or a conversion:
// between float32, int32, int64 and bool; between float32, bfloat16, float16 and bool; from int8 to these four. Numbers
// become integers without their fraction; what those of a float they cannot hold become is not said, as in torch.
void copy(const TensorView& x, const TensorView& out);

}  // namespace lamina
