// Gradients of scaled dot product attention. See cpu/kernels/attention_backward.h for the formulas.
#pragma once

#include <optional>

#include "ops/attention.h"
#include "ops/tensor.h"

namespace lamina {

// Outputs. query, key and value have the inputs' dtype and shape and a contiguous last dimension. The others are "of
// floats" (see AttentionOptions), shaped like what they are the gradient of, and only there if they are wanted; the
// mask's is given as zeros.
struct AttentionGradients {
  TensorView query, key, value;
  std::optional<TensorView> mask, alibi_slopes, sinks;
};

// Inputs and options as the forward takes them, with any strides; out [B, Hq, L, Dv] and lse [B, Hq, L] are what it
// gave, grad_out and grad_lse their gradients. options.lse is not used.
void attention_backward(const TensorView& grad_out, const TensorView& query, const TensorView& key,
                        const TensorView& value, const TensorView& out, const TensorView& lse,
                        const std::optional<TensorView>& grad_lse, const std::optional<TensorView>& mask,
                        const AttentionOptions& options, const AttentionGradients& gradients);

}  // namespace lamina
