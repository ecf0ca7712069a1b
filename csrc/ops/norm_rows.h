// What layer_norm and rms_norm share: checks, rows of any strides, work shares.
#pragma once

#include <optional>
#include <vector>

#include "ops/tensor.h"

namespace lamina {

// v = input + residual; out = v normalised over its last normalized_shape.size() dimensions; sum = v.
// input [..., normalized_shape] and residual of the same shape: float32 or bfloat16 each, any strides.
// weight, bias [normalized_shape]: float32 or bfloat16, any strides; null for ones, zeros.
// out, sum: of input's shape, contiguous; bfloat16 when input and residual both are, else float32.
struct NormRows {
  const char* op;
  bool centred;  // subtract the mean
  const TensorView& input;
  const std::vector<int64_t>& normalized_shape;
  const std::optional<TensorView>& weight;
  const std::optional<TensorView>& bias;
  double eps;
  const std::optional<TensorView>& residual;
  const TensorView& out;
  const std::optional<TensorView>& sum;
};

void norm_rows(const NormRows& call);

}  // namespace lamina
