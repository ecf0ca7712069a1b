// What the float32 convolution kernels agree on. Images are NHWC: channels are adjacent, and sums are float32.
//
//   y[p, n] = act(bias[n] + sum_{tap, c} x[p + tap, c] w[n, tap, c] + residual[p, n])
//
// Weights come in panels of 32 output channels, [panel][k][32] with k = (tap, c); the last panel of a group is 16 wide
// where 16 hold the rest. Channels behind the last are zeros and are not stored.
#pragma once

#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

inline constexpr int kConvPanel = 32;

inline constexpr int64_t conv_panel_floats(int64_t channels) { return (channels + 15) / 16 * 16; }

static inline int64_t conv_panels(int64_t channels) { return (channels + kConvPanel - 1) / kConvPanel; }

// Where finished pixels go, and what joins them on the way.
struct ConvOutput {
  const float* bias;  // [output channels] or null
  const void* residual;
  int64_t residual_row, residual_pixel;  // in elements; channels are adjacent
  bool residual_is_bf16;
  void* out;
  int64_t out_row, out_pixel;
  bool out_is_bf16;
  Activation activation;
};

}  // namespace lamina
