#include "ops/conv2d.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels/conv_columns.h"
#include "cpu/kernels/conv_depthwise.h"
#include "cpu/kernels/conv_direct.h"
#include "cpu/kernels/conv_pack.h"
#include "cpu/kernels/conv_pool.h"
#include "cpu/kernels/conv_winograd.h"
#include "cpu/tuning/conv.h"
#include "ops/checks.h"
#include "ops/epilogue.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const ConvWinogradArgs&)> conv_winograd_table;
constinit const KernelTable<void(const ConvDirectArgs&)> conv_direct_table;
constinit const KernelTable<void(const ConvDepthwiseArgs&)> conv_depthwise_table;
constinit const KernelTable<void(const ConvColumnsArgs&)> conv_columns_table;
constinit const KernelTable<void(const ConvPackArgs&)> conv_pack_table;
constinit const KernelTable<void(const ConvPoolArgs&)> conv_pool_table;

namespace {

constexpr const char* kOp = "conv2d";

struct Geometry {
  int64_t kernel[2], stride[2], dilation[2], padding[4], groups, winograd;
  int64_t window[2], pool_stride[2], pool_padding[2];
};

Geometry geometry_of(const Conv2dGeometry& numbers) {
  Geometry g;
  check(numbers.size() * sizeof(int64_t) == sizeof g, kOp, "geometry has ", numbers.size(), " numbers, but must have ",
        sizeof g / sizeof(int64_t));
  std::memcpy(&g, numbers.data(), sizeof g);
  return g;
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

float value_of(const TensorView& t, int64_t at) {
  if (t.dtype == DType::float32) return t.as<const float>()[at];
  const uint32_t bits = uint32_t(t.as<const bf16>()[at].bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

bool is_depthwise(int64_t out_channels, int64_t group_inputs, const Geometry& g) {
  return g.groups > 1 && group_inputs == 1 && out_channels == g.groups;
}

int64_t packed_size(int64_t out_channels, int64_t group_inputs, const Geometry& g) {
  if (g.winograd) {
    return (g.winograd + 2) * (g.winograd + 2) * round_up(group_inputs, 16) * conv_panel_floats(out_channels);
  }
  const int64_t taps = g.kernel[0] * g.kernel[1];
  if (is_depthwise(out_channels, group_inputs, g)) return taps * round_up(out_channels, 16);
  return g.groups * taps * group_inputs * conv_panel_floats(out_channels / g.groups);
}

// One dimension of a convolution.
struct Axis {
  int64_t in, kernel, stride, dilation, before, after;

  int64_t extent() const { return dilation * (kernel - 1) + 1; }
  int64_t out() const { return in + before + after < extent() ? 0 : (in + before + after - extent()) / stride + 1; }
};

// A call, checked, with everything a task needs to know.
struct Call {
  const Geometry& g;
  const TensorView& input;
  const TensorView* residual;
  const TensorView& out;
  const float* weights;
  const float* bias;
  Activation activation;
  bool pooled, max_pool;
  Axis y, x;
  int64_t batch, in_channels, out_channels;
  int64_t rows, columns;  // of the convolution, before the pool
  bool depthwise;

  int64_t group_inputs() const { return in_channels / g.groups; }
  bool input_is_nhwc() const { return input.dtype == DType::float32 && (input.stride(1) == 1 || in_channels == 1); }
  bool output_is_nhwc() const { return out.stride(1) == 1 || out_channels == 1; }
};

Call checked(const TensorView& input, const TensorView& weights, const std::optional<TensorView>& residual,
             const Geometry& g, const std::string& pool, const TensorView& out) {
  check_dtype(kOp, "input", input, {DType::float32, DType::bfloat16});
  check_shape(kOp, "input", input, {-1, -1, -1, -1});
  check(out.dtype == input.dtype, kOp, "out is ", dtype_name(out.dtype), ", but must be ", dtype_name(input.dtype));
  check_shape(kOp, "out", out, {input.size(0), -1, -1, -1});
  check(pool == "none" || pool == "max" || pool == "avg", kOp, "pool '", pool, "' is unknown; use none, max or avg");
  Call c = {.g = g,
            .input = input,
            .residual = residual ? &*residual : nullptr,
            .out = out,
            .weights = weights.as<const float>(),
            .bias = nullptr,
            .activation = Activation::none,
            .pooled = pool != "none",
            .max_pool = pool == "max",
            .y = {input.size(2), g.kernel[0], g.stride[0], g.dilation[0], g.padding[0], g.padding[1]},
            .x = {input.size(3), g.kernel[1], g.stride[1], g.dilation[1], g.padding[2], g.padding[3]},
            .batch = input.size(0),
            .in_channels = input.size(1),
            .out_channels = out.size(1),
            .rows = 0,
            .columns = 0,
            .depthwise = false};
  for (const Axis& axis : {c.y, c.x}) {
    check(axis.kernel > 0 && axis.stride > 0 && axis.dilation > 0 && axis.before >= 0 && axis.after >= 0, kOp,
          "kernel, stride and dilation must be at least 1 and padding at least 0, but one axis has kernel ",
          axis.kernel, ", stride ", axis.stride, ", dilation ", axis.dilation, ", padding ", axis.before);
  }
  check(g.groups > 0 && c.in_channels % g.groups == 0 && c.out_channels % g.groups == 0, kOp, "groups is ", g.groups,
        ", but must divide the ", c.in_channels, " input and ", c.out_channels, " output channels");
  c.rows = c.y.out();
  c.columns = c.x.out();
  check(c.rows > 0 && c.columns > 0, kOp, "input is ", describe(input), ", smaller than the kernel's reach of [",
        c.y.extent(), ", ", c.x.extent(), "] after padding");
  int64_t sizes[2] = {c.rows, c.columns};
  if (c.pooled) {
    for (int i = 0; i < 2; ++i) {
      const Axis axis = {sizes[i], g.window[i], g.pool_stride[i], 1, g.pool_padding[i], g.pool_padding[i]};
      check(axis.kernel > 0 && axis.stride > 0 && axis.before >= 0 && 2 * axis.before <= axis.kernel, kOp,
            "the pool's window and stride must be at least 1 and its padding at most half of the window, but are ",
            axis.kernel, ", ", axis.stride, ", ", axis.before);
      check(axis.out() > 0, kOp, "the pool's window of ", axis.kernel, " is larger than its input of ", sizes[i]);
      sizes[i] = axis.out();
    }
  }
  check_shape(kOp, "out", out, {c.batch, c.out_channels, sizes[0], sizes[1]});
  if (residual) {
    check_dtype(kOp, "residual", *residual, {DType::float32, DType::bfloat16});
    check_shape(kOp, "residual", *residual, {c.batch, c.out_channels, c.rows, c.columns});
    check(residual->stride(1) == 1 || c.out_channels <= 1, kOp, "residual must have adjacent channels");
  }
  check(g.winograd == 0 || g.winograd == 2 || g.winograd == 4, kOp, "winograd is ", g.winograd,
        ", but must be 0, 2 or 4");
  check(g.winograd == 0 || (g.groups == 1 && g.kernel[0] == 3 && g.kernel[1] == 3 && g.stride[0] == 1 &&
                            g.stride[1] == 1 && g.dilation[0] == 1 && g.dilation[1] == 1),
        kOp, "winograd is for 3 x 3 kernels with stride 1, dilation 1 and one group");
  c.depthwise = is_depthwise(c.out_channels, c.group_inputs(), g);
  check_dtype(kOp, "the packed weight", weights, {DType::float32});
  check_shape(kOp, "the packed weight", weights, {packed_size(c.out_channels, c.group_inputs(), g)});
  check_contiguous(kOp, "the packed weight", weights);
  return c;
}

// Part of one image: output rows [first, end) (of the pool, where there is one) and output channels [channel, stop).
struct Task {
  int64_t image, first, end, channel, stop;
};

// The rows of the image that some rows of the convolution read, packed or as they lie.
struct Source {
  const float* x;  // where the first row's first tap would lie, padding included
  int64_t row, pixel;
};

// Copies what rows [first, end) of the convolution read, with zeros for the padding.
Source pack_rows(const Call& c, int64_t image, int64_t first, int64_t end, int64_t pixel, WorkspaceFrame& frame) {
  const int64_t top = first * c.y.stride - c.y.before, height = (end - first - 1) * c.y.stride + c.y.extent();
  const int64_t width = (c.columns - 1) * c.x.stride + c.x.extent();
  const int64_t row0 = std::clamp<int64_t>(top, 0, c.y.in), row1 = std::clamp<int64_t>(top + height, 0, c.y.in);
  const int64_t columns = std::clamp<int64_t>(width - c.x.before, 0, c.x.in);
  const int64_t left = std::min(c.x.before, width);
  float* to = frame.take<float>(size_t(height * width * pixel));
  const int64_t before = std::min(row0 - top, height);
  conv_pack_table.get()({.x = c.input.as<const char>() + (image * c.input.stride(0) + row0 * c.input.stride(2)) *
                                                             (c.input.dtype == DType::float32 ? 4 : 2),
                         .is_bf16 = c.input.dtype != DType::float32,
                         .x_row = c.input.stride(2),
                         .x_pixel = c.input.stride(3),
                         .x_channel = c.input.stride(1),
                         .rows = row1 - row0,
                         .columns = columns,
                         .channels = c.in_channels,
                         .to = to,
                         .to_row = width * pixel,
                         .to_pixel = pixel,
                         .top = before,
                         .bottom = height - before - (row1 - row0),
                         .left = left,
                         .right = width - left - columns});
  return {to, width * pixel, pixel};
}

Source in_place(const Call& c, int64_t image, int64_t first) {
  const float* x = c.input.as<const float>() + image * c.input.stride(0) + first * c.y.stride * c.input.stride(2);
  return {x, c.input.stride(2), c.input.stride(3)};
}

// Tiles of an image of that many rows.
int64_t winograd_tiles(const Call& c, int64_t rows) {
  return divide_up(rows, c.g.winograd) * divide_up(c.columns, c.g.winograd);
}

// All tiles of rows [first, end) of images that lie as they are read, from `image` on.
ConvWinogradArgs winograd_in_place(const Call& c, int64_t image, int64_t images, int64_t first, int64_t end,
                                   const ConvOutput& to) {
  return {.tile = int(c.g.winograd),
          .x = c.input.as<const float>() + image * c.input.stride(0),
          .x_image = c.input.stride(0),
          .x_row = c.input.stride(2),
          .x_pixel = c.input.stride(3),
          .height = c.y.in,
          .width = c.x.in,
          .channels = c.in_channels,
          .pad_top = c.y.before - first,
          .pad_left = c.x.before,
          .weights = c.weights,
          .first_channel = 0,
          .end_channel = c.out_channels,
          .rows = end - first,
          .columns = c.columns,
          .first_tile = 0,
          .end_tile = images * winograd_tiles(c, end - first),
          .far = false,
          .to = to,
          .out_image = c.out.stride(0),
          .residual_image = c.residual ? c.residual->stride(0) : 0,
          .scratch = nullptr};
}

// A band of an image.
void winograd(const Call& c, const Task& t, int64_t first, int64_t end, const ConvOutput& to) {
  WorkspaceFrame frame;
  ConvWinogradArgs args = winograd_in_place(c, t.image, 1, first, end, to);
  args.first_channel = t.channel;
  args.end_channel = t.stop;
  if (!c.input_is_nhwc()) {
    const Source source = pack_rows(c, t.image, first, end, c.in_channels, frame);
    args.x = source.x;
    args.x_row = source.row;
    args.x_pixel = source.pixel;
    args.height = end - first + 2;
    args.width = c.columns + 2;
    args.pad_top = args.pad_left = 0;
  }
  args.scratch = frame.take<float>(size_t(conv_winograd_scratch(args.tile, args.channels)));
  conv_winograd_table.get()(args);
}

// Rows of pixels a multiple of 2 KiB apart share a few sets of L1, and 14 of them do not fit there.
bool rows_collide(int64_t floats) { return floats * 4 % 2048 == 0; }

void direct(const Call& c, const Task& t, int64_t first, int64_t end, const ConvOutput& to) {
  WorkspaceFrame frame;
  const bool padded = c.y.before || c.y.after || c.x.before || c.x.after;
  const bool stays = c.input_is_nhwc() && !padded && !rows_collide(c.input.stride(3) * c.x.stride);
  const int64_t pixel = rows_collide(c.in_channels * c.x.stride) ? c.in_channels + 16 : c.in_channels;
  const Source source = stays ? in_place(c, t.image, first) : pack_rows(c, t.image, first, end, pixel, frame);

  const int64_t kh = c.y.kernel, kw = c.x.kernel, group_inputs = c.group_inputs();
  // A whole row of taps is adjacent where nothing lies between its pixels.
  const bool joined = c.g.groups == 1 && c.x.dilation == 1 && source.pixel == c.in_channels;
  const int64_t runs = joined ? kh : kh * kw;
  int64_t* starts = frame.take<int64_t>(size_t(runs));
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t ky = joined ? i : i / kw, kx = joined ? 0 : i % kw;
    starts[i] = ky * c.y.dilation * source.row + kx * c.x.dilation * source.pixel;
  }
  if (c.depthwise) {
    conv_depthwise_table.get()({.x = source.x,
                                .x_row = source.row * c.y.stride,
                                .x_pixel = source.pixel * c.x.stride,
                                .taps = int(kh * kw),
                                .tap_starts = starts,
                                .weights = c.weights,
                                .channels = c.out_channels,
                                .first_channel = t.channel,
                                .end_channel = t.stop,
                                .rows = end - first,
                                .columns = c.columns,
                                .to = to});
    return;
  }
  const int64_t group_outputs = c.out_channels / c.g.groups, panels = conv_panels(group_outputs);
  conv_direct_table.get()({.x = source.x,
                           .x_row = source.row * c.y.stride,
                           .x_pixel = source.pixel * c.x.stride,
                           .runs = int(runs),
                           .run_starts = starts,
                           .run_length = joined ? kw * c.in_channels : group_inputs,
                           .weights = c.weights,
                           .groups = c.g.groups,
                           .group_inputs = group_inputs,
                           .group_outputs = group_outputs,
                           .first_panel = t.channel / group_outputs * panels + t.channel % group_outputs / kConvPanel,
                           .end_panel = t.stop / group_outputs * panels + divide_up(t.stop % group_outputs, kConvPanel),
                           .rows = end - first,
                           .columns = c.columns,
                           .to = to});
}

// Whether a register is fuller with the columns of a row in it than with the output channels of a pixel, where the
// image lies so that it can be.
bool fits_columns(const Call& c) {
  const bool planes = c.input.dtype == DType::float32 && (c.input.stride(3) == 1 || c.x.in == 1) &&
                      (c.out.stride(3) == 1 || c.out.size(3) == 1) && (c.out.stride(1) != 1 || c.out_channels == 1);
  return planes && c.g.groups == 1 && !c.g.winograd && !c.residual && c.x.stride == 1 && c.out_channels < 16 &&
         c.columns * 16 > c.out_channels * round_up(c.columns, 16);
}

// Rows [first, end) of the convolution and what is pooled of them.
void by_columns(const Call& c, const Task& t, int64_t first, int64_t end) {
  const Geometry& g = c.g;
  WorkspaceFrame frame;
  const int64_t top = first * c.y.stride - c.y.before, height = (end - first - 1) * c.y.stride + c.y.extent();
  const int64_t width = round_up(c.columns, 32) + c.x.extent(), filled = std::min(c.x.in, width - c.x.before);
  float* x = frame.take<float>(size_t(c.in_channels * height * width));
  std::memset(x, 0, size_t(c.in_channels * height * width) * sizeof(float));
  for (int64_t channel = 0; channel < c.in_channels; ++channel) {
    const float* from = c.input.as<const float>() + t.image * c.input.stride(0) + channel * c.input.stride(1);
    for (int64_t y = std::max<int64_t>(0, -top); y < std::min(height, c.y.in - top); ++y) {
      float* to = x + (channel * height + y) * width + c.x.before;
      if (filled > 0) std::memcpy(to, from + (top + y) * c.input.stride(2), size_t(filled) * sizeof(float));
    }
  }
  const ConvColumnsPool pool = {.max = c.max_pool,
                                .window_h = int(g.window[0]),
                                .window_w = int(g.window[1]),
                                .stride_h = int(g.pool_stride[0]),
                                .stride_w = int(g.pool_stride[1]),
                                .pad_h = int(g.pool_padding[0]),
                                .pad_w = int(g.pool_padding[1]),
                                .first_row = t.first,
                                .rows = t.end - t.first,
                                .out_columns = c.out.size(3)};
  const int64_t scratch = c.pooled ? conv_columns_scratch(end - first, c.columns, pool.pad_w, pool.window_w) : 0;
  conv_columns_table.get()(
      {.x = x,
       .x_channel = height * width,
       .x_row = width,
       .channels = c.in_channels,
       .taps_y = int(c.y.kernel),
       .taps_x = int(c.x.kernel),
       .stride_y = int(c.y.stride),
       .dilation_y = int(c.y.dilation),
       .dilation_x = int(c.x.dilation),
       .weights = c.weights + t.channel,
       .width = 16,
       .bias = c.bias ? c.bias + t.channel : nullptr,
       .out_channels = t.stop - t.channel,
       .activation = c.activation,
       .first = first,
       .rows = end - first,
       .columns = c.columns,
       .pool = c.pooled ? &pool : nullptr,
       .out = c.out.as<float>() + t.image * c.out.stride(0) + t.first * c.out.stride(2) + t.channel * c.out.stride(1),
       .out_channel = c.out.stride(1),
       .out_row = c.out.stride(2),
       .scratch = frame.take<float>(size_t(scratch))});
}

// Where the convolution's rows of an image go, from `row` on, and what joins them, where nothing is done to them after.
ConvOutput output_of(const Call& c, int64_t image, int64_t row) {
  ConvOutput to = {.bias = c.bias,
                   .residual = nullptr,
                   .residual_row = 0,
                   .residual_pixel = 0,
                   .residual_is_bf16 = false,
                   .out = nullptr,
                   .out_row = c.out.stride(2),
                   .out_pixel = c.out.stride(3),
                   .out_is_bf16 = c.out.dtype == DType::bfloat16,
                   .activation = c.activation};
  if (c.residual) {
    const TensorView& r = *c.residual;
    to.residual_is_bf16 = r.dtype == DType::bfloat16;
    to.residual_row = r.stride(2);
    to.residual_pixel = r.stride(3);
    to.residual = r.as<const char>() + (image * r.stride(0) + row * r.stride(2)) * (to.residual_is_bf16 ? 2 : 4);
  }
  to.out = c.out.as<char>() + (image * c.out.stride(0) + row * c.out.stride(2)) * (to.out_is_bf16 ? 2 : 4);
  return to;
}

void run(const Call& c, const Task& t) {
  const Geometry& g = c.g;
  const bool apart = c.pooled || !c.output_is_nhwc();
  // The rows of the convolution behind the task's rows.
  int64_t first = t.first, end = t.end;
  if (c.pooled) {
    first = std::max<int64_t>(0, t.first * g.pool_stride[0] - g.pool_padding[0]);
    end = std::min(c.rows, (t.end - 1) * g.pool_stride[0] - g.pool_padding[0] + g.window[0]);
  }
  if (fits_columns(c)) return by_columns(c, t, first, end);
  WorkspaceFrame frame;
  ConvOutput to = output_of(c, t.image, first);
  const int64_t out_size = to.out_is_bf16 ? 2 : 4;
  char* out = c.out.as<char>() + (t.image * c.out.stride(0) + t.first * c.out.stride(2)) * out_size;
  const int64_t width = round_up(t.stop - t.channel, 16);
  float* band = nullptr;
  if (apart) {
    band = frame.take<float>(size_t((end - first) * c.columns * width));
    to.out = band - t.channel;
    to.out_row = c.columns * width;
    to.out_pixel = width;
    to.out_is_bf16 = false;
  } else {
    to.out = out;
  }
  g.winograd ? winograd(c, t, first, end, to) : direct(c, t, first, end, to);
  if (!apart) return;
  conv_pool_table.get()({.x = band,
                         .x_row = c.columns * width,
                         .x_pixel = width,
                         .first = first,
                         .height = end - first,
                         .columns = c.columns,
                         .channels = t.stop - t.channel,
                         .max = !c.pooled || c.max_pool,
                         .window_h = c.pooled ? int(g.window[0]) : 1,
                         .window_w = c.pooled ? int(g.window[1]) : 1,
                         .stride_h = c.pooled ? int(g.pool_stride[0]) : 1,
                         .stride_w = c.pooled ? int(g.pool_stride[1]) : 1,
                         .pad_h = c.pooled ? int(g.pool_padding[0]) : 0,
                         .pad_w = c.pooled ? int(g.pool_padding[1]) : 0,
                         .first_row = t.first,
                         .rows = t.end - t.first,
                         .out_columns = c.out.size(3),
                         .out = out + t.channel * c.out.stride(1) * out_size,
                         .out_is_bf16 = c.out.dtype == DType::bfloat16,
                         .out_row = c.out.stride(2),
                         .out_pixel = c.out.stride(3),
                         .out_channel = c.out.stride(1)});
}

// Output rows of a task. It depends on the shape alone: Winograd's tiles start with a band, and where they start
// decides how their sums are rounded.
int64_t rows_of_band(const Call& c) {
  const int64_t out_rows = c.out.size(2), step = c.pooled ? c.g.pool_stride[0] : 1;
  int64_t rows;
  if (c.g.winograd) {
    const int64_t across = divide_up(c.columns, c.g.winograd);
    // Rows that are copied or pooled overlap from band to band.
    const int64_t tiles = std::max(divide_up(kWinogradBlock, across), 12 / c.g.winograd);
    rows = round_up(std::max<int64_t>(1, tiles * c.g.winograd / step), c.pooled ? 1 : c.g.winograd);
  } else {
    const int64_t bytes = c.columns * std::max(c.x.stride * c.y.stride * c.in_channels, c.out_channels) * 4;
    rows = std::max<int64_t>(1, tuning::kConvBandBytes / std::max<int64_t>(bytes, 1) / step);
  }
  const int64_t bands = divide_up(out_rows, rows);
  return c.g.winograd && !c.pooled ? rows : divide_up(out_rows, bands);
}

// Winograd where pixels are read and written as they lie: tasks are tiles of all images in one row, cut anywhere.
void winograd_of_all(const Call& c, int threads) {
  const int64_t tiles = c.batch * winograd_tiles(c, c.rows), blocks = divide_up(tiles, kWinogradBlock);
  const int64_t panels = divide_up(c.out_channels, 16);
  // Four tasks for each thread where that many blocks are; else as many as keep all threads busy to the end.
  int64_t parts = blocks >= 4 * threads ? 4 * threads : round_up(blocks, threads), shares = 1;
  while (parts > 1 && tiles < parts * tuning::kConvWinogradTiles && 2 * shares <= panels) {
    parts = divide_up(parts, 2);
    shares *= 2;
  }
  if (threads == 1) parts = shares = 1;
  const int64_t bytes = 4 * c.batch * (c.y.in * c.x.in * c.in_channels + c.rows * c.columns * c.out_channels);
  ConvWinogradArgs all = winograd_in_place(c, 0, c.batch, 0, c.rows, output_of(c, 0, 0));
  all.far = bytes > tuning::kConvFarBytes;
  parallel_tasks(parts * shares, [&](int64_t i) {
    const int64_t part = i / shares, share = i % shares;
    WorkspaceFrame frame;
    ConvWinogradArgs args = all;
    args.first_tile = tiles * part / parts;
    args.end_tile = tiles * (part + 1) / parts;
    args.first_channel = 16 * (panels * share / shares);
    args.end_channel = std::min(c.out_channels, 16 * (panels * (share + 1) / shares));
    args.scratch = frame.take<float>(size_t(conv_winograd_scratch(args.tile, args.channels)));
    conv_winograd_table.get()(args);
  });
}

}  // namespace

int64_t conv2d_packed_size(int64_t out_channels, int64_t group_inputs, const Conv2dGeometry& geometry) {
  const Geometry g = geometry_of(geometry);
  check(g.groups > 0 && out_channels % g.groups == 0, kOp, "groups is ", g.groups, ", but must divide the ",
        out_channels, " output channels");
  return packed_size(out_channels, group_inputs, g);
}

void conv2d_pack(const TensorView& weight, const Conv2dGeometry& geometry, const TensorView& packed) {
  const Geometry g = geometry_of(geometry);
  check_dtype(kOp, "weight", weight, {DType::float32, DType::bfloat16});
  check_shape(kOp, "weight", weight, {-1, -1, g.kernel[0], g.kernel[1]});
  const int64_t n = weight.size(0), inputs = weight.size(1), kh = g.kernel[0], kw = g.kernel[1], taps = kh * kw;
  check(g.groups > 0 && n % g.groups == 0, kOp, "groups is ", g.groups, ", but must divide the ", n,
        " output channels");
  check_shape(kOp, "packed", packed, {packed_size(n, inputs, g)});
  float* to = packed.as<float>();
  std::memset(to, 0, size_t(packed.numel()) * sizeof(float));
  const auto at = [&](int64_t o, int64_t c, int64_t y, int64_t x) {
    return value_of(weight, o * weight.stride(0) + c * weight.stride(1) + y * weight.stride(2) + x * weight.stride(3));
  };
  if (is_depthwise(n, inputs, g)) {
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t t = 0; t < taps; ++t) to[t * round_up(n, 16) + c] = at(c, 0, t / kw, t % kw);
    }
    return;
  }
  const int64_t outputs = n / g.groups, padded = conv_panel_floats(outputs);
  if (g.winograd == 0) {
    const int64_t depth = taps * inputs;
    for (int64_t o = 0; o < n; ++o) {
      // The panel of the group in which the output is, and its column there.
      const int64_t column = o % outputs % kConvPanel, first = o % outputs - column;
      const int64_t width = outputs - first > 16 ? kConvPanel : 16;
      float* panel = to + (o / outputs * padded + first) * depth + column;
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t c = 0; c < inputs; ++c) panel[(t * inputs + c) * width] = at(o, c, t / kw, t % kw);
      }
    }
    return;
  }
  // G g G^T in double, rounded once.
  constexpr double kG2[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  constexpr double kG4[6][3] = {{1.0 / 4, 0, 0},
                                {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                                {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                                {1.0 / 24, 1.0 / 12, 1.0 / 6},
                                {1.0 / 24, -1.0 / 12, 1.0 / 6},
                                {0, 0, 1}};
  const auto matrix = g.winograd == 2 ? kG2 : kG4;
  const int64_t side = g.winograd + 2;
  for (int64_t o = 0; o < n; ++o) {
    for (int64_t c = 0; c < inputs; ++c) {
      double half[6][3] = {};
      for (int64_t i = 0; i < side; ++i) {
        for (int64_t x = 0; x < 3; ++x) {
          for (int64_t y = 0; y < 3; ++y) half[i][x] += matrix[i][y] * at(o, c, y, x);
        }
      }
      for (int64_t i = 0; i < side; ++i) {
        for (int64_t j = 0; j < side; ++j) {
          double sum = 0;
          for (int64_t x = 0; x < 3; ++x) sum += half[i][x] * matrix[j][x];
          const int64_t block = ((o / 16 * side + i) * divide_up(inputs, 16) + c / 16) * side + j;
          to[(block * 16 + c % 16) * 16 + o % 16] = float(sum);
        }
      }
    }
  }
}

void conv2d(const TensorView& input, const TensorView& weights, const std::optional<TensorView>& bias,
            const std::optional<TensorView>& residual, const Conv2dGeometry& geometry, const std::string& activation,
            const std::string& pool, const TensorView& out) {
  const Geometry g = geometry_of(geometry);
  Call c = checked(input, weights, residual, g, pool, out);
  c.activation = parse_activation(kOp, activation);
  WorkspaceFrame frame;
  if (bias) c.bias = float_bias(kOp, *bias, c.out_channels, frame);
  if (out.numel() == 0) return;

  const double work = double(c.batch) * double(c.rows * c.columns) * double(c.out_channels) *
                      double(c.group_inputs() * c.y.kernel * c.x.kernel);
  const bool alone = max_threads() == 1 || work < 2 * double(tuning::kConvWorkPerThread);
  if (g.winograd && !c.pooled && c.input_is_nhwc() && c.output_is_nhwc()) {
    return winograd_of_all(c, alone ? 1 : max_threads());
  }
  const int64_t out_rows = out.size(2), rows = rows_of_band(c), bands = divide_up(out_rows, rows);
  // Panels of output channels: what a task can have a share of. Depthwise panels are as wide as a vector.
  const int64_t group_outputs = c.depthwise ? c.out_channels : c.out_channels / g.groups;
  const int64_t panel = c.depthwise ? 16 : kConvPanel, panels = divide_up(group_outputs, panel);
  const int64_t pieces = c.depthwise ? panels : panels * g.groups;
  const int64_t items = c.batch * bands;
  // Few bands are split by channels as well, for an even load.
  const int64_t shares = alone ? 1 : std::clamp<int64_t>(divide_up(4 * max_threads(), items), 1, pieces);
  const auto start_of = [&](int64_t piece) {
    return piece / panels * group_outputs + std::min(piece % panels * panel, group_outputs);
  };
  const auto task = [&](int64_t i) {
    const int64_t share = i % shares, band = i / shares % bands, image = i / shares / bands;
    run(c, {.image = image,
            .first = band * rows,
            .end = std::min(out_rows, (band + 1) * rows),
            .channel = start_of(pieces * share / shares),
            .stop = share + 1 == shares ? c.out_channels : start_of(pieces * (share + 1) / shares)});
  };
  if (alone) {
    for (int64_t i = 0; i < items; ++i) task(i);
  } else {
    parallel_tasks(items * shares, task);
  }
}

}  // namespace lamina
