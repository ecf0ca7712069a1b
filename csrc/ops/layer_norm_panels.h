// Layer norm of panels of tokens (see ops/token_panels.h), and the codes of what comes out for the layer behind it.
#pragma once

#include <optional>

#include "ops/tensor.h"
#include "ops/workspace.h"

namespace lamina {

// The norm of single panels, for ops that have one in their cache.
struct PanelNorm {
  const float *weight, *bias;  // [features] or null
  int64_t features;
  float eps;

  // x [features][32] -> out, which may be x, and the bits of each token's max |out|.
  void apply(const float* x, float* out, int32_t* largest) const;
};

// Its parameters, checked; converted ones live in `frame`.
PanelNorm panel_norm(const char* op, const std::optional<TensorView>& weight, const std::optional<TensorView>& bias,
                     double eps, int64_t features, WorkspaceFrame& frame);

// input [panels, features, 32], any distance from panel to panel; weight, bias [features] float32 or bfloat16, null for
// ones and zeros -> out, of input's shape and contiguous, and where they are given its codes and scales.
void layer_norm_panels(const TensorView& input, const std::optional<TensorView>& weight,
                       const std::optional<TensorView>& bias, double eps, const TensorView& out,
                       const std::optional<TensorView>& codes, const std::optional<TensorView>& scales);

}  // namespace lamina
