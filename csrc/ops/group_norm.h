// Group norm, (x - mean) / sqrt(variance + eps) * weight + bias over groups of channels, and an activation.
#pragma once

#include <optional>
#include <string>

#include "ops/tensor.h"

namespace lamina {

// x [N, C, ...] float32 or bfloat16, any strides; num_groups divides C. weight, bias [C]: float32 or bfloat16, any
// strides; null for ones, zeros. out: of x's shape and dtype, any strides; it may be x. Activation names as in
// ops/epilogue.cpp. Read where it lies if the pixels of a channel, or the channels of a pixel, are adjacent in x and
// out.
void group_norm(const TensorView& x, int64_t num_groups, const std::optional<TensorView>& weight,
                const std::optional<TensorView>& bias, double eps, const std::string& activation,
                const TensorView& out);

}  // namespace lamina
