// Contract of int8_pool: the largest code, or the mean, of each channel over a window of pixels in NHWC.
#pragma once

#include "cpu/kernels/int8_conv.h"
#include "cpu/kernels/pool_window.h"

namespace lamina {

struct Int8PoolArgs {
  ConvImages x;  // int8
  ConvImages out;
  bool largest;                      // else the mean
  const PoolWindow *rows, *columns;  // of each output row and column
  int step_y, step_x;
  int64_t out_height, out_width;
  int64_t row_begin, row_end;  // output rows to compute, counted through all images
  int64_t channels;
  int divisor;   // of all windows; 0: the windows' own
  float factor;  // mean: out = float(sum) * (factor / divisor), int8 rounded half to even, clamped to [-127, 127]
};

extern const KernelTable<void(const Int8PoolArgs&)> int8_pool_table;

}  // namespace lamina
