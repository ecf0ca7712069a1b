#include "ops/pool2d.h"

#include <algorithm>

#include "cpu/kernels/pool.h"
#include "cpu/tuning/pool.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/pool_windows.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const PoolArgs&)> pool_table;

namespace {

constexpr const char* kOp = "pool2d";

PoolImages pool_images(const TensorView& t) { return {t.data, t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

}  // namespace

void pool2d(const TensorView& x, const std::string& kind, const std::vector<int64_t>& kernel,
            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, bool count_include_pad, int64_t divisor, const TensorView& out) {
  check(kind == "max" || kind == "avg" || kind == "adaptive_avg", kOp, "kind '", kind,
        "' is unknown; use max, avg or adaptive_avg");
  const bool adaptive = kind == "adaptive_avg";
  check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  check_dtype(kOp, "out", out, {x.dtype});
  check_shape(kOp, "x", x, {-1, -1, -1, -1});
  check_shape(kOp, "out", out, {x.size(0), x.size(1), -1, -1});
  for (const auto* pair : {&kernel, &stride, &padding, &dilation}) {
    check(pair->size() == 2, kOp, "windows are told by two numbers each, not ", pair->size());
  }
  const int64_t out_height = out.size(2), out_width = out.size(3);
  if (adaptive) {
    check(kernel[0] == out_height && kernel[1] == out_width, kOp, "out is ", out_height, " x ", out_width,
          ", but must be ", kernel[0], " x ", kernel[1]);
  } else {
    for (int i = 0; i < 2; ++i) {
      check(kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0, kOp,
            "kernel, stride and dilation must be positive, but are ", kernel[i], ", ", stride[i], " and ", dilation[i]);
      check(kind == "max" || dilation[i] == 1, kOp, "dilation is ", dilation[i],
            ", but goes with the largest values only");
      check(padding[i] >= 0 && padding[i] * 2 <= kernel[i], kOp, "padding is ", padding[i],
            ", but must be at most half of the kernel, ", kernel[i]);
      check(out.size(2 + i) == 0 || (out.size(2 + i) - 1) * stride[i] < x.size(2 + i) + padding[i], kOp, "out has ",
            out.size(2 + i), " windows in dimension ", 2 + i, ", but the last one would begin behind the padded x");
    }
  }
  if (out.numel() == 0) return;
  check(x.size(2) > 0 && x.size(3) > 0, kOp, "x has images of ", x.size(2), " x ", x.size(3), " pixels");

  WorkspaceFrame frame;
  PoolWindow* rows = frame.take<PoolWindow>(size_t(out_height));
  PoolWindow* columns = frame.take<PoolWindow>(size_t(out_width));
  float* divisors = frame.take<float>(size_t(out_width));
  if (adaptive) {
    find_adaptive_windows(rows, out_height, x.size(2));
    find_adaptive_windows(columns, out_width, x.size(3));
  } else {
    find_windows(rows, out_height, x.size(2), kernel[0], stride[0], padding[0], dilation[0], count_include_pad);
    find_windows(columns, out_width, x.size(3), kernel[1], stride[1], padding[1], dilation[1], count_include_pad);
  }
  for (int64_t i = 0; i < out_width; ++i) divisors[i] = float(columns[i].divisor);
  const auto adjacent = [&](const TensorView& t) { return t.size(1) == 1 || t.stride(1) == 1; };
  PoolArgs all = {.x = pool_images(x),
                  .out = pool_images(out),
                  .bfloat16 = x.dtype == DType::bfloat16,
                  .largest = kind == "max",
                  .channels_adjacent = adjacent(x) && adjacent(out) && x.size(1) > 1,
                  .rows = rows,
                  .columns = columns,
                  .step_y = adaptive ? 1 : int(dilation[0]),
                  .step_x = adaptive ? 1 : int(dilation[1]),
                  .channels = x.size(1),
                  .width = x.size(3),
                  .out_height = out_height,
                  .out_width = out_width,
                  .begin = 0,
                  .end = 0,
                  .divisor = int(divisor),
                  .stride_x = adaptive ? 0 : stride[1],
                  .left = adaptive ? 0 : padding[1],
                  .taps = adaptive ? 1 : kernel[1],
                  .divisors = divisors,
                  .line = nullptr,
                  .line_size = 0};
  if (!all.channels_adjacent) {
    all.line_size = pool_line_size(all.width, out_width, all.stride_x, all.left, all.taps, all.step_x);
  }
  const auto pool = pool_table.get();
  const int64_t work = out_width * rows[0].count * columns[0].count * (all.channels_adjacent ? x.size(1) : 1);
  const int64_t grain = std::max<int64_t>(1, tuning::kPoolWorkPerThread / std::max<int64_t>(work, 1));
  parallel_ranges(x.size(0) * out_height * (all.channels_adjacent ? 1 : x.size(1)), grain,
                  [&](int64_t begin, int64_t end) {
                    WorkspaceFrame own;
                    PoolArgs args = all;
                    args.begin = begin;
                    args.end = end;
                    args.line = own.take<float>(size_t(all.line_size));
                    pool(args);
                  });
}

}  // namespace lamina
