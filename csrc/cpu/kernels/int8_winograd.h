// Contract of int8_winograd: 3 x 3 kernels over int8 pixels by Winograd's minimal filtering F(4x4, 3x3), exactly.
//
// Tiles of 6 x 6 inputs and the weights are transformed, multiplied point by point, which is a matrix product over the
// channels for each of the 36 points, and transformed back to 4 x 4 outputs: 36 products where the direct sum takes
// 144. The formula and the epilogue are int8_conv's, and so is every bit of the result.
//
// [NOTE] Exactness. With the points 0, 1, -1, 2, -2 and infinity the transforms are integers once the factors 1/4,
// -1/6 and 1/24 are left out of the one of the weights: inputs grow to 100 * 128, weights to 49 * 127, which 16 bits
// hold. Sums and output transform are computed modulo 2^32, and give 9 y times 2^s with s up to 6. 9 has an inverse
// modulo 2^32, and an arithmetic shift takes 2^s away, so y is exact wherever |y| < 2^25.
//
// Three steps:
//
//   inputs    x -> [blocks of tiles][36 points][channels / 64][2][tiles][32] words. The words of a register are the
//             even bytes of a run of 64 channels, then the odd ones, so words side by side are channels c and c + 2.
//   weights   a panel of 32 outputs of int8_conv's packed weights -> [36 points][pairs of channels][32 outputs][2], in
//   that order of
//             channels. This takes a hundredth to a tenth of the products' time, less than reading 36 words for 9 bytes
//             from memory would; so the packed form stays what it is.
//   outputs   the products of a panel, and their way out.
#pragma once

#include "cpu/kernels/int8_conv.h"
#include "cpu/tuning/int8_winograd.h"

namespace lamina {

constexpr int kWinogradPoints = 36;
constexpr int kWinogradChunk = 64;  // channels of a run

// Some of the tiles of all images, which are counted in the order of the outputs.
struct Int8WinogradTiles {
  int64_t across, per_image;  // tiles of a row and of an image
  int64_t first, count;
  int64_t block;                  // tiles of a block; the last may have fewer
  int64_t channels;               // a multiple of 4
  int16_t* inputs;                // [winograd_input_words()]
  int64_t out_height, out_width;  // of an image
};

// Blocks of equal size, of one high tile of the product each.
constexpr int64_t winograd_block(int64_t tiles) {
  const int64_t blocks = (tiles + tuning::kInt8WinogradTiles - 1) / tuning::kInt8WinogradTiles;
  return (tiles + blocks - 1) / blocks;
}

// Words from one point to the next. A line more than it takes: else points lie a multiple of 4096 bytes apart and fight
// for the same sets of L1.
constexpr int64_t winograd_input_point(const Int8WinogradTiles& t) {
  return (t.channels + kWinogradChunk - 1) / kWinogradChunk * 2 * t.block * 32 + 32;
}
constexpr int64_t winograd_input_words(const Int8WinogradTiles& t) {
  return (t.count + t.block - 1) / t.block * kWinogradPoints * winograd_input_point(t);
}
constexpr int64_t winograd_weight_point(int64_t channels) { return channels * 32 + 32; }
constexpr int64_t winograd_product_point(int64_t block) { return block * 32 + 16; }

struct Int8WinogradInputArgs {
  Int8WinogradTiles tiles;
  const int8_t* x;            // pixel 0 of image 0
  int64_t image, row, pixel;  // bytes between images, rows and pixels
  int64_t height, width;
  int64_t pad_top, pad_left;
};

struct Int8WinogradWeightArgs {
  const int8_t* panel;  // of 32 outputs
  int64_t channels;
  int16_t* weights;  // [36 * winograd_weight_point()]
};

struct Int8WinogradOutputArgs {
  Int8WinogradTiles tiles;
  const int16_t* weights;
  int32_t* products;  // [36 * winograd_product_point()]
  ConvEpilogue end;   // of the panel
};

extern const KernelTable<void(const Int8WinogradInputArgs&)> int8_winograd_inputs_table;
extern const KernelTable<void(const Int8WinogradWeightArgs&)> int8_winograd_weights_table;
extern const KernelTable<void(const Int8WinogradOutputArgs&)> int8_winograd_outputs_table;

}  // namespace lamina
