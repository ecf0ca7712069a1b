// Contract of int8_depthwise: a convolution in which every channel has a filter of its own, over int8 pixels in NHWC.
// The formula and the epilogue are int8_conv's.
#pragma once

#include "cpu/kernels/int8_conv.h"

namespace lamina {

struct Int8DepthwiseArgs {
  const int8_t* x;            // channel 0 of pixel 0 of image 0
  int64_t image, row, pixel;  // bytes between images, rows and pixels
  const int8_t* zeros;        // [channels], stands for a pixel outside the image
  int64_t height, width;      // of an image
  int stride_y, stride_x, pad_y, pad_x;
  int dilation_y, dilation_x;
  int taps_y, taps_x;
  int64_t out_height, out_width;
  int64_t row_begin, row_end;  // output rows to compute, counted through all images
  const int8_t* weights;       // [taps_y * taps_x][ld_weights], readable up to a multiple of 64 channels
  int64_t ld_weights;
  const int32_t* compensation;  // [channels]: 128 sum w; readable up to a multiple of 64
  int64_t channels;
  ConvEpilogue end;  // scale and bias readable up to a multiple of 64
  void* scratch;     // [depthwise_scratch] bytes at a multiple of 64
};

// Output columns and rows whose input a kernel may hold in scratch at a time.
constexpr int kDepthwiseColumns = 56, kDepthwiseRows = 4;

constexpr int64_t depthwise_scratch(int64_t taps_y, int64_t taps_x, int64_t stride_x, int64_t dilation_x) {
  const int64_t columns = (kDepthwiseColumns - 1) * stride_x + (taps_x - 1) * dilation_x + 1;
  return (taps_y + 3) / 4 * (kDepthwiseRows * taps_x + columns) * 256;
}

extern const KernelTable<void(const Int8DepthwiseArgs&)> int8_depthwise_table;

}  // namespace lamina
