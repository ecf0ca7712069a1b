#include "ops/int8_conv2d.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "cpu/kernels/int8_conv.h"
#include "cpu/kernels/int8_depthwise.h"
#include "cpu/kernels/int8_winograd.h"
#include "cpu/tuning/int8_conv.h"
#include "cpu/tuning/int8_winograd.h"
#include "ops/checks.h"
#include "ops/conv_pixels.h"
#include "ops/epilogue.h"
#include "ops/parallel.h"
#include "ops/quantize_rows.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const Int8ConvArgs&)> int8_conv_table;
constinit const KernelTable<void(const Int8DepthwiseArgs&)> int8_depthwise_table;
constinit const KernelTable<void(const Int8WinogradInputArgs&)> int8_winograd_inputs_table;
constinit const KernelTable<void(const Int8WinogradWeightArgs&)> int8_winograd_weights_table;
constinit const KernelTable<void(const Int8WinogradOutputArgs&)> int8_winograd_outputs_table;

namespace {

constexpr const char* kOp = "int8_conv2d";
constexpr int64_t kPanel = tuning::kInt8ConvPanelChannels;
constexpr int64_t kDepthwiseBlock = 64;
// 128 * 127 * depth must stay below 2^31, or an int32 sum of extreme codes would wrap.
constexpr int64_t kMaxDepth = ((int64_t{1} << 31) - 1) / (128 * 127);

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The weight [n, c, kh, kw] and how it is packed.
struct PackedShape {
  int64_t n, c, kh, kw, groups;

