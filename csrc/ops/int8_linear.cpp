#include "ops/int8_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/kernels/int8_gemm.h"
#include "cpu/tuning.h"
#include "ops/checks.h"
#include "ops/epilogue.h"
#include "ops/parallel.h"
#include "ops/quantize_rows.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const Int8GemmArgs&)> int8_gemm_table;

namespace {

constexpr const char* kOp = "int8_linear";
constexpr int64_t kPanel = tuning::kInt8PanelChannels;
// 127 * 127 * k must stay below 2^31, or an int32 sum of extreme codes would wrap.
constexpr int64_t kMaxK = ((int64_t{1} << 31) - 1) / (127 * 127);
// The same for codes that somebody else made, which may be -128.
constexpr int64_t kMaxKOfCodes = ((int64_t{1} << 31) - 1) / (128 * 127);

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct PackedShape {
  int64_t n, k;
  int64_t k_padded = round_up(k, 4);
  int64_t n_padded = round_up(n, 16);
  int64_t panels = (n + kPanel - 1) / kPanel;

  int width(int64_t panel) const { return int(std::min(kPanel, n_padded - panel * kPanel)); }
  int channels(int64_t panel) const { return int(std::min(kPanel, n - panel * kPanel)); }
  int64_t offset(int64_t panel) const { return std::min(panel * kPanel, n_padded) * k_padded; }
  // As many zero bytes lie behind the panels as k has padding, so that the size tells k: a weight packed for 5 features
  // must refuse 6, although both are padded to 8.
  int64_t marker() const { return k_padded - k; }
  int64_t bytes() const { return n_padded * k_padded + marker(); }
};

// Says why x [*, k] and the packed bytes of n channels do not go together.
[[noreturn]] void fail_on_packed_size(const PackedShape& shape, int64_t bytes) {
  // The inverse of PackedShape::bytes, where there is one.
  const int64_t packed_k = shape.n_padded ? bytes / shape.n_padded - bytes % shape.n_padded : 0;
  if (packed_k > 0 && PackedShape{shape.n, packed_k}.bytes() == bytes) {
    fail(kOp, "x has ", shape.k, " features, but packed_weight was packed for ", packed_k);
  }
  fail(kOp, "packed_weight.data has ", bytes, " bytes, but a weight [", shape.n, ", ", shape.k, "] takes ",
       shape.bytes());
}

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

// x, and where its rows go as codes with an offset.
struct Input {
  const TensorView& x;
  const TensorView* row_scales;  // of int8 x with a scale for each row, or null
  float scale;                   // else: the one scale, or 0 for one that is found for each row
  OffsetCodes codes;

  OffsetCodes codes_from(int64_t row) const {
    return {codes.codes + row * codes.ld, codes.ld, codes.k_padded, codes.scales + row};
  }

