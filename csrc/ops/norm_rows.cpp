#include "ops/norm_rows.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/kernels/norm_rows.h"
#include "cpu/tuning/norm_rows.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const NormRowsArgs<float>&)> norm_rows_f32_table;
constinit const KernelTable<void(const NormRowsArgs<bf16>&)> norm_rows_bf16_table;

namespace {

int64_t product(const int64_t* sizes, int count) {
  int64_t n = 1;
  for (int i = 0; i < count; ++i) n *= sizes[i];
  return n;
}

// Whether stepping through all of these dimensions in order is stepping by one stride; `step` is that stride.
bool is_one_step(const int64_t* sizes, const int64_t* strides, int count, int64_t& step) {
  int64_t expected = 0;
  bool first = true;
  for (int i = count - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (first) step = expected = strides[i];
    if (strides[i] != expected) return false;
    first = false;
    expected *= sizes[i];
  }
  if (first) step = 0;
  return true;
}

// The offset of the index-th element in the order of the dimensions.
int64_t offset_of(int64_t index, const int64_t* sizes, const int64_t* strides, int count) {
  int64_t offset = 0;
  for (int i = count - 1; i >= 0; --i) {
    offset += index % sizes[i] * strides[i];
    index /= sizes[i];
  }
  return offset;
}

// A tensor seen as rows: the last `inner` dimensions are a row, those before them say which.
template <class T>
class Rows {
 public:
  Rows(const TensorView& t, int inner) : t_(t), outer_(t.ndim - inner), inner_(inner) {
    uniform_ = is_one_step(t.shape, t.strides, outer_, step_);
    int64_t step = 0;
    const bool evenly = is_one_step(t.shape + outer_, t.strides + outer_, inner, step);
    adjacent_ = evenly && (step == 1 || product(t.shape + outer_, inner) == 1);
  }

  // Whether a row is the elements behind its first, and every row `step` elements behind the one before.
  bool plain() const { return uniform_ && adjacent_; }
  bool adjacent() const { return adjacent_; }
  int64_t step() const { return step_; }
  const T* row(int64_t index) const {
    return t_.as<const T>() + (uniform_ ? index * step_ : offset_of(index, t_.shape, t_.strides, outer_));
  }
  void gather(int64_t index, T* to) const { gather(row(index), outer_, to); }

 private:
  T* gather(const T* from, int dim, T* to) const {
    const int64_t size = t_.shape[dim], stride = t_.strides[dim];
    if (dim + 1 < outer_ + inner_) {
      for (int64_t i = 0; i < size; ++i) to = gather(from + i * stride, dim + 1, to);
      return to;
    }
    for (int64_t i = 0; i < size; ++i) to[i] = from[i * stride];
    return to + size;
  }

  const TensorView& t_;
  int outer_, inner_;
  int64_t step_ = 0;
  bool uniform_, adjacent_;
};

void check_call(const NormRows& c) {
  const int inner = int(c.normalized_shape.size());
  check_dtype(c.op, "input", c.input, {DType::float32, DType::bfloat16});
  check(inner > 0, c.op, "normalized_shape is empty, but must name at least one dimension");
  const bool fits = c.input.ndim >= inner && std::equal(c.normalized_shape.begin(), c.normalized_shape.end(),
                                                        c.input.shape + c.input.ndim - inner);
  if (!fits) {
    const TensorView wanted = {.ndim = inner, .shape = c.normalized_shape.data(), .dtype = c.input.dtype};
    fail(c.op, "input is ", describe(c.input), ", but must end in normalized_shape, ", describe(wanted));
  }
  for (const auto& [what, parameter] : {std::pair{"weight", &c.weight}, std::pair{"bias", &c.bias}}) {
    if (!*parameter) continue;
    const TensorView& t = **parameter;
    check_dtype(c.op, what, t, {DType::float32, DType::bfloat16});
    check(t.ndim == inner && std::equal(t.shape, t.shape + inner, c.normalized_shape.begin()), c.op, what, " is ",
          describe(t), ", but must have the shape of the rows of ", describe(c.input), ", normalized_shape");
  }
  DType result = c.input.dtype;
  if (c.residual) {
    check_dtype(c.op, "residual", *c.residual, {DType::float32, DType::bfloat16});
    check(
        c.residual->ndim == c.input.ndim && std::equal(c.input.shape, c.input.shape + c.input.ndim, c.residual->shape),
        c.op, "residual is ", describe(*c.residual), ", but must have the shape of input, ", describe(c.input));
    if (c.residual->dtype == DType::float32) result = DType::float32;
  }
  const auto check_output = [&](const char* what, const TensorView& t) {
    check(
        t.dtype == result && t.ndim == c.input.ndim && std::equal(c.input.shape, c.input.shape + c.input.ndim, t.shape),
        c.op, what, " is ", describe(t), ", but must have the shape of input, ", describe(c.input), ", and be ",
        dtype_name(result));
    check_contiguous(c.op, what, t);
  };
  check_output("out", c.out);
  if (c.sum) {
    check(c.residual.has_value(), c.op, "a sum is asked for, but there is no residual to add");
    check_output("sum", *c.sum);
  }
}

// A weight or bias as float32, where it lies or copied to the workspace.
const float* as_floats(const std::optional<TensorView>& t, int64_t n, WorkspaceFrame& frame) {
  if (!t) return nullptr;
  const bool is_float = t->dtype == DType::float32;
  if (is_float && t->is_contiguous()) return t->as<const float>();
  float* copy = frame.take<float>(size_t(n));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = offset_of(i, t->shape, t->strides, t->ndim);
    if (is_float) {
      copy[i] = t->as<const float>()[at];
    } else {
      const uint32_t bits = uint32_t(t->as<const bf16>()[at].bits) << 16;
      std::memcpy(copy + i, &bits, 4);
    }
  }
  return copy;
}

