#include "ops/int8_pool2d.h"

#include <algorithm>

#include "cpu/kernels/int8_pool.h"
#include "cpu/tuning/int8_pool.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/pool_windows.h"
#include "ops/quantize_rows.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const Int8PoolArgs&)> int8_pool_table;

namespace {

constexpr const char* kOp = "int8_pool2d";

ConvImages conv_images(const char* what, const TensorView& t) {
  check(t.size(1) <= 1 || t.stride(1) == 1, kOp, "the channels of a pixel of ", what, " must lie together");
  const auto format = t.dtype == DType::float32    ? EpilogueMatrix::f32
                      : t.dtype == DType::bfloat16 ? EpilogueMatrix::b16
                                                   : EpilogueMatrix::int8;
  return {t.data, t.stride(0), t.stride(2), t.stride(3), format};
}

}  // namespace

void int8_pool2d(const TensorView& x, const std::string& kind, const std::vector<int64_t>& kernel,
                 const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& dilation, bool count_include_pad, int64_t divisor,
                 const std::optional<TensorView>& x_scale, const std::optional<TensorView>& out_scale,
                 const TensorView& out) {
  check(kind == "max" || kind == "avg" || kind == "adaptive_avg", kOp, "kind '", kind,
        "' is unknown; use max, avg or adaptive_avg");
  const bool largest = kind == "max", adaptive = kind == "adaptive_avg";
  check_dtype(kOp, "x", x, {DType::int8});
  check_shape(kOp, "x", x, {-1, -1, -1, -1});
  check_shape(kOp, "out", out, {x.size(0), x.size(1), -1, -1});
  float factor = 1;
  if (largest) {
    check(!x_scale && !out_scale, kOp, "the largest codes keep their scale; x_scale and out_scale go with a mean");
    check_dtype(kOp, "out", out, {DType::int8});
  } else if (x_scale) {
    factor = positive_scale(kOp, "x_scale", *x_scale);
    if (out_scale) factor /= positive_scale(kOp, "out_scale", *out_scale);
    if (out_scale) {
      check_dtype(kOp, "out", out, {DType::int8});
    } else {
      check_dtype(kOp, "out", out, {DType::float32, DType::bfloat16});
    }
  } else {
    check(!out_scale, kOp, "out_scale goes with x_scale, which says what the codes of x mean");
    check_dtype(kOp, "out", out, {DType::int8});
  }
  for (const auto* pair : {&kernel, &stride, &padding, &dilation}) {
    check(pair->size() == 2, kOp, "windows are told by two numbers each, not ", pair->size());
  }
  const int64_t out_height = out.size(2), out_width = out.size(3);
  const int64_t most = (int64_t{1} << 31) / 128;  // codes that an int32 can sum
  if (adaptive) {
    check(kernel[0] == out_height && kernel[1] == out_width, kOp, "out is ", out_height, " x ", out_width,
          ", but must be ", kernel[0], " x ", kernel[1]);
    check(x.size(2) * x.size(3) < most, kOp, "an image of ", x.size(2), " x ", x.size(3), " is too large to sum");
  } else {
    for (int i = 0; i < 2; ++i) {
      check(kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0, kOp,
            "kernel, stride and dilation must be positive, but are ", kernel[i], ", ", stride[i], " and ", dilation[i]);
      check(padding[i] >= 0 && padding[i] * 2 <= kernel[i], kOp, "padding is ", padding[i],
            ", but must be at most half of the kernel, ", kernel[i]);
    }
    check(kernel[0] * kernel[1] < most, kOp, "a kernel of ", kernel[0], " x ", kernel[1], " is too large to sum");
  }
  if (out.numel() == 0) return;
  check(x.size(2) > 0 && x.size(3) > 0, kOp, "x has images of ", x.size(2), " x ", x.size(3), " pixels");

  WorkspaceFrame frame;
  PoolWindow* rows = frame.take<PoolWindow>(out_height);
  PoolWindow* columns = frame.take<PoolWindow>(out_width);
  if (adaptive) {
    find_adaptive_windows(rows, out_height, x.size(2));
    find_adaptive_windows(columns, out_width, x.size(3));
  } else {
    find_windows(rows, out_height, x.size(2), kernel[0], stride[0], padding[0], dilation[0], count_include_pad);
    find_windows(columns, out_width, x.size(3), kernel[1], stride[1], padding[1], dilation[1], count_include_pad);
  }
  const Int8PoolArgs all{.x = conv_images("x", x),
                         .out = conv_images("out", out),
                         .largest = largest,
                         .rows = rows,
                         .columns = columns,
                         .step_y = adaptive ? 1 : int(dilation[0]),
                         .step_x = adaptive ? 1 : int(dilation[1]),
                         .out_height = out_height,
                         .out_width = out_width,
                         .row_begin = 0,
                         .row_end = 0,
                         .channels = x.size(1),
                         .divisor = int(divisor),
                         .factor = factor};
  const auto pool = int8_pool_table.get();
  const int64_t work = out_width * x.size(1) * rows[0].count * columns[0].count;
  const int64_t grain = std::max<int64_t>(1, tuning::kInt8PoolWorkPerThread / std::max<int64_t>(work, 1));
  parallel_ranges(x.size(0) * out_height, grain, [&](int64_t begin, int64_t end) {
    Int8PoolArgs args = all;
    args.row_begin = begin;
    args.row_end = end;
    pool(args);
  });
}

}  // namespace lamina
