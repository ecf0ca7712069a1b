// Softmax along one dimension: e^(x - m) / sum of e^(x - m), with m the largest element.
#pragma once

#include "ops/tensor.h"

namespace lamina {

// x and out of one shape: float32 or bfloat16 each, any strides; dim in [-ndim, ndim). Computed in float32. out may be
// x. A row that is -inf throughout, or holds NaN or +inf, gives NaN.
void softmax(const TensorView& x, int64_t dim, const TensorView& out);

}  // namespace lamina
