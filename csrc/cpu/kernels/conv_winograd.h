// Contract of conv_winograd: 3 x 3 kernels by Winograd's minimal filtering.
#pragma once

#include "cpu/kernels/conv_output.h"

namespace lamina {

// Some tiles of some images by Winograd's minimal filtering, F(2x2, 3x3) or F(4x4, 3x3): 3 x 3, stride 1, no dilation.
struct ConvWinogradArgs {
  int tile;        // 2 or 4 outputs a side
  const float* x;  // [images][height, width, channels]; pixels outside are zeros
  int64_t x_image, x_row, x_pixel;
  int64_t height, width, channels;
  int64_t pad_top, pad_left;           // of the first output row and column
  const float* weights;                // [outputs / 16][tile + 2][channels / 16][tile + 2][16][16 outputs]
  int64_t first_channel, end_channel;  // multiples of 16, or the end
  int64_t rows, columns;               // of the output of an image
  int64_t first_tile, end_tile;        // of all images, in the order of the output
  bool far;                            // whether images are too large for caches: fetched ahead
  ConvOutput to;                       // of the first image
  int64_t out_image, residual_image;   // elements from an image to the next
  float* scratch;                      // conv_winograd_scratch() floats
};

extern const KernelTable<void(const ConvWinogradArgs&)> conv_winograd_table;

// Tiles that are transformed together, at most: four register tiles of 7. Up to 256 channels of F(2x2), or 128 of
// F(4x4), their inputs take half of an L2 of 1 MB, and weights that do not fit beside them are read once for all 28.
inline constexpr int kWinogradBlock = 28;

static inline int64_t conv_winograd_scratch(int tile, int64_t channels) {
  const int64_t side = tile + 2;
  return kWinogradBlock * 16 * side * (side * ((channels + 15) / 16) + tile);
}

}  // namespace lamina
