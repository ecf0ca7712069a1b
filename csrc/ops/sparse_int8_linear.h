// A linear layer with a block-sparse int8 weight: int8_linear where only the blocks with a nonzero weight are stored
// and multiplied. Its outputs are the bits that int8_linear gives for the dense weight. See ops/sparse_format.h
// for how blocks lie.
#pragma once

#include <optional>
#include <string>

#include "ops/tensor.h"

namespace lamina {

// Bytes of the packed form of weight [n, k] int8; pattern is "1x4", "2x4" or "4x4": output channels x inputs of a
// block.
int64_t sparse_int8_linear_packed_size(const TensorView& weight, const std::string& pattern);

// weight [n, k] int8 in [-127, 127], scale [n] float32 -> data [packed_size] uint8, compensation [n rounded up to 16]
// int32 (see [NOTE] s8s8 compensation in cpu/kernels/int8_gemm.h). Refuses scales that are not finite.
void sparse_int8_linear_pack(const TensorView& weight, const TensorView& scale, const std::string& pattern,
                             const TensorView& data, const TensorView& compensation);

// The inverse: data -> weight [n, k].
void sparse_int8_linear_unpack(const TensorView& data, const TensorView& weight);

// Operands as in int8_linear, with data from sparse_int8_linear_pack. FormatError says why data is not.
void sparse_int8_linear(const TensorView& x, const TensorView& data, const TensorView& scale,
                        const TensorView& compensation, const std::optional<TensorView>& bias,
                        const std::string& activation, const std::optional<TensorView>& residual,
                        const std::optional<TensorView>& x_scale, const std::optional<TensorView>& out_scale,
                        const TensorView& out);

// The same from panels of tokens to panels (see ops/token_panels.h), for the layers of a chain: x_codes and x_scales
// are those of panels of k features; bias [n] float32 or bfloat16; residual panels [panels, n, 32], any distance from
// panel to panel. out [panels, n, 32], contiguous, or null where only its codes and scales are asked for. Each token's
// numbers are those that the rows give.
void sparse_int8_linear_panels(const TensorView& x_codes, const TensorView& x_scales, const TensorView& data,
                               const TensorView& scale, const TensorView& compensation,
                               const std::optional<TensorView>& bias, const std::string& activation,
                               const std::optional<TensorView>& residual, const std::optional<TensorView>& norm_weight,
                               const std::optional<TensorView>& norm_bias, std::optional<double> norm_eps,
                               const std::optional<TensorView>& out, const std::optional<TensorView>& codes,
                               const std::optional<TensorView>& scales);

}  // namespace lamina
