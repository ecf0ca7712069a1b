// A linear layer whose weights alone are quantized: int8 with a scale per output channel, or int4 with a scale for each
// group of inputs of a channel. For decoding, where reading the weights is what takes the time.
// See cpu/kernels/weight_only_gemm.h for the formulas and the layouts.
#pragma once

#include <optional>
#include <string>

#include "ops/tensor.h"

namespace lamina {

// Bytes of the packed form of an int4 weight [n, k]: slices of 16 channels, k padded to a multiple of 32, and one zero
// byte behind them for each padded k. The group is a multiple of 32; the last one may be shorter.
int64_t weight_only_linear_packed_size(int64_t n, int64_t k, int64_t group);

// codes [n, k] int8 in [-8, 7], scale [n, ceil(k / group)] bfloat16 -> data [packed_size] uint8. Refuses scales that
// are not finite.
void weight_only_linear_pack(const TensorView& codes, const TensorView& scale, int64_t group, const TensorView& data);

// The inverse: data -> codes [n, k], scale [n, ceil(k / group)].
void weight_only_linear_unpack(const TensorView& data, int64_t group, const TensorView& codes, const TensorView& scale);

// x [m, k] float32 or bfloat16, any strides; bias [n] float32 or bfloat16; out [m, n] of x's dtype, rows contiguous;
// activation as in int8_linear.
// int8: group is 0, and data int8, scale [n] float32 and compensation int32 come from int8_linear_pack.
// int4: data uint8 from weight_only_linear_pack with this group; no scale, no compensation.
void weight_only_linear(const TensorView& x, const TensorView& data, const std::optional<TensorView>& scale,
                        const std::optional<TensorView>& compensation, const std::optional<TensorView>& bias,
                        int64_t group, const std::string& activation, const TensorView& out);

}  // namespace lamina
