// Float convolution of images with bias, residual, activation and pooling in one pass:
//
//   y = act(conv(input, weight) + bias + residual), out = pool(y) if there is a pool
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/tensor.h"

namespace lamina {

// Sizes and steps, height before width: kernel[2], stride[2], dilation[2], padding[top, bottom, left, right], groups,
// outputs a side of a Winograd tile (2 or 4; 0 for the direct sum), and of the pool: window[2], stride[2], padding[2].
using Conv2dGeometry = std::vector<int64_t>;

// input [B, C, H, W], residual and out float32 or bfloat16, any strides, but adjacent channels in residual; weights as
// conv2d_pack gives them; bias [N]. `pool` is "none", "max" or "avg" (padding counts as zeros).
void conv2d(const TensorView& input, const TensorView& weights, const std::optional<TensorView>& bias,
            const std::optional<TensorView>& residual, const Conv2dGeometry& geometry, const std::string& activation,
            const std::string& pool, const TensorView& out);

// How many floats the packed weight of so many output channels takes, with the input channels of one group.
int64_t conv2d_packed_size(int64_t out_channels, int64_t group_inputs, const Conv2dGeometry& geometry);

// weight [N, C / groups, kh, kw] float32 or bfloat16 -> packed float32, flat; cpu/kernels/conv_*.h have the layouts.
void conv2d_pack(const TensorView& weight, const Conv2dGeometry& geometry, const TensorView& packed);

}  // namespace lamina
