// Layer norm of the rows of input + residual: (v - mean) / sqrt(variance + eps) * weight + bias.
#pragma once

#include "ops/norm_rows.h"

namespace lamina {

// Shapes, dtypes and strides as in NormRows (ops/norm_rows.h); sum, if given, takes input + residual.
void layer_norm(const TensorView& input, const std::vector<int64_t>& normalized_shape,
                const std::optional<TensorView>& weight, const std::optional<TensorView>& bias, double eps,
                const std::optional<TensorView>& residual, const TensorView& out, const std::optional<TensorView>& sum);

}  // namespace lamina