  bool depthwise() const { return groups > 1 && c == 1 && n == groups; }
  int64_t group_channels() const { return n / groups; }
  int64_t group_padded() const { return round_up(group_channels(), 16); }
  // Bytes of one row of taps of a channel. In one group the taps of a row are a run.
  int64_t row_bytes() const { return groups == 1 ? round_up(kw * c, 4) : kw * round_up(c, 4); }
  int64_t tap_offset(int64_t tap) const { return groups == 1 ? tap * c : tap * round_up(c, 4); }
  int64_t depth() const { return kh * row_bytes(); }
  int64_t bytes() const {
    return depthwise() ? kh * kw * round_up(n, kDepthwiseBlock) : groups * group_padded() * depth();
  }
  int64_t compensation() const { return depthwise() ? round_up(n, kDepthwiseBlock) : kh * groups * group_padded() + 1; }
  // Where the compensation says whether every |sum| stays below 2^25, as int8_winograd wants it.
  int64_t small_sums() const { return kh * groups * group_padded(); }
  // Where byte `at` of row `ky` of channel `n` of a group lies behind the group's first.
  int64_t offset(int64_t channel, int64_t ky, int64_t at) const {
    const int64_t first = channel / kPanel * kPanel;
    const int64_t width = std::min(kPanel, group_padded() - first);
    const int64_t k = ky * row_bytes() + at;
    return first * depth() + k / 4 * 4 * width + 4 * (channel - first) + k % 4;
  }
};

PackedShape packed_shape(const char* op, const std::vector<int64_t>& size, int64_t groups) {
  check(size.size() == 4, op, "the weight has ", size.size(), " dimensions, but must be [n, c, kh, kw]");
  const PackedShape shape{size[0], size[1], size[2], size[3], groups};
  check(shape.n >= 0 && shape.c >= 0, op, "the weight has a negative size");
  check(shape.kh > 0 && shape.kw > 0, op, "the kernel is ", shape.kh, " x ", shape.kw, ", but must have taps");
  check(groups > 0 && shape.n % groups == 0, op, "groups is ", groups, ", but must be positive and divide the ",
        shape.n, " output channels");
  const int64_t depth = shape.c * shape.kh * shape.kw;
  check(depth <= kMaxDepth, op, "an output adds up ", depth, " products, but int32 sums are exact only up to ",
        kMaxDepth);
  return shape;
}

// What one call computes with, checked.
struct Call {
  PackedShape weight;
  int64_t images, height, width;
  int64_t out_height, out_width;
  int64_t stride_y, stride_x, top, left, right, dilation_y, dilation_x;
  const int8_t* data;
  const int32_t* compensation;
  const float* w_scale;
  const float* bias;
  Activation activation;
  ConvImages residual, out;
  float residual_scale, out_inverse;
};

// Scale and bias of the epilogue as the kernels want them: padded, and with 1 / out_scale in them where `folded`.
struct Factors {
  float* scale;  // [images][padded]
  float* bias;   // [padded]
  int64_t padded;
  float residual_scale;
};

// Output channel `n` in the padded arrays: each group begins at a multiple of what a kernel reads.
int64_t padded_group(const PackedShape& w) {
  return w.depthwise() ? round_up(w.n, kDepthwiseBlock) : round_up(w.group_channels(), kPanel);
}

bool can_fold(const Call& call) {
  return call.out.format == EpilogueMatrix::int8 &&
         (call.activation == Activation::none || call.activation == Activation::relu ||
          call.activation == Activation::relu6) &&
         (!call.residual.data || call.residual.format == EpilogueMatrix::int8);
}

Factors make_factors(const Call& call, const float* x_scales, int64_t count, float inverse, WorkspaceFrame& frame) {
  const PackedShape& w = call.weight;
  const int64_t chunk = w.depthwise() ? w.n : w.group_channels(), padded_chunk = padded_group(w);
  const int64_t chunks = w.depthwise() ? 1 : w.groups;
  Factors f;
  f.padded = chunks * padded_chunk;
  f.scale = frame.take<float>(count * f.padded);
  f.bias = frame.take<float>(f.padded);
  f.residual_scale = call.residual_scale * inverse;
  std::fill_n(f.bias, f.padded, 0.0f);
  std::fill_n(f.scale, count * f.padded, 0.0f);
  for (int64_t g = 0; g < chunks; ++g) {
    if (call.bias) {
      for (int64_t i = 0; i < chunk; ++i) f.bias[g * padded_chunk + i] = call.bias[g * chunk + i] * inverse;
    }
    for (int64_t image = 0; image < count; ++image) {
      const float x_scale = x_scales[image];
      float* to = f.scale + image * f.padded + g * padded_chunk;
      const float* from = call.w_scale + g * chunk;
      for (int64_t i = 0; i < chunk; ++i) to[i] = from[i] * x_scale * inverse;
    }
  }
  return f;
}

// Whether no |y| of an image can pass 2^30, where a conversion to int32 is safe whatever the sum.
bool bounded(const Call& call, const Factors& f, int64_t image) {
  const PackedShape& w = call.weight;
  const float most_sum = 128.0f * 127.0f * float(w.c * w.kh * w.kw), limit = float(1 << 30);
  const float* scale = f.scale + image * f.padded;
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < f.padded; ++i) {
    const float y = scale[i] * most_sum + std::fabs(f.bias[i]);
    finite &= y <= limit;
    largest = std::max(largest, y);
  }
  return finite && largest + 128.0f * f.residual_scale <= limit;
}

// Into how many shares the output rows are split, the rest of the threads going to units of channels: so that the
// largest share is small, and then so that little is read twice.
int64_t row_shares(int64_t rows, int64_t units, int64_t threads, int64_t row_bytes, int64_t unit_bytes) {
  int64_t best = 1, best_load = 0, best_bytes = 0;
  for (int64_t shares = 1; shares <= std::min(rows, threads); ++shares) {
    const int64_t columns = std::min(units, threads / shares);
    const int64_t load = ((rows + shares - 1) / shares) * ((units + columns - 1) / columns) * 100;
    const int64_t bytes = shares * units * unit_bytes + columns * rows * row_bytes;
    const bool better = load * 100 < best_load * 97 || (load * 97 <= best_load * 100 && bytes < best_bytes);
    if (shares == 1 || better) {
      best = shares;
      best_load = load;
      best_bytes = bytes;
    }
  }
  return best;
}

