#include "ops/quantize_rows.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/kernels/quantize_rows.h"
#include "cpu/tuning/quantize_rows.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<float(const float*, int64_t)> abs_max_f32_table;
constinit const KernelTable<float(const bf16*, int64_t)> abs_max_bf16_table;
constinit const KernelTable<void(const QuantizeRowsArgs<float>&)> quantize_rows_f32_table;
constinit const KernelTable<void(const QuantizeRowsArgs<bf16>&)> quantize_rows_bf16_table;

namespace {

constexpr const char* kOp = "quantize_rows";

template <class T>
auto kernel_for() {
  if constexpr (std::is_same_v<T, float>) {
    return quantize_rows_f32_table.get();
  } else {
    return quantize_rows_bf16_table.get();
  }
}

template <class T>
void quantize(const TensorView& x, float scale, uint8_t zero, const OffsetCodes& to) {
  const auto kernel = kernel_for<T>();
  const int64_t rows = x.size(0), k = x.size(1), column = x.stride(1);
  const int64_t grain = std::max<int64_t>(1, tuning::kQuantizeWorkPerThread / std::max<int64_t>(k, 1));
  parallel_ranges(rows, grain, [&](int64_t begin, int64_t end) {
    const T* source = x.as<T>() + begin * x.stride(0);
    QuantizeRowsArgs<T> args{.x = source,
                             .ldx = x.stride(0),
                             .rows = end - begin,
                             .k = k,
                             .codes = to.codes + begin * to.ld,
                             .ld_codes = to.ld,
                             .k_padded = to.k_padded,
                             .zero = zero,
                             .scale = scale,
                             .scales = to.scales + begin};
    if (column == 1 || k <= 1) return kernel(args);
    // Strided columns: gather one row at a time.
    WorkspaceFrame frame;
    T* row = frame.take<T>(k);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < k; ++j) row[j] = source[j * column];
      source += x.stride(0);
      args.x = row;
      args.rows = 1;
      kernel(args);
      args.codes += to.ld;
      ++args.scales;
    }
  });
}

void quantize_any(const TensorView& x, float scale, uint8_t zero, const OffsetCodes& to) {
  if (x.size(0) == 0) return;
  const auto of_dtype = x.dtype == DType::float32 ? quantize<float> : quantize<bf16>;
  of_dtype(x, scale, zero, to);
}

}  // namespace

float positive_scale(const char* op, const char* what, const TensorView& scale) {
  check_dtype(op, what, scale, {DType::float32});
  check_shape(op, what, scale, {});
  const float value = *scale.as<float>();
  check(std::isfinite(value) && value >= 1e-36f, op, what, " is ", value, ", but must be finite and at least 1e-36");
  return value;
}

void quantize_rows_with_offset(const TensorView& x, float scale, const OffsetCodes& to) {
  quantize_any(x, scale, 128, to);
}

void quantize_rows(const TensorView& x, const std::optional<TensorView>& scale, const TensorView& codes,
                   const TensorView& scales) {
  check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  check_shape(kOp, "x", x, {-1, -1});
  check_dtype(kOp, "codes", codes, {DType::int8});
  check_shape(kOp, "codes", codes, {x.size(0), x.size(1)});
  check(x.size(1) <= 1 || codes.stride(1) == 1, kOp, "the rows of codes must be contiguous");
  check_dtype(kOp, "scales", scales, {DType::float32});
  check_shape(kOp, "scales", scales, {x.size(0)});
  check_contiguous(kOp, "scales", scales);
  const float given = scale ? positive_scale(kOp, "scale", *scale) : 0.0f;
  quantize_any(x, given, 0, {codes.as<uint8_t>(), codes.stride(0), x.size(1), scales.as<float>()});
}

}  // namespace lamina
