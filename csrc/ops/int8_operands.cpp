#include "ops/int8_operands.h"

#include <algorithm>
#include <cstring>

#include "cpu/tuning/int8_gemm.h"
#include "cpu/tuning/quantize_rows.h"
#include "ops/checks.h"
#include "ops/epilogue.h"
#include "ops/parallel.h"

namespace lamina {

namespace {

// int8 codes -> the same with the offset.
void add_offset(const TensorView& x, const OffsetCodes& to) {
  const int64_t grain = std::max<int64_t>(1, tuning::kQuantizeWorkPerThread / std::max<int64_t>(x.size(1), 1));
  parallel_ranges(x.size(0), grain, [&](int64_t begin, int64_t end) {
    // By value: a store of bytes may change anything that is only referred to, and the loop would not vectorize.
    const int64_t k = x.size(1), column = x.stride(1);
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* __restrict from = x.as<uint8_t>() + row * x.stride(0);
      uint8_t* __restrict codes = to.codes + row * to.ld;
      if (column == 1) {
        for (int64_t i = 0; i < k; ++i) codes[i] = from[i] ^ 0x80;
      } else {
        for (int64_t i = 0; i < k; ++i) codes[i] = from[i * column] ^ 0x80;
      }
      std::memset(codes + k, 0x80, size_t(to.k_padded - k));
    }
  });
}

}  // namespace

void Int8Rows::prepare(int64_t begin, int64_t end, const OffsetCodes& to) const {
  const int64_t shape[2] = {end - begin, x->size(1)};
  TensorView some = *x;
  some.shape = shape;
  some.data = x->as<char>() + begin * x->stride(0) * (x->dtype == DType::float32 ? 4 : x->dtype == DType::int8 ? 1 : 2);
  if (x->dtype != DType::int8) return quantize_rows_with_offset(some, scale, to);
  add_offset(some, to);
  for (int64_t i = begin; i < end; ++i) {
    to.scales[i - begin] = row_scales ? row_scales->as<float>()[i * row_scales->stride(0)] : scale;
  }
}

Int8GemmArgs Int8Operands::epilogue(int64_t row, int64_t column) const {
  Int8GemmArgs args{};
  args.w_scales = w_scales + column;
  args.bias = bias ? bias + column : nullptr;
  args.residual = part_of(residual, row, column);
  args.activation = activation;
  args.out = part_of(out, row, column);
  args.out_inverse = out_inverse;
  return args;
}

void check_int8_x(const char* op, const TensorView& x, bool has_scale) {
  const bool quantized = x.dtype == DType::int8;
  if (!quantized || !has_scale) {
    check(!quantized, op, "x is int8, but x_scale, which says what its codes mean, is missing");
    check_dtype(op, "x", x, {DType::float32, DType::bfloat16});
  }
  check_shape(op, "x", x, {-1, -1});
}

int64_t check_w_scale(const char* op, const TensorView& scale) {
  check_dtype(op, "packed_weight.scale", scale, {DType::float32});
  check_shape(op, "packed_weight.scale", scale, {-1});
  check_contiguous(op, "packed_weight.scale", scale);
  return scale.size(0);
}

OffsetCodes take_codes(int64_t rows, int64_t k_padded, WorkspaceFrame& frame) {
  const int64_t ld = (k_padded + 63) / 64 * 64 + tuning::kInt8RowPadding;
  return {frame.take<uint8_t>(rows * ld), ld, k_padded, frame.take<float>(rows)};
}

Int8Operands int8_operands(const char* op, const TensorView& x, const TensorView& w_scale,
                           const std::optional<TensorView>& bias, const std::string& activation,
                           const std::optional<TensorView>& residual, const std::optional<TensorView>& x_scale,
                           const std::optional<TensorView>& out_scale, const TensorView& out, WorkspaceFrame& frame) {
  const int64_t rows = x.size(0), k = x.size(1), n = w_scale.size(0);
  const bool quantized = x.dtype == DType::int8;
  Int8Operands all{.rows = {.x = &x, .row_scales = nullptr, .scale = 0},
                   .w_scales = w_scale.as<float>(),
                   .bias = bias ? float_bias(op, *bias, n, frame) : nullptr,
                   .residual = {},
                   .activation = parse_activation(op, activation),
                   .out = {},
                   .out_inverse = 0};
  if (residual) {
    check_dtype(op, "residual", *residual, {DType::float32, DType::bfloat16});
    all.residual = epilogue_matrix(op, "residual", *residual, rows, n);
  }
  if (out_scale) {
    check_dtype(op, "out", out, {DType::int8});
    all.out_inverse = 1.0f / positive_scale(op, "out_scale", *out_scale);
  } else {
    check_dtype(op, "out", out, {DType::float32, DType::bfloat16});
  }
  all.out = epilogue_matrix(op, "out", out, rows, n);
  if (quantized && x_scale->ndim != 0) {
    check_dtype(op, "x_scale", *x_scale, {DType::float32});
    check_shape(op, "x_scale", *x_scale, {rows});
    all.rows.row_scales = &*x_scale;
  } else if (x_scale) {
    all.rows.scale = positive_scale(op, "x_scale", *x_scale);
  }
  check(!quantized || k <= kInt8MaxKOfCodes, op, "x has ", k,
        " features, but int32 sums of int8 codes are exact only up to ", kInt8MaxKOfCodes);
  return all;
}

}  // namespace lamina