ConvEpilogue epilogue_of(const Call& call, const Factors& f, int64_t count, int64_t first_image, bool folded) {
  const float relu6 = std::nearbyint(6.0f * call.out_inverse);  // rounds half to even, as the codes do
  ConvEpilogue end{.scale = f.scale + (count > 1 ? first_image * f.padded : 0),
                   .image_scale = count > 1 ? f.padded : 0,
                   .bias = f.bias,
                   .residual = call.residual,
                   .residual_scale = f.residual_scale,
                   .activation = folded ? Activation::none : call.activation,
                   .out = call.out,
                   .folded = folded,
                   .out_inverse = folded ? 1.0f : call.out_inverse,
                   .lowest = folded && call.activation != Activation::none ? 0.0f : -127.0f,
                   .highest = folded && call.activation == Activation::relu6 ? std::min(relu6, 127.0f) : 127.0f};
  return end;
}

ConvImages part_of(ConvImages m, int64_t image, int64_t channel) {
  if (m.data) m.data = static_cast<char*>(m.data) + (image * m.image + channel) * m.format;
  return m;
}

// Images [first, first + images) of one call, which share the form of their epilogue.
void multiply(const Call& call, const ConvPixels& x, const ConvEpilogue& end, int64_t first, int64_t images) {
  const PackedShape& w = call.weight;
  const auto kernel = int8_conv_table.get();
  const int64_t rows = images * call.out_height;
  const int64_t group = w.group_channels(), panels = (group + kPanel - 1) / kPanel, units = w.groups * panels;
  const int64_t work = rows * call.out_width * w.n * w.c * w.kh * w.kw / tuning::kInt8ConvWorkPerThread;
  const int64_t threads = std::clamp<int64_t>(work, 1, max_threads());
  const int64_t by_rows = row_shares(rows, units, threads, call.stride_y * x.row, kPanel * w.depth());
  const int64_t by_units = std::min(units, std::max<int64_t>(1, threads / by_rows));
  const bool run = w.groups == 1 && x.run;
  const Int8ConvArgs all{.x = x.codes + first * x.image,
                         .image = x.image,
                         .row = x.row,
                         .column = x.step,
                         .height = call.height,
                         .stride_y = int(call.stride_y),
                         .pad_y = int(call.top),
                         .dilation_y = int(call.dilation_y),
                         .taps_y = int(w.kh),
                         .taps_x = run ? 1 : int(w.kw),
                         .tap_x = call.dilation_x * x.pixel,
                         .length = run ? w.row_bytes() : w.row_bytes() / w.kw,
                         .edge = run && w.kw == 3 && call.dilation_x == 1 && w.c % 4 == 0 ? w.c : 0,
                         .left_edge = call.left == 1,
                         .right_edge = (call.out_width - 1) * call.stride_x - call.left + 2 == call.width,
                         .out_height = call.out_height,
                         .out_width = call.out_width,
                         .row_begin = 0,
                         .row_end = 0,
                         .panels = nullptr,
                         .channels = 0,
                         .compensation = nullptr,
                         .ld_compensation = w.groups * w.group_padded(),
                         .end = end};

  parallel_tasks(by_rows * by_units, [&](int64_t task) {
    const int64_t r = task / by_units, u = task % by_units;
    Int8ConvArgs args = all;
    args.row_begin = rows * r / by_rows;
    args.row_end = rows * (r + 1) / by_rows;
    const int64_t last = units * (u + 1) / by_units;
    for (int64_t unit = units * u / by_units; unit < last;) {
      const int64_t g = unit / panels, panel = unit % panels, next = std::min(last, (g + 1) * panels);
      const int64_t channel = panel * kPanel;
      args.x = all.x + g * w.c;
      args.panels = call.data + g * w.group_padded() * w.depth() + channel * w.depth();
      args.channels = std::min(group, (panel + next - unit) * kPanel) - channel;
      args.compensation = call.compensation + g * w.group_padded() + channel;
      args.end.scale = end.scale + g * padded_group(w) + channel;
      args.end.bias = end.bias + g * padded_group(w) + channel;
      args.end.residual = part_of(end.residual, first, g * group + channel);
      args.end.out = part_of(end.out, first, g * group + channel);
      kernel(args);
      unit = next;
    }
  });
}

// How threads share Winograd's tiles and panels; `pays` is false where the direct sum is faster.
struct WinogradPlan {
  bool pays = false;
  int64_t across = 0, per_image = 0;
  int64_t by_tiles = 1, by_panels = 1;  // shares
};

