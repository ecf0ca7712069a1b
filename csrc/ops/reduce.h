// Sum, mean, maximum or minimum over some dimensions.
#pragma once

#include <string>
#include <vector>

#include "ops/tensor.h"

namespace lamina {

// x float32 or bfloat16, any strides; dims in [-ndim, ndim), each at most once, none for all; how "sum", "mean", "max"
// or "min". out: of x's dtype, any strides, and x's shape with these dimensions of size 1, or left out without keepdim.
// Sums are float32. A NaN stays; the maximum and the minimum of nothing are refused.
void reduce(const TensorView& x, const std::vector<int64_t>& dims, bool keepdim, const std::string& how,
            const TensorView& out);

}  // namespace lamina
