// Tensors one behind the other.
#pragma once

#include <vector>

#include "ops/tensor.h"

namespace lamina {

// tensors: of one dtype (any of 1, 2, 4 or 8 bytes), of the shape of out but for dimension dim (from the end, if
// negative), in which their sizes add up to that of out. Any strides on both sides; out overlaps none of them.
void concatenate(const std::vector<TensorView>& tensors, int64_t dim, const TensorView& out);

}  // namespace lamina