// Tiles of a band, of nearly equal bands.
int64_t winograd_band(const PackedShape& w, int64_t tiles) {
  const int64_t bytes = 2 * kWinogradPoints * round_up(w.c, kWinogradChunk);
  const int64_t most = std::max<int64_t>(tuning::kInt8WinogradBandBytes / bytes, tuning::kInt8WinogradTiles);
  const int64_t bands = (tiles + most - 1) / most;
  return (tiles + bands - 1) / bands;
}

// A thread transforms all that it multiplies, since what another core has just written is slow to read: with more
// shares of tiles more threads transform the same filters, with more shares of panels the same inputs.
WinogradPlan plan_winograd(const Call& call) {
  const PackedShape& w = call.weight;
  WinogradPlan best;
  if (w.groups != 1 || w.kh != 3 || w.kw != 3 || w.c == 0 || w.c % 4 != 0 || w.n % kPanel != 0) return best;
  if (call.stride_y != 1 || call.stride_x != 1 || call.dilation_y != 1 || call.dilation_x != 1) return best;
  if (!call.compensation[w.small_sums()]) return best;
  if (2 * kWinogradPoints * kPanel * w.c > tuning::kInt8WinogradFilterBytes) return best;
  best.across = (call.out_width + 3) / 4;
  best.per_image = best.across * ((call.out_height + 3) / 4);
  const int64_t tiles = call.images * best.per_image, panels = w.n / kPanel;
  const int64_t outputs = call.images * call.out_height * call.out_width * w.n;
  const int64_t threads = std::clamp<int64_t>(4 * outputs * w.c / tuning::kInt8ConvWorkPerThread, 1, max_threads());
  double least = 0;
  for (int64_t shares = 1; shares <= std::min(tiles, threads); ++shares) {
    const int64_t columns = std::min(panels, threads / shares);
    const int64_t own = (tiles + shares - 1) / shares, n = (panels + columns - 1) / columns * kPanel;
    const int64_t band = winograd_band(w, own), bands = (own + band - 1) / band;
    const double of_tile =
        double(kWinogradPoints * w.c * n + tuning::kInt8WinogradInputCost * w.c + tuning::kInt8WinogradOutputCost * n);
    const double load = own * of_tile + double(bands * tuning::kInt8WinogradFilterCost * w.c * n);
    if (shares > 1 && load >= least) continue;
    least = load;
    best.by_tiles = shares;
    best.by_panels = columns;
  }
  const double direct = 4.5 * double(outputs) * w.c / threads;  // 9 products of bytes, at twice the speed of words
  best.pays = least < tuning::kInt8WinogradGain * direct;
  return best;
}

// Images [first, first + images) by Winograd's filtering.
void multiply_by_winograd(const Call& call, const WinogradPlan& plan, const ConvPixels& x, const ConvEpilogue& end,
                          int64_t first, int64_t images) {
  const PackedShape& w = call.weight;
  const auto transform_inputs = int8_winograd_inputs_table.get();
  const auto transform_weights = int8_winograd_weights_table.get();
  const auto finish = int8_winograd_outputs_table.get();
  const int64_t tiles = images * plan.per_image, panels = w.n / kPanel;
  parallel_tasks(plan.by_tiles * plan.by_panels, [&](int64_t task) {
    const int64_t share = task / plan.by_panels, column = task % plan.by_panels;
    const int64_t last = tiles * (share + 1) / plan.by_tiles, last_panel = panels * (column + 1) / plan.by_panels;
    int64_t done = tiles * share / plan.by_tiles;
    const int64_t band = winograd_band(w, last - done);
    WorkspaceFrame frame;
    Int8WinogradTiles band_tiles = {.across = plan.across,
                                    .per_image = plan.per_image,
                                    .first = done,
                                    .count = band,
                                    .block = winograd_block(band),
                                    .channels = w.c,
                                    .inputs = nullptr,
                                    .out_height = call.out_height,
                                    .out_width = call.out_width};
    band_tiles.inputs = frame.take<int16_t>(winograd_input_words(band_tiles));
    int16_t* weights = frame.take<int16_t>(kWinogradPoints * winograd_weight_point(w.c));
    int32_t* products = frame.take<int32_t>(kWinogradPoints * winograd_product_point(band_tiles.block));
    for (; done < last; done += band) {
      band_tiles.first = done;
      band_tiles.count = std::min(band, last - done);
      transform_inputs({.tiles = band_tiles,
                        .x = x.codes + first * x.image,
                        .image = x.image,
                        .row = x.row,
                        .pixel = x.pixel,
                        .height = call.height,
                        .width = call.width,
                        .pad_top = call.top,
                        .pad_left = call.left});
      for (int64_t panel = panels * column / plan.by_panels; panel < last_panel; ++panel) {
        const int64_t channel = panel * kPanel;
        transform_weights({.panel = call.data + channel * w.depth(), .channels = w.c, .weights = weights});
        ConvEpilogue own = end;
        own.scale += channel;
        own.bias += channel;
        own.residual = part_of(end.residual, first, channel);
        own.out = part_of(end.out, first, channel);
        finish({.tiles = band_tiles, .weights = weights, .products = products, .end = own});
      }
    }
  });
}