  void prepare(int64_t begin, int64_t end) const {
    const int64_t shape[2] = {end - begin, x.size(1)};
    TensorView rows = x;
    rows.shape = shape;
    rows.data = x.as<char>() + begin * x.stride(0) * (x.dtype == DType::float32 ? 4 : x.dtype == DType::int8 ? 1 : 2);
    if (x.dtype != DType::int8) return quantize_rows_with_offset(rows, scale, codes_from(begin));
    add_offset(rows, codes_from(begin));
    for (int64_t i = begin; i < end; ++i) {
      codes.scales[i] = row_scales ? row_scales->as<float>()[i * row_scales->stride(0)] : scale;
    }
  }
};

// Into how many shares the rows are split, the rest of the threads going to panels of channels. A share of rows makes
// its own codes and waits for nobody, but reads all the weights: rows first, then, while a share stays worth that.
int64_t row_shares(int64_t rows, int64_t panels, int64_t threads) {
  const auto load = [&](int64_t shares) {
    const int64_t columns = std::max<int64_t>(1, threads / shares);
    return ((rows + shares - 1) / shares) * ((panels + columns - 1) / columns);
  };
  int64_t best = 1;
  for (int64_t shares = 2; shares <= std::min(rows / tuning::kInt8RowsPerShare, threads); ++shares) {
    if (threads % shares == 0 && load(shares) <= load(best)) best = shares;
  }
  return best;
}

// What one call computes with, checked.
struct Call {
  const int8_t* data;
  const int32_t* compensation;
  const float* scale;
  const float* bias;
  EpilogueMatrix residual;
  Activation activation;
  EpilogueMatrix out;
  float out_inverse;
};

EpilogueMatrix part_of(const EpilogueMatrix& m, int64_t row, int64_t column) {
  if (!m.data) return m;
  return {static_cast<char*>(m.data) + (row * m.ld + column) * m.format, m.ld, m.format};
}

void multiply(const Input& input, int64_t rows, const PackedShape& shape, const Call& call) {
  const int64_t work = rows * shape.n * shape.k / tuning::kInt8WorkPerThread;
  const int64_t threads = std::clamp<int64_t>(work, 1, max_threads());
  const int64_t by_rows = row_shares(rows, shape.panels, threads);
  const int64_t by_panels = std::min(shape.panels, std::max<int64_t>(1, threads / by_rows));
  if (by_panels > 1) input.prepare(0, rows);
  // Last here and in each task: last_isa() is to name this kernel, also on a thread that gets no task.
  int8_gemm_table.get();

  parallel_tasks(by_rows * by_panels, [&](int64_t task) {
    const int64_t r = task / by_panels, p = task % by_panels;
    const int64_t begin = rows * r / by_rows, count = rows * (r + 1) / by_rows - begin;
    const int64_t panel_begin = shape.panels * p / by_panels, panel_end = shape.panels * (p + 1) / by_panels;
    const int64_t first = panel_begin * kPanel;
    const int64_t blocks = (count * input.codes.ld + tuning::kInt8RowBlockBytes - 1) / tuning::kInt8RowBlockBytes;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = begin + count * block / blocks, end = begin + count * (block + 1) / blocks;
      if (by_panels == 1) input.prepare(row, end);
      const auto gemm = int8_gemm_table.get();
      const OffsetCodes codes = input.codes_from(row);
      gemm({.codes = codes.codes,
            .ld_codes = codes.ld,
            .x_scales = codes.scales,
            .rows = end - row,
            .k_padded = shape.k_padded,
            .panels = call.data + shape.offset(panel_begin),
            .channels = std::min(shape.n, panel_end * kPanel) - first,
            .compensation = call.compensation + first,
            .w_scales = call.scale + first,
            .bias = call.bias ? call.bias + first : nullptr,
            .residual = part_of(call.residual, row, first),
            .activation = call.activation,
            .out = part_of(call.out, row, first),
            .out_inverse = call.out_inverse});
    }
  });
}

EpilogueMatrix epilogue_matrix(const char* what, const TensorView& t, int64_t rows, int64_t n) {
  check_shape(kOp, what, t, {rows, n});
  check(n <= 1 || t.stride(1) == 1, kOp, "the rows of ", what, " must be contiguous");
  const auto format = t.dtype == DType::float32    ? EpilogueMatrix::f32
                      : t.dtype == DType::bfloat16 ? EpilogueMatrix::b16
                                                   : EpilogueMatrix::int8;
  return {t.data, t.stride(0), format};
}

}  // namespace

int64_t int8_linear_packed_size(int64_t n, int64_t k) { return PackedShape{n, k}.bytes(); }

void int8_linear_pack(const TensorView& weight, const TensorView& scale, const TensorView& data,
                      const TensorView& compensation) {
  constexpr const char* op = "int8_linear_pack";
  check_dtype(op, "weight", weight, {DType::int8});
  check_shape(op, "weight", weight, {-1, -1});
  check_contiguous(op, "weight", weight);
  const PackedShape shape{weight.size(0), weight.size(1)};
  check(shape.k <= kMaxK, op, "in_features is ", shape.k, ", but int32 sums are exact only up to ", kMaxK);
  check_dtype(op, "scale", scale, {DType::float32});
  check_shape(op, "scale", scale, {shape.n});
  check_contiguous(op, "scale", scale);
  check_dtype(op, "data", data, {DType::int8});
  check_shape(op, "data", data, {shape.bytes()});
  check_dtype(op, "compensation", compensation, {DType::int32});
  check_shape(op, "compensation", compensation, {shape.n_padded});
  check_contiguous(op, "compensation", compensation);
  check_contiguous(op, "data", data);
  for (int64_t i = 0; i < shape.n; ++i) {
    const float s = scale.as<float>()[i];
    check(std::isfinite(s) && s >= 0, op, "scale[", i, "] is ", s, ", but must be finite and not negative");
  }
  const int8_t* w = weight.as<int8_t>();
  for (int64_t i = 0; i < shape.n * shape.k; ++i) {
    check(w[i] != -128, op, "weight[", i / shape.k, ", ", i % shape.k, "] is -128, but codes must lie in [-127, 127]");
  }
  std::fill_n(data.as<int8_t>() + shape.offset(shape.panels), shape.marker(), int8_t{0});
  parallel_ranges(shape.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int width = shape.width(panel);
      int8_t* to = data.as<int8_t>() + shape.offset(panel);
      for (int c = 0; c < width; ++c) {
        const int64_t n = panel * kPanel + c;
        int32_t sum = 0;
        for (int64_t k = 0; k < shape.k_padded; ++k) {
          const int8_t code = n < shape.n && k < shape.k ? w[n * shape.k + k] : int8_t{0};
          to[k / 4 * 4 * width + 4 * c + k % 4] = code;
          sum += code;
        }
        compensation.as<int32_t>()[n] = int32_t(128u * uint32_t(sum));  // wraps around like the sums it corrects
      }
    }
  });
}

