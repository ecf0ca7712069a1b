// Contract of group_norm: neighbouring channels of one image, normalised in groups, and an activation.
#pragma once

#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

// [groups * group_channels, pixels] of one image. Strides are in elements. Either the pixels of a channel are adjacent
// in x and in out, or, with `channels_last`, the channels of a pixel. out may be x where the strides are the same.
template <class T>
struct GroupNormArgs {
  const T* x;
  int64_t x_channel, x_pixel;
  T* out;
  int64_t out_channel, out_pixel;
  const float* weight;  // [groups * group_channels], or null for ones
  const float* bias;    // the same, or null for zeros
  int64_t groups, group_channels, pixels;
  bool channels_last;
  float eps;
  Activation activation;
  float* scratch;  // [3, groups * group_channels]
};

extern const KernelTable<void(const GroupNormArgs<float>&)> group_norm_f32_table;
extern const KernelTable<void(const GroupNormArgs<bf16>&)> group_norm_bf16_table;

}  // namespace lamina
