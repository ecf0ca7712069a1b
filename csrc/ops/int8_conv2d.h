// A two-dimensional convolution with int8 weights over int8 or float pixels in NHWC: sums are exact; scale, bias,
// residual, activation and requantization are applied on the way out. See cpu/kernels/int8_conv.h for the formula.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/tensor.h"

namespace lamina {

// Bytes of the packed form of a weight of `size` [n, c, kh, kw], c channels of each of `groups` groups. One filter for
// each channel (c = 1, n = groups > 1) is packed as [kh * kw][n rounded up to 64], all else as said in
// cpu/kernels/int8_conv.h.
int64_t int8_conv2d_packed_size(const std::vector<int64_t>& size, int64_t groups);

// int32 values of its compensation. The last one says whether all sums are small enough for int8_winograd.
int64_t int8_conv2d_compensation_size(const std::vector<int64_t>& size, int64_t groups);

// weight [n, c, kh, kw] int8 in [-127, 127], scale [n] float32 -> data [packed_size] int8, compensation
// [compensation_size] int32. Refuses scales that are not finite.
void int8_conv2d_pack(const TensorView& weight, const TensorView& scale, int64_t groups, const TensorView& data,
                      const TensorView& compensation);

// The inverse: data -> weight [n, c, kh, kw].
void int8_conv2d_unpack(const TensorView& data, int64_t groups, const TensorView& weight);

// x [images, channels, height, width], in memory with the channels of a pixel or the columns of a row together: float32
// or bfloat16, quantized with the one x_scale [] or, without, with max |x| / 127 of each image; or int8 codes with
// x_scale [] or [images]. size: of the weight. padding: top, bottom, left, right. bias [n] float32 or bfloat16.
// residual: shape of out, channels together, float32, bfloat16 or int8 with residual_scale []. out [images, n, ...],
// channels together: float32, bfloat16, or int8 codes y / out_scale with an out_scale []. Scales are float32.
// activation: as int8_linear's.
void int8_conv2d(const TensorView& x, const TensorView& data, const TensorView& scale, const TensorView& compensation,
                 const std::vector<int64_t>& size, const std::optional<TensorView>& bias,
                 const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& dilation, int64_t groups, const std::string& activation,
                 const std::optional<TensorView>& residual, const std::optional<TensorView>& residual_scale,
                 const std::optional<TensorView>& x_scale, const std::optional<TensorView>& out_scale,
                 const TensorView& out);

}  // namespace lamina
