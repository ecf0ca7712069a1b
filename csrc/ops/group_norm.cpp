#include "ops/group_norm.h"

#include <algorithm>

#include "cpu/kernels/group_norm.h"
#include "cpu/tuning/group_norm.h"
#include "ops/checks.h"
#include "ops/epilogue.h"
#include "ops/loops.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const GroupNormArgs<float>&)> group_norm_f32_table;
constinit const KernelTable<void(const GroupNormArgs<bf16>&)> group_norm_bf16_table;

namespace {

constexpr const char* kOp = "group_norm";

const float* channel_floats(const char* what, const std::optional<TensorView>& t, int64_t channels,
                            WorkspaceFrame& frame) {
  if (!t) return nullptr;
  check_dtype(kOp, what, *t, {DType::float32, DType::bfloat16});
  check_shape(kOp, what, *t, {channels});
  return float_bias(kOp, *t, channels, frame);
}

template <class T>
void run(const TensorView& x, const TensorView& out, GroupNormArgs<T> all, int64_t num_groups,
         void (*kernel)(const GroupNormArgs<T>&)) {
  Loops<2> pixels;
  for (int i = 2; i < x.ndim; ++i) pixels.add(x.shape[i], {x.strides[i], out.strides[i]});
  const int64_t images = x.shape[0], channels = x.shape[1], group_channels = channels / num_groups;
  all.x_channel = channels > 1 ? x.strides[1] : 1;
  all.out_channel = channels > 1 ? out.strides[1] : 1;
  all.x_pixel = pixels.step(0);
  all.out_pixel = pixels.step(1);
  all.group_channels = group_channels;
  all.pixels = pixels.total();
  const bool even = pixels.count() <= 1;
  const bool planes = even && all.x_pixel == 1 && all.out_pixel == 1;
  all.channels_last = !planes && even && all.x_channel == 1 && all.out_channel == 1;
  const bool in_place = planes || all.channels_last;

  const int64_t work = group_channels * all.pixels;
  const int64_t grain = std::max<int64_t>(1, tuning::kGroupNormWorkPerThread / work);
  parallel_ranges(images * num_groups, grain, [&](int64_t begin, int64_t end) {
    WorkspaceFrame frame;
    GroupNormArgs<T> args = all;
    const int64_t most = std::min(in_place ? end - begin : 1, num_groups);
    args.scratch = frame.take<float>(size_t(3 * most * group_channels));
    T* copy = in_place ? nullptr : frame.take<T>(size_t(work));
    for (int64_t i = begin; i < end; i += args.groups) {
      const int64_t image = i / num_groups, group = i % num_groups, first = group * group_channels;
      args.groups = std::min({most, num_groups - group, end - i});
      args.x = x.as<const T>() + image * x.strides[0] + first * all.x_channel;
      args.out = out.as<T>() + image * out.strides[0] + first * all.out_channel;
      args.weight = all.weight ? all.weight + first : nullptr;
      args.bias = all.bias ? all.bias + first : nullptr;
      if (in_place) {
        kernel(args);
        continue;
      }
      // Brought together, normalised there, and taken to where it belongs.
      const T* from = args.x;
      T* to = args.out;
      for (int64_t c = 0; c < group_channels; ++c) {
        T* plane = copy + c * all.pixels;
        pixels.pieces(0, all.pixels, [&](const int64_t (&at)[2], int64_t count) {
          const T* piece = from + c * all.x_channel + at[0];
          for (int64_t k = 0; k < count; ++k) *plane++ = piece[k * all.x_pixel];
        });
      }
      args.x = args.out = copy;
      args.x_channel = args.out_channel = all.pixels;
      args.x_pixel = args.out_pixel = 1;
      kernel(args);
      for (int64_t c = 0; c < group_channels; ++c) {
        const T* plane = copy + c * all.pixels;
        pixels.pieces(0, all.pixels, [&](const int64_t (&at)[2], int64_t count) {
          T* piece = to + c * all.out_channel + at[1];
          for (int64_t k = 0; k < count; ++k) piece[k * all.out_pixel] = *plane++;
        });
      }
    }
  });
}

template <class T>
GroupNormArgs<T> common_args(const float* weight, const float* bias, double eps, Activation activation) {
  GroupNormArgs<T> args = {};
  args.weight = weight;
  args.bias = bias;
  args.eps = float(eps);
  args.activation = activation;
  return args;
}

}  // namespace

void group_norm(const TensorView& x, int64_t num_groups, const std::optional<TensorView>& weight,
                const std::optional<TensorView>& bias, double eps, const std::string& activation,
                const TensorView& out) {
  check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  check_dimensions(kOp, "x", x);
  check(x.ndim >= 2, kOp, "x is ", describe(x), ", but must be [N, C, ...]");
  check(num_groups > 0 && x.shape[1] % num_groups == 0, kOp, "num_groups is ", num_groups,
        ", but must divide the channels of ", describe(x));
  check(out.dtype == x.dtype && out.ndim == x.ndim && std::equal(x.shape, x.shape + x.ndim, out.shape), kOp, "out is ",
        describe(out), ", but must be ", describe(x));
  const Activation act = parse_activation(kOp, activation);
  WorkspaceFrame frame;
  const float* weights = channel_floats("weight", weight, x.shape[1], frame);
  const float* biases = channel_floats("bias", bias, x.shape[1], frame);
  if (x.numel() == 0) return;
  if (x.dtype == DType::float32) {
    run(x, out, common_args<float>(weights, biases, eps, act), num_groups, group_norm_f32_table.get());
  } else {
    run(x, out, common_args<bf16>(weights, biases, eps, act), num_groups, group_norm_bf16_table.get());
  }
}

}  // namespace lamina
