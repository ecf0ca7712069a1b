// A float32 linear layer whose weight is packed once, with residual and activation in the same call.
// See cpu/kernels/linear_gemm.h for the formula and the order of its sums.
#pragma once

#include <optional>
#include <string>

#include "ops/tensor.h"

namespace lamina {

// weight [n, k] float32, any strides -> data [n rounded up to 16, k] float32: as many floats, in panels of 64 channels,
// [k][channels], the last panel narrower (a multiple of 16).
void linear_pack(const TensorView& weight, const TensorView& data);

// The inverse: data -> weight [n, k].
void linear_unpack(const TensorView& data, const TensorView& weight);

// x [m, k] float32 or bfloat16, any strides, rows of contiguous floats being read in place; bias [n] float32 or
// bfloat16; residual [m, n] float32 or bfloat16, rows contiguous, added before the activation; out [m, n] of x's dtype,
// rows contiguous. Sums are float32. activation as in int8_linear.
void linear(const TensorView& x, const TensorView& data, const std::optional<TensorView>& bias,
            const std::string& activation, const std::optional<TensorView>& residual, const TensorView& out);

}  // namespace lamina
