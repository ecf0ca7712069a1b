// Contract of conv_pack: an image of any strides and float type to float32 NHWC with a border of zeros.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

// Rows of an image of any strides -> float32 NHWC between zeros.
struct ConvPackArgs {
  const void* x;  // of the first pixel that lies in the image
  bool is_bf16;
  int64_t x_row, x_pixel, x_channel;  // in elements
  int64_t rows, columns, channels;    // to copy
  float* to;                          // [top + rows + bottom][left + columns + right][to_pixel]
  int64_t to_row, to_pixel;
  int64_t top, bottom, left, right;
};

extern const KernelTable<void(const ConvPackArgs&)> conv_pack_table;

}  // namespace lamina
