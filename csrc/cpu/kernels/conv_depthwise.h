// Contract of conv_depthwise: one input channel for each output channel, on an image that is padded beforehand.
#pragma once

#include "cpu/kernels/conv_output.h"

namespace lamina {

// Depthwise: output channel c sees input channel c alone. Weights [taps][channels rounded up to 16].
struct ConvDepthwiseArgs {
  const float* x;  // padded, as above
  int64_t x_row, x_pixel;
  int taps;
  const int64_t* tap_starts;
  const float* weights;
  int64_t channels, first_channel, end_channel;  // multiples of 16, or the end
  int64_t rows, columns;
  ConvOutput to;
};

extern const KernelTable<void(const ConvDepthwiseArgs&)> conv_depthwise_table;

}  // namespace lamina
