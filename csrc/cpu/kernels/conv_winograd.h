// Contract of conv_winograd: 3 x 3 kernels by Winograd's minimal filtering.
#pragma once

#include "cpu/kernels/conv_output.h"

namespace lamina {

// Part of one image by Winograd's minimal filtering, F(2x2, 3x3) or F(4x4, 3x3): 3 x 3, stride 1, no dilation.
struct ConvWinogradArgs {
  int tile;        // 2 or 4 outputs a side
  const float* x;  // [height, width, channels]; pixels outside are zeros
  int64_t x_row, x_pixel;
  int64_t height, width, channels;
  int64_t pad_top, pad_left;  // of the first output row and column
  const float* weights;       // [(tile + 2)^2][panels]
  int64_t out_channels;
  int64_t first_channel, end_channel;  // multiples of kConvPanel, or the end
  int64_t rows, columns;               // of the output
  ConvOutput to;
  float* scratch;  // conv_winograd_scratch() floats
};

extern const KernelTable<void(const ConvWinogradArgs&)> conv_winograd_table;

// Tiles that are transformed together: their inputs and products of all points stay in L2 up to 64 channels, and 28 is
// two tiles of 14 rows for the matrix product.
inline constexpr int kWinogradBlock = 28;

static inline int64_t conv_winograd_row(int64_t channels) { return (channels + 15) / 16 * 16 + 16; }

static inline int64_t conv_winograd_scratch(int tile, int64_t channels, int64_t out_channels) {
  const int64_t points = (tile + 2) * (tile + 2);
  return points * (kWinogradBlock * (conv_winograd_row(channels) + conv_winograd_row(out_channels)) + 32);
}

}  // namespace lamina
