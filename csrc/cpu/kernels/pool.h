// Contract of pool: the largest value, or the mean, of each channel over a window of pixels.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/dtype.h"
#include "cpu/kernels/pool_window.h"

namespace lamina {

struct PoolImages {
  void* data;
  int64_t image, channel, row, column;  // strides, in elements
};

struct PoolArgs {
  PoolImages x, out;
  bool bfloat16;                     // both; else float32
  bool largest;                      // else the mean
  bool channels_adjacent;            // of x and out: a task is an output row of an image; else of one channel of it
  const PoolWindow *rows, *columns;  // of each output row and column
  int step_y, step_x;
  int64_t channels, width;
  int64_t out_height, out_width;
  int64_t begin, end;  // tasks: output rows counted through all images, and their channels
  int divisor;         // of all windows; 0: the windows' own
  // Where channels are not adjacent: windows begin at stride_x i - left and have `taps` columns each, inside the image
  // or not; stride_x 0: they are adaptive, with step_x 1. divisors: of each column, as floats.
  int64_t stride_x, left, taps;
  const float* divisors;
  float* line;  // line_size floats
  int64_t line_size;
};

// A row of the image between what windows have of it on both sides, and what vectors read behind the end.
constexpr int64_t pool_line_size(int64_t width, int64_t out_width, int64_t stride_x, int64_t left, int64_t taps,
                                 int64_t step_x) {
  const int64_t reach = (out_width + 32) * stride_x + (taps - 1) * step_x + 32, own = left + width + 32;
  return reach > own ? reach : own;
}

extern const KernelTable<void(const PoolArgs&)> pool_table;

}  // namespace lamina