// T: of the result and of x. R: of the residual.
template <class T, class R>
void run(const NormRows& c, const TensorView& x_view, const TensorView* residual_view, const float* weight,
         const float* bias, void (*kernel)(const NormRowsArgs<T>&)) {
  const int inner = int(c.normalized_shape.size());
  const int64_t n = product(c.normalized_shape.data(), inner), rows = c.input.numel() / n;
  const Rows<T> x(x_view, inner);
  const std::optional<Rows<R>> residual =
      residual_view ? std::optional<Rows<R>>({*residual_view, inner}) : std::nullopt;
  const bool plain = x.plain() && (!residual || residual->plain());

  parallel_ranges(rows, std::max<int64_t>(1, tuning::kNormWorkPerThread / n), [&](int64_t begin, int64_t end) {
    WorkspaceFrame frame;
    T* x_row = x.adjacent() ? nullptr : frame.take<T>(size_t(n));
    R* residual_row = !residual || residual->adjacent() ? nullptr : frame.take<R>(size_t(n));
    NormRowsArgs<T> args = {.weight = weight,
                            .bias = bias,
                            .out_row = n,
                            .sum_row = n,
                            .n = n,
                            .eps = float(c.eps),
                            .centred = c.centred,
                            .scratch = sizeof(T) == sizeof(float) ? nullptr : frame.take<float>(2 * size_t(n))};
    // Rows that lie evenly go together, others one by one.
    for (int64_t row = begin; row < end; row += args.rows) {
      args.rows = plain ? end - begin : 1;
      if (x_row) x.gather(row, x_row);
      args.x = x_row ? x_row : x.row(row);
      args.x_row = x.step();
      if (residual) {
        if (residual_row) residual->gather(row, residual_row);
        const R* r = residual_row ? residual_row : residual->row(row);
        if constexpr (std::is_same_v<T, R>) {
          args.residual = r;
        } else {
          args.residual_bf16 = r;
        }
        args.residual_row = residual->step();
      }
      args.out = c.out.as<T>() + row * n;
      args.sum = c.sum ? c.sum->as<T>() + row * n : nullptr;
      kernel(args);
    }
  });
}

}  // namespace

void norm_rows(const NormRows& c) {
  check_call(c);
  if (c.out.numel() == 0) return;
  const int64_t n = product(c.normalized_shape.data(), int(c.normalized_shape.size()));
  WorkspaceFrame frame;
  const float* weight = as_floats(c.weight, n, frame);
  const float* bias = as_floats(c.bias, n, frame);
  const TensorView* residual = c.residual ? &*c.residual : nullptr;
  if (c.out.dtype == DType::bfloat16) {
    run<bf16, bf16>(c, c.input, residual, weight, bias, norm_rows_bf16_table.get());
  } else if (!residual || residual->dtype == c.input.dtype) {
    run<float, float>(c, c.input, residual, weight, bias, norm_rows_f32_table.get());
  } else if (c.input.dtype == DType::float32) {
    run<float, bf16>(c, c.input, residual, weight, bias, norm_rows_f32_table.get());
  } else {
    run<float, bf16>(c, *residual, &c.input, weight, bias, norm_rows_f32_table.get());
  }
}

}  // namespace lamina