void multiply_depthwise(const Call& call, const ConvPixels& x, const ConvEpilogue& end, int64_t first, int64_t images) {
  const PackedShape& w = call.weight;
  const auto kernel = int8_depthwise_table.get();
  const int64_t rows = images * call.out_height;
  const int64_t units = (w.n + kDepthwiseBlock - 1) / kDepthwiseBlock;
  const int64_t work = rows * call.out_width * w.n * w.kh * w.kw / tuning::kInt8DepthwiseWorkPerThread;
  const int64_t threads = std::clamp<int64_t>(work, 1, max_threads());
  // Rows are what the layers around share out, too; channels where there are too few for shares of nearly equal size.
  const bool few = rows < tuning::kInt8DepthwiseRowsPerThread * threads && units >= 2 * threads;
  const int64_t by_rows = few ? 1 : std::min(rows, threads), by_units = std::min(units, threads / by_rows);
  parallel_tasks(by_rows * by_units, [&](int64_t task) {
    const int64_t r = task / by_units, u = task % by_units;
    const int64_t channel = units * u / by_units * kDepthwiseBlock;
    WorkspaceFrame frame;
    kernel({.x = x.codes + first * x.image + channel,
            .image = x.image,
            .row = x.row,
            .pixel = x.pixel,
            .zeros = x.zeros + channel,
            .height = call.height,
            .width = call.width,
            .stride_y = int(call.stride_y),
            .stride_x = int(call.stride_x),
            .pad_y = int(call.top),
            .pad_x = int(call.left),
            .dilation_y = int(call.dilation_y),
            .dilation_x = int(call.dilation_x),
            .taps_y = int(w.kh),
            .taps_x = int(w.kw),
            .out_height = call.out_height,
            .out_width = call.out_width,
            .row_begin = rows * r / by_rows,
            .row_end = rows * (r + 1) / by_rows,
            .weights = call.data + channel,
            .ld_weights = round_up(w.n, kDepthwiseBlock),
            .compensation = call.compensation + channel,
            .channels = std::min(w.n, units * (u + 1) / by_units * kDepthwiseBlock) - channel,
            .end = {.scale = end.scale + channel,
                    .image_scale = end.image_scale,
                    .bias = end.bias + channel,
                    .residual = part_of(end.residual, first, channel),
                    .residual_scale = end.residual_scale,
                    .activation = end.activation,
                    .out = part_of(end.out, first, channel),
                    .folded = end.folded,
                    .out_inverse = end.out_inverse,
                    .lowest = end.lowest,
                    .highest = end.highest},
            .scratch = frame.take<char>(depthwise_scratch(w.kh, w.kw, call.stride_x, call.dilation_x))});
  });
}

EpilogueMatrix::Format format_of(DType dtype) {
  return dtype == DType::float32    ? EpilogueMatrix::f32
         : dtype == DType::bfloat16 ? EpilogueMatrix::b16
                                    : EpilogueMatrix::int8;
}

ConvImages conv_images(const char* what, const TensorView& t, const Call& call) {
  check_shape(kOp, what, t, {call.images, call.weight.n, call.out_height, call.out_width});
  check(call.weight.n <= 1 || t.stride(1) == 1, kOp, "the channels of a pixel of ", what, " must lie together");
  return {t.data, t.stride(0), t.stride(2), t.stride(3), format_of(t.dtype)};
}

