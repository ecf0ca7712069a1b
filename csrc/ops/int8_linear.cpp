#include "ops/int8_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/kernels/int8_gemm.h"
#include "cpu/tuning/int8_gemm.h"
#include "ops/checks.h"
#include "ops/int8_operands.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const Int8GemmArgs&)> int8_gemm_table;

namespace {

constexpr const char* kOp = "int8_linear";
constexpr int64_t kPanel = tuning::kInt8PanelChannels;
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

void multiply(const Int8Operands& call, const OffsetCodes& all_codes, int64_t rows, const PackedShape& shape,
              const int8_t* data, const int32_t* compensation) {
  const int64_t work = rows * shape.n * shape.k / tuning::kInt8WorkPerThread;
  const int64_t threads = std::clamp<int64_t>(work, 1, max_threads());
  const int64_t by_rows = row_shares(rows, shape.panels, threads);
  const int64_t by_panels = std::min(shape.panels, std::max<int64_t>(1, threads / by_rows));
  if (by_panels > 1) call.rows.prepare(0, rows, all_codes);
  // Last here and in each task: last_isa() is to name this kernel, also on a thread that gets no task.
  int8_gemm_table.get();

  parallel_tasks(by_rows * by_panels, [&](int64_t task) {
    const int64_t r = task / by_panels, p = task % by_panels;
    const int64_t begin = rows * r / by_rows, count = rows * (r + 1) / by_rows - begin;
    const int64_t panel_begin = shape.panels * p / by_panels, panel_end = shape.panels * (p + 1) / by_panels;
    const int64_t first = panel_begin * kPanel;
    const int64_t blocks = (count * all_codes.ld + tuning::kInt8RowBlockBytes - 1) / tuning::kInt8RowBlockBytes;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = begin + count * block / blocks, end = begin + count * (block + 1) / blocks;
      const OffsetCodes codes = all_codes.from(row);
      if (by_panels == 1) call.rows.prepare(row, end, codes);
      const auto gemm = int8_gemm_table.get();
      Int8GemmArgs args = call.epilogue(row, first);
      args.codes = codes.codes;
      args.ld_codes = codes.ld;
      args.x_scales = codes.scales;
      args.rows = end - row;
      args.k_padded = shape.k_padded;
      args.panels = data + shape.offset(panel_begin);
      args.channels = std::min(shape.n, panel_end * kPanel) - first;
      args.compensation = compensation + first;
      gemm(args);
    }
  });
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
  check(shape.k <= kInt8MaxK, op, "in_features is ", shape.k, ", but int32 sums are exact only up to ", kInt8MaxK);
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
  check_int8_x(kOp, x, x_scale.has_value());
  const PackedShape shape{check_w_scale(kOp, scale), x.size(1)};
  check_dtype(kOp, "packed_weight.data", data, {DType::int8});
  check_shape(kOp, "packed_weight.data", data, {-1});
  check_contiguous(kOp, "packed_weight.data", data);
  if (data.size(0) != shape.bytes()) fail_on_packed_size(shape, data.size(0));
  check_dtype(kOp, "packed_weight.compensation", compensation, {DType::int32});
  check_shape(kOp, "packed_weight.compensation", compensation, {shape.n_padded});
  check_contiguous(kOp, "packed_weight.compensation", compensation);

  WorkspaceFrame frame;
  const Int8Operands operands =
      int8_operands(kOp, x, scale, bias, activation, residual, x_scale, out_scale, out, frame);
  if (x.size(0) == 0 || shape.n == 0) return;
  multiply(operands, take_codes(x.size(0), shape.k_padded, frame), x.size(0), shape, data.as<int8_t>(),
           compensation.as<int32_t>());
}

}  // namespace lamina
