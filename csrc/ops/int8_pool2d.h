// Pooling of int8 codes in NHWC: the largest code of a window, or its mean.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/tensor.h"

namespace lamina {

// x [images, channels, height, width] int8, the channels of a pixel together -> out [images, channels, ...], channels
// together. kind "max": int8. kind "avg" or "adaptive_avg": int8 or, with x_scale [], float32 or bfloat16; the codes
// of a mean are in steps of out_scale [] where both scales are given, else of x's. Windows as torch defines them, all
// lists of two numbers; adaptive: `kernel` is the output's size. divisor: 0 for the windows' own.
void int8_pool2d(const TensorView& x, const std::string& kind, const std::vector<int64_t>& kernel,
                 const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& dilation, bool count_include_pad, int64_t divisor,
                 const std::optional<TensorView>& x_scale, const std::optional<TensorView>& out_scale,
                 const TensorView& out);

}  // namespace lamina
