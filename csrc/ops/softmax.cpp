#include "ops/softmax.h"

#include <algorithm>

#include "cpu/kernels/softmax.h"
#include "cpu/tuning/softmax.h"
#include "ops/checks.h"
#include "ops/loops.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const SoftmaxArgs<float, float>&)> softmax_f32_table;
constinit const KernelTable<void(const SoftmaxArgs<bf16, bf16>&)> softmax_bf16_table;
constinit const KernelTable<void(const SoftmaxArgs<float, bf16>&)> softmax_f32_bf16_table;
constinit const KernelTable<void(const SoftmaxArgs<bf16, float>&)> softmax_bf16_f32_table;

namespace {

constexpr const char* kOp = "softmax";

template <class X, class Out>
void run(const TensorView& x, int dim, const TensorView& out, void (*kernel)(const SoftmaxArgs<X, Out>&)) {
  Loops<2> rows;
  for (int i = 0; i < x.ndim; ++i) {
    if (i != dim) rows.add(x.shape[i], {x.strides[i], out.strides[i]});
  }
  const int64_t n = x.ndim ? x.shape[dim] : 1;
  const int64_t x_step = n > 1 ? x.strides[dim] : 1, out_step = n > 1 ? out.strides[dim] : 1;
  const bool adjacent = x_step == 1 && out_step == 1;
  const int64_t grain = std::max<int64_t>(1, tuning::kSoftmaxWorkPerThread / n);
  const SoftmaxArgs<X, Out> all = {.x = x.as<const X>(),
                                   .x_row = rows.step(0),
                                   .x_step = x_step,
                                   .out = out.as<Out>(),
                                   .out_row = rows.step(1),
                                   .out_step = out_step,
                                   .rows = 0,
                                   .n = n,
                                   .scratch = nullptr};
  if (!adjacent) {
    // Rows that lie side by side in both, if any do, make the innermost loop.
    for (int loop = rows.count() - 1; loop >= 0; --loop) {
      if (rows.stride(loop, 0) != 1 || rows.stride(loop, 1) != 1) continue;
      const int64_t beside = rows.size(loop), blocks = (beside + 15) / 16;
      rows.remove(loop);
      parallel_ranges(rows.total() * blocks, std::max<int64_t>(1, grain / 16), [&](int64_t begin, int64_t end) {
        WorkspaceFrame frame;
        SoftmaxArgs<X, Out> args = all;
        args.x_row = args.out_row = 1;
        args.scratch = frame.take<float>(size_t(softmax_scratch(n, true)));
        for (int64_t i = begin; i < end;) {
          const int64_t block = i % blocks, some = std::min(blocks - block, end - i);
          rows.pieces(i / blocks, i / blocks + 1, [&](const int64_t (&at)[2], int64_t) {
            args.x = all.x + at[0] + block * 16;
            args.out = all.out + at[1] + block * 16;
            args.rows = std::min(some * 16, beside - block * 16);
            kernel(args);
          });
          i += some;
        }
      });
      return;
    }
  }
  parallel_ranges(rows.total(), grain, [&](int64_t begin, int64_t end) {
    WorkspaceFrame frame;
    SoftmaxArgs<X, Out> args = all;
    args.x_step = args.out_step = 1;
    args.scratch = frame.take<float>(size_t(softmax_scratch(n, false)));
    X* x_copy = x_step == 1 ? nullptr : frame.take<X>(size_t(n));
    Out* out_copy = out_step == 1 ? nullptr : frame.take<Out>(size_t(n));
    rows.pieces(begin, end, [&](const int64_t (&at)[2], int64_t count) {
      const X* x_row = all.x + at[0];
      Out* out_row = all.out + at[1];
      if (adjacent) {
        args.x = x_row;
        args.out = out_row;
        args.rows = count;
        return kernel(args);
      }
      args.rows = 1;
      for (int64_t row = 0; row < count; ++row, x_row += all.x_row, out_row += all.out_row) {
        for (int64_t i = 0; x_copy && i < n; ++i) x_copy[i] = x_row[i * x_step];
        args.x = x_copy ? x_copy : x_row;
        args.out = out_copy ? out_copy : out_row;
        kernel(args);
        for (int64_t i = 0; out_copy && i < n; ++i) out_row[i * out_step] = out_copy[i];
      }
    });
  });
}

}  // namespace

void softmax(const TensorView& x, int64_t dim, const TensorView& out) {
  check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  check_dtype(kOp, "out", out, {DType::float32, DType::bfloat16});
  check_dimensions(kOp, "x", x);
  check(out.ndim == x.ndim && std::equal(x.shape, x.shape + x.ndim, out.shape), kOp, "out is ", describe(out),
        ", but must have the shape of x, ", describe(x));
  const int along = checked_dim(kOp, x, dim);
  if (x.numel() == 0) return;
  const bool to_bf16 = out.dtype == DType::bfloat16;
  if (x.dtype == DType::float32) {
    to_bf16 ? run(x, along, out, softmax_f32_bf16_table.get()) : run(x, along, out, softmax_f32_table.get());
  } else {
    to_bf16 ? run(x, along, out, softmax_bf16_table.get()) : run(x, along, out, softmax_bf16_f32_table.get());
  }
}

}  // namespace lamina
