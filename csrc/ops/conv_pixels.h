// The input of an int8 convolution as its kernels want it: signed codes in NHWC, with columns of zeros on both sides.
// Rows outside an image need no memory. An input that is like that already is used where it lies.
#pragma once

#include "ops/tensor.h"
#include "ops/workspace.h"

namespace lamina {

// How the windows of a convolution lie over its input.
struct ConvWindow {
  int64_t stride_y, stride_x, top, left, right, dilation_y, dilation_x;
  int64_t kh, kw;
  int64_t out_height, out_width;
  bool quads;                // the kernel reads channels four at a time
  int64_t channels, groups;  // of a group
};

struct ConvPixels {
  const int8_t* codes;  // row 0 of image 0 under tap (0, 0) of output column 0
  int64_t image, row;   // bytes between images and rows
  int64_t pixel;        // bytes between pixels
  int64_t step;         // bytes between the first taps of neighbouring outputs
  bool run;             // the taps of a row lie one behind the other
  const int8_t* zeros;  // a pixel of zeros
  float* scales;        // [images], to be set by the caller where x is int8 with a scale per image
};

// x [images, channels, height, width]: int8 codes; or float32 or bfloat16, quantized with `scale`, or with max |x| /
// 127 of each image where it is 0. An image that holds NaN or infinity has a scale of NaN and codes of zero. In memory
// either the channels of a pixel or the columns of a row must lie together.
ConvPixels conv_pixels(const TensorView& x, float scale, const ConvWindow& window, WorkspaceFrame& frame);

}  // namespace lamina