int64_t at_least(const char* what, int64_t value, int64_t least) {
  check(value >= least && value <= (1 << 30), kOp, what, " is ", value, ", but must be at least ", least);
  return value;
}

// Sizes and the geometry of the windows, checked against x and out.
Call geometry(const TensorView& x, const PackedShape& weight, const std::vector<int64_t>& stride,
              const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  check(stride.size() == 2 && dilation.size() == 2 && padding.size() == 4, kOp,
        "stride and dilation take 2 numbers and padding 4, not ", stride.size(), ", ", dilation.size(), " and ",
        padding.size());
  Call call{};
  call.weight = weight;
  call.images = x.size(0);
  call.height = x.size(2);
  call.width = x.size(3);
  call.stride_y = at_least("stride", stride[0], 1);
  call.stride_x = at_least("stride", stride[1], 1);
  call.dilation_y = at_least("dilation", dilation[0], 1);
  call.dilation_x = at_least("dilation", dilation[1], 1);
  call.top = at_least("padding", padding[0], 0);
  call.left = at_least("padding", padding[2], 0);
  call.right = at_least("padding", padding[3], 0);
  const int64_t room_y = call.height + call.top + at_least("padding", padding[1], 0);
  const int64_t room_x = call.width + call.left + call.right;
  const int64_t window_y = (weight.kh - 1) * call.dilation_y + 1, window_x = (weight.kw - 1) * call.dilation_x + 1;
  check(room_y >= window_y && room_x >= window_x, kOp, "the padded input is ", room_y, " x ", room_x,
        ", but the kernel covers ", window_y, " x ", window_x);
  call.out_height = (room_y - window_y) / call.stride_y + 1;
  call.out_width = (room_x - window_x) / call.stride_x + 1;
  return call;
}

}  // namespace

int64_t int8_conv2d_packed_size(const std::vector<int64_t>& size, int64_t groups) {
  return packed_shape("int8_conv2d_pack", size, groups).bytes();
}

int64_t int8_conv2d_compensation_size(const std::vector<int64_t>& size, int64_t groups) {
  return packed_shape("int8_conv2d_pack", size, groups).compensation();
}

void int8_conv2d_pack(const TensorView& weight, const TensorView& scale, int64_t groups, const TensorView& data,
                      const TensorView& compensation) {
  constexpr const char* op = "int8_conv2d_pack";
  check_dtype(op, "weight", weight, {DType::int8});
  check_shape(op, "weight", weight, {-1, -1, -1, -1});
  check_contiguous(op, "weight", weight);
  const PackedShape w = packed_shape(op, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, groups);
  check_dtype(op, "scale", scale, {DType::float32});
  check_shape(op, "scale", scale, {w.n});
  check_contiguous(op, "scale", scale);
  check_dtype(op, "data", data, {DType::int8});
  check_shape(op, "data", data, {w.bytes()});
  check_contiguous(op, "data", data);
  check_dtype(op, "compensation", compensation, {DType::int32});
  check_shape(op, "compensation", compensation, {w.compensation()});
  check_contiguous(op, "compensation", compensation);
  for (int64_t i = 0; i < w.n; ++i) {
    const float s = scale.as<float>()[i];
    check(std::isfinite(s) && s >= 0, op, "scale[", i, "] is ", s, ", but must be finite and not negative");
  }
  const int8_t* from = weight.as<int8_t>();
  const int64_t taps = w.kh * w.kw, filter = w.c * taps;
  for (int64_t i = 0; i < w.n * filter; ++i) {
    check(from[i] != -128, op, "the weight of output channel ", i / filter,
          " holds -128, but codes must lie in [-127, 127]");
  }
  int8_t* to = data.as<int8_t>();
  int32_t* sums = compensation.as<int32_t>();
  std::fill_n(to, w.bytes(), int8_t{0});
  std::fill_n(sums, w.compensation(), 0);
  if (w.depthwise()) {
    const int64_t ld = round_up(w.n, kDepthwiseBlock);
    for (int64_t n = 0; n < w.n; ++n) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        to[tap * ld + n] = from[n * taps + tap];
        sums[n] += 128 * from[n * taps + tap];
      }
    }
    return;
  }
  const int64_t group = w.group_channels(), padded = w.group_padded();
  std::atomic<bool> small{true};
  parallel_ranges(w.n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t g = n / group, channel = n % group;
      int8_t* base = to + g * padded * w.depth();
      int64_t magnitude = 0;
      for (int64_t ky = 0; ky < w.kh; ++ky) {
        int32_t sum = 0;
        for (int64_t kx = 0; kx < w.kw; ++kx) {
          for (int64_t c = 0; c < w.c; ++c) {
            const int8_t code = from[n * filter + c * taps + ky * w.kw + kx];
            base[w.offset(channel, ky, w.tap_offset(kx) + c)] = code;
            sum += code;
            magnitude += std::abs(code);
          }
        }
        sums[ky * w.groups * padded + g * padded + channel] = 128 * sum;  // |128 * 127 * depth| is below 2^31
      }
      if (128 * magnitude >= int64_t{1} << 25) small = false;
    }
  });
  sums[w.small_sums()] = small;
}

