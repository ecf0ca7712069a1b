// Contract of int8_conv: a convolution over int8 pixels in NHWC, addressed tap by tap, with the epilogue that turns
// exact int32 sums into the output.
//
//   y[pixel, n] = act(float(sum_taps,c x[pixel + tap, c] w[n, tap, c]) * scale[n] + bias[n] + residual[pixel, n] *
//                 residual_scale)
//   out = y, or round_half_even(y * out_inverse) clamped to [lowest, highest] (NaN gives lowest)
//
// In this order, each operation rounded once, without fused multiply-add: with activations none, relu and relu6 the
// bits are the same on every ISA. For an int8 output of these the caller folds 1 / out_scale into scale, bias and
// residual_scale and the activation into lowest and highest (`folded`); it has made sure that |y| < 2^30 then.
//
// Codes are signed, and rows outside the image are not computed at all: a tile goes through the rows of taps that it
// has. Columns outside must be there, as zeros.
//
// [NOTE] Weights. Panels of 32 channels one behind the other, each [taps_y][taps_x][length / 4][32][4]; the last panel
// of a group is 16 wide if that suffices, and padded with zeros. Where a tap's channels lie behind those of the tap
// before, the taps of one row are one run: taps_x is 1 and length covers them all. The bytes are the same.
#pragma once

#include "cpu/kernels/int8_gemm.h"

namespace lamina {

// Pixels [image][row][column] of channels that lie together; strides in elements.
struct ConvImages {
  void* data = nullptr;
  int64_t image = 0, row = 0, column = 0;
  EpilogueMatrix::Format format = EpilogueMatrix::f32;
};

struct ConvEpilogue {
  const float* scale;   // [channels], of image i at scale + i * image_scale; readable up to a multiple of 32
  int64_t image_scale;  // 0 where all images share their scale
  const float* bias;    // [channels], readable up to a multiple of 32
  ConvImages residual;
  float residual_scale;  // for int8
  Activation activation;
  ConvImages out;
  bool folded;
  float out_inverse;
  float lowest, highest;  // of an int8 output
};

struct Int8ConvArgs {
  const int8_t* x;      // the channel 0 of image 0 under tap (0, 0) of output column 0, in image row 0
  int64_t image, row;   // bytes between images and between rows of an image
  int64_t column;       // bytes between the pixels of neighbouring outputs of a row
  int64_t height;       // rows of an image
  int stride_y, pad_y;  // output row y has tap row t in image row y * stride_y - pad_y + t * dilation_y
  int dilation_y;
  int taps_y, taps_x;
  int64_t tap_x;   // bytes between taps of a row
  int64_t length;  // bytes of a tap, a multiple of 4
  // A kernel may leave out the taps of a row that see nothing but padding. `edge`: bytes of each of the three taps that
  // a run consists of, or 0 where nothing may be left out; the first output column does not need the first of them if
  // left_edge, the last column not the last if right_edge.
  int64_t edge;
  bool left_edge, right_edge;
  int64_t out_height, out_width;
  int64_t row_begin, row_end;  // output rows to compute, counted through all images
  const int8_t* panels;
  int64_t channels;
  const int32_t* compensation;  // [taps_y][ld_compensation]: 128 sum w over the taps of a row
  int64_t ld_compensation;
  ConvEpilogue end;
};

extern const KernelTable<void(const Int8ConvArgs&)> int8_conv_table;

}  // namespace lamina
