#include "ops/layer_norm_panels.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels/norm_panel.h"
#include "cpu/tuning/norm_rows.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/token_panels.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const NormPanelArgs&)> norm_panel_table;

namespace {

constexpr const char* kOp = "layer_norm_panels";

// A weight or bias as contiguous float32, where it lies or copied to the workspace.
const float* as_floats(const char* op, const char* what, const std::optional<TensorView>& t, int64_t features,
                       WorkspaceFrame& frame) {
  if (!t) return nullptr;
  check_dtype(op, what, *t, {DType::float32, DType::bfloat16});
  check_shape(op, what, *t, {features});
  const bool is_float = t->dtype == DType::float32;
  if (is_float && t->is_contiguous()) return t->as<float>();
  float* copy = frame.take<float>(size_t(features));
  for (int64_t i = 0; i < features; ++i) {
    if (is_float) {
      copy[i] = t->as<float>()[i * t->stride(0)];
    } else {
      const uint32_t bits = uint32_t(t->as<bf16>()[i * t->stride(0)].bits) << 16;
      std::memcpy(copy + i, &bits, 4);
    }
  }
  return copy;
}

}  // namespace

void PanelNorm::apply(const float* x, float* out, int32_t* largest) const {
  norm_panel_table.get()(
      {.x = x, .weight = weight, .bias = bias, .features = features, .eps = eps, .out = out, .largest = largest});
}

PanelNorm panel_norm(const char* op, const std::optional<TensorView>& weight, const std::optional<TensorView>& bias,
                     double eps, int64_t features, WorkspaceFrame& frame) {
  return {as_floats(op, "weight", weight, features, frame), as_floats(op, "bias", bias, features, frame), features,
          float(eps)};
}

void layer_norm_panels(const TensorView& input, const std::optional<TensorView>& weight,
                       const std::optional<TensorView>& bias, double eps, const TensorView& out,
                       const std::optional<TensorView>& codes, const std::optional<TensorView>& scales) {
  check_panels(kOp, "input", input, -1, -1);
  const int64_t panels = input.size(0), features = input.size(1);
  check_panels(kOp, "out", out, panels, features);
  check_contiguous(kOp, "out", out);
  const auto to = panel_codes(kOp, codes, scales, panels, features);
  WorkspaceFrame frame;
  const PanelNorm norm = panel_norm(kOp, weight, bias, eps, features, frame);
  if (out.numel() == 0) return;
  norm_panel_table.get();
  const int64_t elements = features * kPanelTokens;
  parallel_ranges(panels, std::max<int64_t>(1, tuning::kNormWorkPerThread / elements), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      int32_t largest[kPanelTokens];
      float* normed = out.as<float>() + panel * elements;
      norm.apply(input.as<float>() + panel * input.stride(0), normed, largest);
      if (to) to->quantize(normed, panel, largest);
    }
  });
}

}  // namespace lamina