void int8_linear_unpack(const TensorView& data, const TensorView& weight) {
  constexpr const char* op = "int8_linear_unpack";
  check_dtype(op, "weight", weight, {DType::int8});
  check_shape(op, "weight", weight, {-1, -1});
  check_contiguous(op, "weight", weight);
  const PackedShape shape{weight.size(0), weight.size(1)};
  check_dtype(op, "data", data, {DType::int8});
  check_shape(op, "data", data, {shape.bytes()});
  for (int64_t n = 0; n < shape.n; ++n) {
    const int64_t panel = n / kPanel;
    const int8_t* from = data.as<int8_t>() + shape.offset(panel) + 4 * (n % kPanel);
    for (int64_t k = 0; k < shape.k; ++k) {
      weight.as<int8_t>()[n * shape.k + k] = from[k / 4 * 4 * shape.width(panel) + k % 4];
    }
  }
}

void int8_linear(const TensorView& x, const TensorView& data, const TensorView& scale, const TensorView& compensation,
                 const std::optional<TensorView>& bias, const std::string& activation,
                 const std::optional<TensorView>& residual, const std::optional<TensorView>& x_scale,
                 const std::optional<TensorView>& out_scale, const TensorView& out) {
  const bool quantized = x.dtype == DType::int8;
  if (!quantized || !x_scale) {
    check(!quantized, kOp, "x is int8, but x_scale, which says what its codes mean, is missing");
    check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  }
  check_shape(kOp, "x", x, {-1, -1});
  check_dtype(kOp, "packed_weight.scale", scale, {DType::float32});
  check_shape(kOp, "packed_weight.scale", scale, {-1});
  check_contiguous(kOp, "packed_weight.scale", scale);
  const int64_t rows = x.size(0);
  const PackedShape shape{scale.size(0), x.size(1)};
  check_dtype(kOp, "packed_weight.data", data, {DType::int8});
  check_shape(kOp, "packed_weight.data", data, {-1});
  check_contiguous(kOp, "packed_weight.data", data);
  if (data.size(0) != shape.bytes()) fail_on_packed_size(shape, data.size(0));
  check_dtype(kOp, "packed_weight.compensation", compensation, {DType::int32});
  check_shape(kOp, "packed_weight.compensation", compensation, {shape.n_padded});
  check_contiguous(kOp, "packed_weight.compensation", compensation);

  WorkspaceFrame frame;
  Call call{.data = data.as<int8_t>(),
            .compensation = compensation.as<int32_t>(),
            .scale = scale.as<float>(),
            .bias = bias ? float_bias(kOp, *bias, shape.n, frame) : nullptr,
            .residual = {},
            .activation = parse_activation(kOp, activation),
            .out = {},
            .out_inverse = 0};
  if (residual) {
    check_dtype(kOp, "residual", *residual, {DType::float32, DType::bfloat16});
    call.residual = epilogue_matrix("residual", *residual, rows, shape.n);
  }
  if (out_scale) {
    check_dtype(kOp, "out", out, {DType::int8});
    call.out_inverse = 1.0f / positive_scale(kOp, "out_scale", *out_scale);
  } else {
    check_dtype(kOp, "out", out, {DType::float32, DType::bfloat16});
  }
  call.out = epilogue_matrix("out", out, rows, shape.n);

  const bool scale_per_row = quantized && x_scale->ndim != 0;
  float given_scale = 0;
  if (scale_per_row) {
    check_dtype(kOp, "x_scale", *x_scale, {DType::float32});
    check_shape(kOp, "x_scale", *x_scale, {rows});
  } else if (x_scale) {
    given_scale = positive_scale(kOp, "x_scale", *x_scale);
  }
  check(!quantized || shape.k <= kMaxKOfCodes, kOp, "x has ", shape.k,
        " features, but int32 sums of int8 codes are exact only up to ", kMaxKOfCodes);
  if (rows == 0 || shape.n == 0) return;

  const int64_t ld = round_up(shape.k_padded, 64) + tuning::kInt8RowPadding;
  const Input input{.x = x,
                    .row_scales = scale_per_row ? &*x_scale : nullptr,
                    .scale = given_scale,
                    .codes = {frame.take<uint8_t>(rows * ld), ld, shape.k_padded, frame.take<float>(rows)}};
  multiply(input, rows, shape, call);
}

}  // namespace lamina
