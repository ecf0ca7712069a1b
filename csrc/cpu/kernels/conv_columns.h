// Contract of conv_columns: an image whose pixels are adjacent (NCHW), for fewer output channels than a register has
// lanes. The columns of a row lie in the lanes instead.
#pragma once

#include "cpu/kernels/conv_output.h"

namespace lamina {

// The window of a pool; the mean counts padding as zeros.
struct ConvColumnsPool {
  bool max;
  int window_h, window_w, stride_h, stride_w, pad_h, pad_w;
  int64_t first_row, rows, out_columns;  // of the pool's output
};

// Rows of one image, column stride 1, padded beforehand.
struct ConvColumnsArgs {
  const float* x;  // channel 0 under tap (0, 0) of the first output; readable up to a multiple of 32 columns and taps
  int64_t x_channel, x_row;
  int64_t channels;
  int taps_y, taps_x, stride_y, dilation_y, dilation_x;
  const float* weights;  // [(ky, kx, c)][width]
  int64_t width;
  const float* bias;  // or null
  int64_t out_channels;
  Activation activation;
  int64_t first, rows, columns;  // of the convolution; the first one's place in the image
  const ConvColumnsPool* pool;   // or null
  float* out;                    // of the output's first row
  int64_t out_channel, out_row;
  float* scratch;  // with a pool: conv_columns_scratch floats
};

// Output channels that go through the kernel together: with two registers of columns twelve sums, which is what
// sixteen registers hold beside two of pixels and a weight.
inline constexpr int kConvColumnsChannels = 6;

// Those channels of the band, and a row between the padding of the pool's columns.
inline int64_t conv_columns_scratch(int64_t rows, int64_t columns, int64_t pad_w, int64_t window_w) {
  const int64_t whole = (columns + 31) / 32 * 32;
  return kConvColumnsChannels * rows * whole + whole + pad_w + window_w + 32;
}

extern const KernelTable<void(const ConvColumnsArgs&)> conv_columns_table;

}  // namespace lamina