void int8_conv2d_unpack(const TensorView& data, int64_t groups, const TensorView& weight) {
  constexpr const char* op = "int8_conv2d_unpack";
  check_dtype(op, "weight", weight, {DType::int8});
  check_shape(op, "weight", weight, {-1, -1, -1, -1});
  check_contiguous(op, "weight", weight);
  const PackedShape w = packed_shape(op, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, groups);
  check_dtype(op, "data", data, {DType::int8});
  check_shape(op, "data", data, {w.bytes()});
  const int8_t* from = data.as<int8_t>();
  int8_t* to = weight.as<int8_t>();
  const int64_t taps = w.kh * w.kw, filter = w.c * taps, group = w.group_channels();
  for (int64_t n = 0; n < w.n; ++n) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      if (w.depthwise()) {
        to[n * taps + tap] = from[tap * round_up(w.n, kDepthwiseBlock) + n];
        continue;
      }
      const int8_t* base = from + n / group * w.group_padded() * w.depth();
      for (int64_t c = 0; c < w.c; ++c) {
        to[n * filter + c * taps + tap] = base[w.offset(n % group, tap / w.kw, w.tap_offset(tap % w.kw) + c)];
      }
    }
  }
}

void int8_conv2d(const TensorView& x, const TensorView& data, const TensorView& scale, const TensorView& compensation,
                 const std::vector<int64_t>& size, const std::optional<TensorView>& bias,
                 const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& dilation, int64_t groups, const std::string& activation,
                 const std::optional<TensorView>& residual, const std::optional<TensorView>& residual_scale,
                 const std::optional<TensorView>& x_scale, const std::optional<TensorView>& out_scale,
                 const TensorView& out) {
  const bool quantized = x.dtype == DType::int8;
  check(!quantized || x_scale, kOp, "x is int8, but x_scale, which says what its codes mean, is missing");
  if (!quantized) check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  check_shape(kOp, "x", x, {-1, -1, -1, -1});
  const PackedShape w = packed_shape(kOp, size, groups);
  check(x.size(1) == w.c * groups, kOp, "x has ", x.size(1), " channels, but packed_weight was packed for ",
        w.c * groups);
  Call call = geometry(x, w, stride, padding, dilation);
  check_dtype(kOp, "packed_weight.data", data, {DType::int8});
  check_shape(kOp, "packed_weight.data", data, {w.bytes()});
  check_contiguous(kOp, "packed_weight.data", data);
  check_dtype(kOp, "packed_weight.scale", scale, {DType::float32});
  check_shape(kOp, "packed_weight.scale", scale, {w.n});
  check_contiguous(kOp, "packed_weight.scale", scale);
  check_dtype(kOp, "packed_weight.compensation", compensation, {DType::int32});
  check_shape(kOp, "packed_weight.compensation", compensation, {w.compensation()});
  check_contiguous(kOp, "packed_weight.compensation", compensation);

  WorkspaceFrame frame;
  call.data = data.as<int8_t>();
  call.compensation = compensation.as<int32_t>();
  call.w_scale = scale.as<float>();
  call.bias = bias ? float_bias(kOp, *bias, w.n, frame) : nullptr;
  call.activation = parse_activation(kOp, activation);
  call.residual_scale = 1;
  if (residual) {
    check_dtype(kOp, "residual", *residual, {DType::float32, DType::bfloat16, DType::int8});
    check((residual->dtype == DType::int8) == residual_scale.has_value(), kOp,
          "a residual of int8, and only that, goes with residual_scale, which says what its codes mean");
    call.residual = conv_images("residual", *residual, call);
    if (residual_scale) call.residual_scale = positive_scale(kOp, "residual_scale", *residual_scale);
  } else {
    check(!residual_scale, kOp, "residual_scale goes with a residual of int8");
  }
  call.out_inverse = 1;
  if (out_scale) {
    check_dtype(kOp, "out", out, {DType::int8});
    call.out_inverse = 1.0f / positive_scale(kOp, "out_scale", *out_scale);
  } else {
    check_dtype(kOp, "out", out, {DType::float32, DType::bfloat16});
  }
  call.out = conv_images("out", out, call);
  const bool scale_per_image = quantized && x_scale->ndim != 0;
  float given = 0;
  if (scale_per_image) {
    check_dtype(kOp, "x_scale", *x_scale, {DType::float32});
    check_shape(kOp, "x_scale", *x_scale, {call.images});
  } else if (x_scale) {
    given = positive_scale(kOp, "x_scale", *x_scale);
    int bad = 0;  // a loop without exits is vectorized
    for (int64_t i = 0; i < w.n; ++i) bad |= !(std::fabs(given * call.w_scale[i]) <= std::numeric_limits<float>::max());
    for (int64_t i = 0; bad && i < w.n; ++i) {
      check(std::isfinite(given * call.w_scale[i]), kOp, "x_scale ", given, " times the weight scale ", call.w_scale[i],
            " of output channel ", i, " is too large for float32");
    }
  }
  if (call.images == 0 || w.n == 0) return;

  const WinogradPlan winograd = plan_winograd(call);
  const bool padded = !winograd.pays && !w.depthwise();  // their kernels make up the columns outside
  const ConvWindow window{.stride_y = call.stride_y,
                          .stride_x = call.stride_x,
                          .top = call.top,
                          .left = padded ? call.left : 0,
                          .right = padded ? call.right : 0,
                          .dilation_y = call.dilation_y,
                          .dilation_x = call.dilation_x,
                          .kh = w.kh,
                          .kw = w.kw,
                          .out_height = call.out_height,
                          .out_width = call.out_width,
                          .quads = !w.depthwise(),
                          .channels = w.c,
                          .groups = groups};
  ConvPixels pixels = conv_pixels(x, given, window, frame);
  if (scale_per_image) {
    for (int64_t i = 0; i < call.images; ++i) pixels.scales[i] = x_scale->as<float>()[i * x_scale->stride(0)];
  }
  const bool one_scale =
      std::all_of(pixels.scales, pixels.scales + call.images, [&](float s) { return s == pixels.scales[0]; });
  const int64_t count = one_scale ? 1 : call.images;
  const bool foldable = can_fold(call);
  Factors folded{}, plain{};
  if (foldable) folded = make_factors(call, pixels.scales, count, call.out_inverse, frame);
  const auto folds = [&](int64_t image) { return foldable && bounded(call, folded, count > 1 ? image : 0); };
  for (int64_t image = 0; image < call.images;) {
    const bool fold = folds(image);
    int64_t last = image + 1;
    while (last < call.images && (count == 1 || folds(last) == fold)) ++last;
    if (!fold && !plain.scale) plain = make_factors(call, pixels.scales, count, 1.0f, frame);
    const ConvEpilogue end = epilogue_of(call, fold ? folded : plain, count, image, fold);
    if (winograd.pays) {
      multiply_by_winograd(call, winograd, pixels, end, image, last - image);
    } else {
      (w.depthwise() ? multiply_depthwise : multiply)(call, pixels, end, image, last - image);
    }
    image = last;
  }
}

}  // namespace lamina
