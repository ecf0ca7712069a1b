// Contract of conv_pool: the last step of a convolution that is pooled, or whose output is not NHWC.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

// Rows of float32 NHWC -> their maximum or mean over windows, or just themselves (1 x 1), in any strides.
struct ConvPoolArgs {
  const float* x;  // row 0 of the band
  int64_t x_row, x_pixel;
  int64_t first, height;      // rows of the band: the first one's place in the image, and how many there are
  int64_t columns, channels;  // of the image
  bool max;                   // else the mean, which counts padding as zeros
  int window_h, window_w, stride_h, stride_w, pad_h, pad_w;
  int64_t first_row, rows, out_columns;  // of the output
  void* out;                             // of its row `first_row`
  bool out_is_bf16;
  int64_t out_row, out_pixel, out_channel;
};

extern const KernelTable<void(const ConvPoolArgs&)> conv_pool_table;

}  // namespace lamina
