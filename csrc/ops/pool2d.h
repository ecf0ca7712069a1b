// Pooling of images: the largest value of a window, or its mean.
#pragma once

#include <string>
#include <vector>

#include "ops/tensor.h"

namespace lamina {

// x [images, channels, height, width] float32 or bfloat16, any strides -> out [images, channels, ...] of its dtype, any
// strides; fast where channels or columns are adjacent in both. kind "max", "avg" or "adaptive_avg". Windows as torch
// defines them, all lists of two numbers, as many as out has room for; adaptive: `kernel` is the output's size.
// divisor: 0 for the windows' own.
void pool2d(const TensorView& x, const std::string& kind, const std::vector<int64_t>& kernel,
            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, bool count_include_pad, int64_t divisor, const TensorView& out);

}  // namespace lamina
