// A convolution whose weight is mostly zeros, of images with their channels together: each output pixel is a row of a
// sparse linear layer over the kernel's window, [ky, kx, c].
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/tensor.h"

namespace lamina {

// x [images, C, H, W] float32 or bfloat16, adjacent channels, any other strides; data: a weight [N, kh kw C] as
// sparse_linear_pack packs it; geometry: kernel[2], stride[2], dilation[2], padding[top, bottom, left, right]; bias
// [N]; out [images, N, H', W'] of x's dtype, channels_last.
void sparse_conv2d(const TensorView& x, const TensorView& data, const std::optional<TensorView>& bias,
                   const std::vector<int64_t>& geometry, const std::string& activation, const TensorView& out);

}  // namespace lamina
