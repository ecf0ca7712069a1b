// The values of a tensor in other memory: other strides, another dtype.
#pragma once

#include "cpu/kernels/copy.h"
#include "ops/tensor.h"

namespace lamina {

// Any strides on both sides; x of the shape of out, not overlapping it. The same dtype on both sides, or a conversion:
// between float32, int32, int64 and bool; between float32, bfloat16, float16 and bool; from int8 to these four. Numbers
// become integers without their fraction; what those of a float they cannot hold become is not said, as in torch.
void copy(const TensorView& x, const TensorView& out);

// The same copy as a box of elements; with nothing to copy it has no dimensions.
CopyArgs copy_args(const TensorView& x, const TensorView& out);
// Copies a box, with as many threads as it is worth.
void copy_box(const CopyArgs& box);

}  // namespace lamina
