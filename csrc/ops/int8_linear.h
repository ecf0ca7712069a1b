// A linear layer with int8 weights: activations are quantized per row on the way in, sums are exact, and scale, bias
// and activation are applied on the way out. See cpu/kernels/int8_gemm.h for the formula.
#pragma once

#include <optional>
#include <string>

#include "ops/tensor.h"

namespace lamina {

// Bytes of the packed form of an int8 weight [n, k]: panels of 64 channels, [k / 4][channels][4], the last panel
// narrower (a multiple of 16), k padded to a multiple of 4, and one zero byte behind them for each padded k.
int64_t int8_linear_packed_size(int64_t n, int64_t k);

// weight [n, k] int8 in [-127, 127], scale [n] float32 -> data [packed_size] int8, compensation [n rounded up to 16]
// int32 (see [NOTE] s8s8 compensation in cpu/kernels/int8_gemm.h). Refuses scales that are not finite.
void int8_linear_pack(const TensorView& weight, const TensorView& scale, const TensorView& data,
                      const TensorView& compensation);

// The inverse: data -> weight [n, k].
void int8_linear_unpack(const TensorView& data, const TensorView& weight);

// x [m, k]: float32 or bfloat16 of any strides, quantized per row or with the one x_scale []; or int8 codes with
// x_scale [] or [m]. scale [n] float32; bias [n] float32 or bfloat16; residual [m, n] float32 or bfloat16, rows
// contiguous, added before the activation. out [m, n] float32 or bfloat16, or int8 codes y / out_scale with an
// out_scale
// []; rows contiguous. Scales are float32. activation: "none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu",
// "tanh".
void int8_linear(const TensorView& x, const TensorView& data, const TensorView& scale, const TensorView& compensation,
                 const std::optional<TensorView>& bias, const std::string& activation,
                 const std::optional<TensorView>& residual, const std::optional<TensorView>& x_scale,
                 const std::optional<TensorView>& out_scale, const TensorView& out);

}  // namespace lamina
