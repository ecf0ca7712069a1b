// Group norm of one image: (x - mean) / sqrt(variance + eps) * weight + bias over groups of channels, then an
// activation.
//
// Sums are taken channel by channel, in the order of ordered_totals.h, and join in float64 over the channels of a
// group: the same bits for channels_first and channels_last, and no register that crosses groups of a few channels is
// a special case.
//
// Both sums are of distances: first from some element of the group, which gives a mean that is good at any offset from
// zero, then, squared, from the mean (in a second pass over what is by then in cache; E[x^2] - E[x]^2 would cancel).
// The mean is rounded to float32; what that leaves out is known from float64 and taken out of variance and bias. The
// result is (x - mean) * scale + bias, not x * scale + (bias - mean * scale), which cancels as well.
#include "cpu/kernels/group_norm.h"

#include "cpu/kernels/ordered_totals.h"
#include "cpu/vec/activate.h"

namespace lamina::LAMINA_ISA {
namespace {

// Pixels of channels_last that share a load of mean, scale and bias.
constexpr int kPixels = 4;

LAMINA_INLINE float widened(float x) { return x; }
LAMINA_INLINE float widened(bf16 x) { return bf16_to_float(x); }

// Sums over the pixels of each channel of the distances from its centre, or of their squares.
template <class Op, class T>
LAMINA_INLINE void sum_channels(const GroupNormArgs<T>& a, const float* centre, float* to) {
  const int64_t channels = a.groups * a.group_channels, x_channel = a.x_channel;
  int64_t c = 0;
  if (!a.channels_last) {
    for (; c < channels; c += kLanes) {
      const int count = int(smaller(kLanes, channels - c));
      const T* x = a.x + c * x_channel;
      const auto element = [=](int row, int64_t, int64_t i, int some) __attribute__((always_inline)) {
        return load_up_to(x + row * x_channel + i, some) - set1(centre[c + row]);
      };
      store_up_to(to + c, totals_of_rows<Op>(count, 1, a.pixels, element), count);
    }
    return;
  }
  constexpr int kTogether = 4;  // with their centres, they leave room in the registers
  for (; c + kTogether * kLanes <= channels; c += kTogether * kLanes) {
    F32 from[kTogether], sums[kTogether];
    LAMINA_UNROLL
    for (int k = 0; k < kTogether; ++k) from[k] = load(centre + c + k * kLanes);
    const auto element = [&](const T* p, int k) __attribute__((always_inline)) { return load(p) - from[k]; };
    totals_of_columns<Op>(a.x + c, 1, 0, a.pixels, a.x_pixel, element, sums);
    LAMINA_UNROLL
    for (int k = 0; k < kTogether; ++k) store(to + c + k * kLanes, sums[k]);
  }
  for (; c < channels; c += kLanes) {
    const int count = int(smaller(kLanes, channels - c));
    const F32 from = load_up_to(centre + c, count);
    F32 sums[1];
    if (count == kLanes) {
      const auto element = [=](const T* p, int) __attribute__((always_inline)) { return load(p) - from; };
      totals_of_columns<Op>(a.x + c, 1, 0, a.pixels, a.x_pixel, element, sums);
    } else {
      const auto element = [=](const T* p, int) __attribute__((always_inline)) { return load_n(p, count) - from; };
      totals_of_columns<Op>(a.x + c, 1, 0, a.pixels, a.x_pixel, element, sums);
    }
    store_up_to(to + c, sums[0], count);
  }
}

// out = activation((x - mean) * scale + shift), each of one number per channel.
template <Activation kActivation, class T>
LAMINA_INLINE void scale_channels(const GroupNormArgs<T>& a, const float* mean, const float* scale,
                                  const float* shift) {
  const int64_t channels = a.groups * a.group_channels;
  if (!a.channels_last) {
    for (int64_t c = 0; c < channels; ++c) {
      const T* x = a.x + c * a.x_channel;
      T* out = a.out + c * a.out_channel;
      const F32 m = set1(mean[c]), s = set1(scale[c]), b = set1(shift[c]);
      int64_t i = 0;
      for (; i + kLanes <= a.pixels; i += kLanes) store(out + i, activate<kActivation>(fmadd(load(x + i) - m, s, b)));
      const int count = int(a.pixels - i);
      if (count > 0) store_n(out + i, activate<kActivation>(fmadd(load_n(x + i, count) - m, s, b)), count);
    }
    return;
  }
  for (int64_t first = 0; first < a.pixels; first += kPixels) {
    const int some = int(smaller(kPixels, a.pixels - first));
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int count = int(smaller(kLanes, channels - c));
      const F32 m = load_up_to(mean + c, count), s = load_up_to(scale + c, count), b = load_up_to(shift + c, count);
      for (int p = 0; p < some; ++p) {
        const F32 v = load_up_to(a.x + (first + p) * a.x_pixel + c, count);
        store_up_to(a.out + (first + p) * a.out_pixel + c, activate<kActivation>(fmadd(v - m, s, b)), count);
      }
    }
  }
}

template <class T>
LAMINA_INLINE void group_norm(const GroupNormArgs<T>& a) {
  const int64_t n = a.group_channels, channels = a.groups * n;
  const double one_of_all = 1.0 / (double(n) * double(a.pixels));
  float *mean = a.scratch, *scale = mean + channels, *shift = scale + channels;
  const auto average = [&](const float* sums) __attribute__((always_inline)) {
    double total = 0;
    for (int64_t c = 0; c < n; ++c) total += double(sums[c]);
    return total * one_of_all;
  };
  for (int64_t c = 0; c < channels; c += n) {
    const float some = widened(a.x[c * a.x_channel]);
    for (int64_t i = c; i < c + n; ++i) mean[i] = some;
  }
  sum_channels<Sum>(a, mean, scale);
  for (int64_t c = 0; c < channels; c += n) {
    const double exact = double(mean[c]) + average(scale + c);
    const float rounded = float(exact), rest = float(exact - double(rounded));
    for (int64_t i = c; i < c + n; ++i) {
      mean[i] = rounded;
      shift[i] = rest;
    }
  }
  sum_channels<SumOfSquares>(a, mean, scale);
  for (int64_t c = 0; c < channels; c += n) {
    const float rest = shift[c];
    const double variance = average(scale + c) - double(rest) * double(rest);
    // max(0, .) by a comparison that a NaN fails, so that it stays.
    const float of_group = 1.0f / __builtin_sqrtf(float(variance < 0 ? 0 : variance) + a.eps);
    for (int64_t i = c; i < c + n; ++i) {
      scale[i] = a.weight ? of_group * a.weight[i] : of_group;
      shift[i] = (a.bias ? a.bias[i] : 0.0f) - rest * scale[i];
    }
  }
  with_activation(a.activation, [&]<Activation kActivation>() __attribute__((always_inline)) {
    scale_channels<kActivation>(a, mean, scale, shift);
  });
}

void group_norm_f32(const GroupNormArgs<float>& a) { group_norm(a); }
void group_norm_bf16(const GroupNormArgs<bf16>& a) { group_norm(a); }

REGISTER_KERNEL(group_norm_f32_table, group_norm_f32);
REGISTER_KERNEL(group_norm_bf16_table, group_norm_bf16);

}  // namespace
}  // namespace lamina::LAMINA_ISA
