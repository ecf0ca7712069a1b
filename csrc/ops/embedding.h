// Rows of a table, picked by index.
#pragma once

#include "ops/tensor.h"

namespace lamina {

// indices [...] int32 or int64, any strides; weight [V, D] of any dtype and strides; out [..., D] of weight's dtype,
// contiguous. An index outside [0, V) is refused; what out holds then is not said.
void embedding(const TensorView& indices, const TensorView& weight, const TensorView& out);

}  // namespace lamina
