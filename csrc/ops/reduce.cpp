#include "ops/reduce.h"

#include <algorithm>

#include "cpu/kernels/reduce.h"
#include "cpu/tuning/reduce.h"
#include "ops/checks.h"
#include "ops/loops.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const ReduceArgs<float>&)> reduce_f32_table;
constinit const KernelTable<void(const ReduceArgs<bf16>&)> reduce_bf16_table;

namespace {

constexpr const char* kOp = "reduce";

Reduction parse_reduction(const std::string& how) {
  if (how == "sum") return Reduction::sum;
  if (how == "mean") return Reduction::mean;
  if (how == "max") return Reduction::max;
  if (how == "min") return Reduction::min;
  fail(kOp, "how '", how, "' is unknown; use sum, mean, max or min");
}

// What is left over (with the strides of x and out), and what is reduced: runs of dimensions that are next to each
// other in the shape, whatever their strides, so that the order of a sum hangs on the shape alone.
struct Plan {
  Loops<2> kept;
  Loops<1> runs, run;
};

Plan plan_of(const TensorView& x, const bool* reduced, bool keepdim, const TensorView& out) {
  Plan plan;
  for (int i = 0, o = 0; i < x.ndim; ++i) {
    if (!reduced[i]) plan.kept.add(x.shape[i], {x.strides[i], out.strides[o]});
    o += keepdim || !reduced[i];
  }
  int last = x.ndim;  // the first dimension of the innermost run
  bool inside = false;
  for (int i = x.ndim - 1; i >= 0; --i) {
    if (x.shape[i] == 1) continue;
    if (reduced[i]) {
      inside = true;
      last = i;
    } else if (inside) {
      break;
    }
  }
  for (int i = 0; i < x.ndim; ++i) {
    if (reduced[i]) (i < last ? plan.runs : plan.run).add(x.shape[i], {x.strides[i]});
  }
  return plan;
}

template <class T>
void run(const TensorView& x, const Plan& plan, Reduction how, const TensorView& out,
         void (*kernel)(const ReduceArgs<T>&)) {
  Loops<2> kept = plan.kept;
  const int64_t outputs = kept.total(), runs = plan.runs.total(), n = plan.run.total();
  const int64_t work = std::max<int64_t>(1, runs * n);
  const ReduceArgs<T> all = {.x = x.as<const T>(),
                             .runs = n == 0 ? 0 : runs,
                             .run_step = plan.runs.step(0),
                             .n = n,
                             .step = plan.run.step(0),
                             .outputs = 0,
                             .x_output = kept.step(0),
                             .out = out.as<T>(),
                             .out_output = kept.step(1),
                             .columns = false,
                             .how = how};
  const int64_t grain = std::max<int64_t>(1, tuning::kReduceWorkPerThread / work);
  const bool even = plan.runs.count() <= 1 && plan.run.count() <= 1;
  const bool rows = even && (n <= 1 || all.step == 1);
  if (even && !(rows && n > 1)) {
    // Outputs whose elements lie side by side, if any do, make the innermost loop.
    for (int loop = kept.count() - 1; loop >= 0; --loop) {
      if (kept.stride(loop, 0) != 1) continue;
      const int64_t columns = kept.size(loop), out_step = kept.stride(loop, 1);
      const int64_t blocks = (columns + tuning::kReduceColumns - 1) / tuning::kReduceColumns;
      kept.remove(loop);
      const int64_t block_grain = std::max<int64_t>(1, grain / tuning::kReduceColumns);
      parallel_ranges(kept.total() * blocks, block_grain, [&](int64_t begin, int64_t end) {
        ReduceArgs<T> args = all;
        args.columns = true;
        args.x_output = 1;
        args.out_output = out_step;
        for (int64_t i = begin; i < end;) {
          const int64_t block = i % blocks, some = std::min(blocks - block, end - i);
          const int64_t first = block * tuning::kReduceColumns;
          kept.pieces(i / blocks, i / blocks + 1, [&](const int64_t (&at)[2], int64_t) {
            args.x = all.x + at[0] + first;
            args.out = all.out + at[1] + first * out_step;
            args.outputs = std::min(some * tuning::kReduceColumns, columns - first);
            kernel(args);
          });
          i += some;
        }
      });
      return;
    }
  }
  parallel_ranges(outputs, grain, [&](int64_t begin, int64_t end) {
    WorkspaceFrame frame;
    ReduceArgs<T> args = all;
    args.step = 1;
    // Elements that lie unevenly are brought together, for one output at a time.
    T* copy = rows ? nullptr : frame.take<T>(size_t(runs * n));
    kept.pieces(begin, end, [&](const int64_t (&at)[2], int64_t count) {
      args.x = all.x + at[0];
      args.out = all.out + at[1];
      if (rows) {
        args.outputs = count;
        return kernel(args);
      }
      args.outputs = 1;
      args.run_step = n;
      for (int64_t i = 0; i < count; ++i, args.out += all.out_output) {
        const T* first = all.x + at[0] + i * all.x_output;
        T* to = copy;
        plan.runs.pieces(0, runs, [&](const int64_t (&run_at)[1], int64_t some) {
          for (int64_t r = 0; r < some; ++r) {
            const T* from = first + run_at[0] + r * plan.runs.step(0);
            plan.run.pieces(0, n, [&](const int64_t (&piece_at)[1], int64_t size) {
              for (int64_t j = 0; j < size; ++j) *to++ = from[piece_at[0] + j * plan.run.step(0)];
            });
          }
        });
        args.x = copy;
        kernel(args);
      }
    });
  });
}

}  // namespace

void reduce(const TensorView& x, const std::vector<int64_t>& dims, bool keepdim, const std::string& how,
            const TensorView& out) {
  const Reduction reduction = parse_reduction(how);
  check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  check_dimensions(kOp, "x", x);
  bool reduced[Loops<1>::kMost] = {};
  if (dims.empty()) std::fill(reduced, reduced + x.ndim, true);
  for (const int64_t dim : dims) {
    const int at = checked_dim(kOp, x, dim);
    check(!reduced[at], kOp, "dim ", at, " of ", describe(x), " is given twice");
    reduced[at] = true;
  }
  int64_t wanted[Loops<1>::kMost], work = 1;
  TensorView form = {.ndim = 0, .shape = wanted, .dtype = x.dtype};
  for (int i = 0; i < x.ndim; ++i) {
    if (reduced[i]) work *= x.shape[i];
    if (!reduced[i] || keepdim) wanted[form.ndim++] = reduced[i] ? 1 : x.shape[i];
  }
  check(out.dtype == x.dtype && out.ndim == form.ndim && std::equal(wanted, wanted + form.ndim, out.shape), kOp,
        "out is ", describe(out), ", but must be ", describe(form));
  if (out.numel() == 0) return;
  const bool of_order = reduction == Reduction::max || reduction == Reduction::min;
  check(work > 0 || !of_order, kOp, "there is no ", how, " of nothing, but x is ", describe(x));

  const Plan plan = plan_of(x, reduced, keepdim, out);
  if (x.dtype == DType::float32) {
    run(x, plan, reduction, out, reduce_f32_table.get());
  } else {
    run(x, plan, reduction, out, reduce_bf16_table.get());
  }
}

}  // namespace lamina
