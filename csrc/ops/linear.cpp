#include "ops/linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels/linear_gemm.h"
#include "cpu/kernels/panel_gemm.h"
#include "cpu/tuning/linear.h"
#include "ops/checks.h"
#include "ops/epilogue.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const LinearGemmArgs&)> linear_gemm_table;

namespace {

constexpr const char* kOp = "linear";
constexpr int64_t kPanel = tuning::kLinearPanelChannels;
// Copies between layouts go by squares of so many elements: a cache line of each side is used while it is there.
constexpr int64_t kSquare = 16;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t round_up(int64_t n, int64_t multiple) { return divide_up(n, multiple) * multiple; }

float value_of(const TensorView& t, int64_t at) {
  if (t.dtype == DType::float32) return t.as<const float>()[at];
  const uint32_t bits = uint32_t(t.as<const bf16>()[at].bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Calls body(row, k) for all of [begin, end) x [0, columns), square by square.
template <class Body>
void for_each_square(int64_t begin, int64_t end, int64_t columns, const Body& body) {
  for (int64_t row = begin; row < end; row += kSquare) {
    for (int64_t column = 0; column < columns; column += kSquare) {
      for (int64_t r = row; r < std::min(row + kSquare, end); ++r) {
        for (int64_t c = column; c < std::min(column + kSquare, columns); ++c) body(r, c);
      }
    }
  }
}

// Rows [first, first + rows) of x as contiguous floats.
void copy_rows(const TensorView& x, int64_t first, int64_t rows, float* to) {
  const int64_t k = x.size(1), row_stride = x.stride(0), column_stride = x.stride(1);
  const int64_t grain = std::max<int64_t>(kSquare, tuning::kLinearWorkPerThread / 4 / std::max<int64_t>(k, 1));
  parallel_ranges(rows, grain, [&](int64_t begin, int64_t end) {
    if (x.dtype == DType::bfloat16 && column_stride == 1) {
      for (int64_t row = begin; row < end; ++row) {
        const bf16* __restrict from = x.as<const bf16>() + (first + row) * row_stride;
        float* __restrict copy = to + row * k;
        for (int64_t i = 0; i < k; ++i) {
          const uint32_t bits = uint32_t(from[i].bits) << 16;
          std::memcpy(copy + i, &bits, 4);
        }
      }
      return;
    }
    for_each_square(begin, end, k, [&](int64_t row, int64_t i) {
      to[row * k + i] = value_of(x, (first + row) * row_stride + i * column_stride);
    });
  });
}

// What `rows` rows of a call cost, in rows: reading the weights takes the time of a few.
int64_t cost_of(int64_t rows) { return std::max(rows, tuning::kLinearLeastRows); }

// Into how many shares the rows are split, the rest of the threads going to panels. Panels first: so each weight is
// read once, and by the thread that read it at the last call.
int64_t row_shares(int64_t rows, int64_t channels, int64_t threads) {
  const int64_t panels = divide_up(channels, kPanel);
  const auto load = [&](int64_t shares) {
    const int64_t most = divide_up(panels, std::min(panels, threads / shares));
    return cost_of(divide_up(rows, shares)) * std::min(channels, most * kPanel);
  };
  int64_t best = 1;
  for (int64_t shares = 2; shares <= std::min(rows, threads); ++shares) {
    if (load(shares) < load(best)) best = shares;
  }
  return best;
}

// All rows of `all`, which is a call of the kernel, by as many threads as they are worth.
void multiply(const LinearGemmArgs& all) {
  const auto gemm = linear_gemm_table.get();
  const int64_t work = cost_of(all.rows) * all.channels * all.k / tuning::kLinearWorkPerThread;
  const int64_t threads = work < 2 ? 1 : std::min<int64_t>(work, max_threads());
  if (threads == 1) return gemm(all);

  const int64_t panels = divide_up(all.channels, kPanel);
  const int64_t by_rows = row_shares(all.rows, all.channels, threads), by_panels = std::min(panels, threads / by_rows);
  parallel_tasks(by_rows * by_panels, [&](int64_t task) {
    const int64_t r = task / by_panels, p = task % by_panels;
    const int64_t row = all.rows * r / by_rows, first = panels * p / by_panels * kPanel;
    LinearGemmArgs part = all;
    part.x += row * all.ldx;
    part.rows = all.rows * (r + 1) / by_rows - row;
    part.panels += first * all.k;
    part.channels = std::min(all.channels, panels * (p + 1) / by_panels * kPanel) - first;
    if (part.bias) part.bias += first;
    part.residual = part_of(all.residual, row, first);
    part.out = part_of(all.out, row, first);
    gemm(part);
  });
}

// The packed weight's checks; returns its data.
const float* checked_data(const char* op, const char* what, const TensorView& data, int64_t n, int64_t k) {
  check_dtype(op, what, data, {DType::float32});
  check_shape(op, what, data, {round_up(n, kPanelLanes), k});
  check_contiguous(op, what, data);
  return data.as<const float>();
}

}  // namespace

void linear_pack(const TensorView& weight, const TensorView& data) {
  constexpr const char* op = "linear_pack";
  check_dtype(op, "weight", weight, {DType::float32});
  check_shape(op, "weight", weight, {-1, -1});
  const int64_t n = weight.size(0), k = weight.size(1);
  checked_data(op, "data", data, n, k);
  const float* from = weight.as<const float>();
  const int64_t row_stride = weight.stride(0), column_stride = weight.stride(1);
  parallel_ranges(divide_up(n, kPanel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel, width = std::min(kPanel, round_up(n - first, kPanelLanes));
      float* to = data.as<float>() + first * k;
      for_each_square(0, width, k, [&](int64_t c, int64_t i) {
        to[i * width + c] = first + c < n ? from[(first + c) * row_stride + i * column_stride] : 0.0f;
      });
    }
  });
}

void linear_unpack(const TensorView& data, const TensorView& weight) {
  constexpr const char* op = "linear_unpack";
  check_dtype(op, "weight", weight, {DType::float32});
  check_shape(op, "weight", weight, {-1, -1});
  check_contiguous(op, "weight", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  const float* from = checked_data(op, "data", data, n, k);
  parallel_ranges(divide_up(n, kPanel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel, width = std::min(kPanel, round_up(n - first, kPanelLanes));
      for_each_square(0, std::min(kPanel, n - first), k, [&](int64_t c, int64_t i) {
        weight.as<float>()[(first + c) * k + i] = from[first * k + i * width + c];
      });
    }
  });
}

void linear(const TensorView& x, const TensorView& data, const std::optional<TensorView>& bias,
            const std::string& activation, const std::optional<TensorView>& residual, const TensorView& out) {
  check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  check_shape(kOp, "x", x, {-1, -1});
  check_dtype(kOp, "out", out, {x.dtype});
  check_shape(kOp, "out", out, {x.size(0), -1});
  const int64_t rows = x.size(0), k = x.size(1), n = out.size(1);
  check(data.ndim != 2 || data.size(1) == k, kOp, "x has ", k, " features, but packed_weight was packed for ",
        data.ndim == 2 ? data.size(1) : 0);
  LinearGemmArgs args{};
  args.panels = checked_data(kOp, "packed_weight.data", data, n, k);
  args.k = k;
  args.channels = n;
  WorkspaceFrame frame;
  args.bias = bias ? float_bias(kOp, *bias, n, frame) : nullptr;
  args.activation = parse_activation(kOp, activation);
  if (residual) {
    check_dtype(kOp, "residual", *residual, {DType::float32, DType::bfloat16});
    args.residual = epilogue_matrix(kOp, "residual", *residual, rows, n);
  }
  args.out = epilogue_matrix(kOp, "out", out, rows, n);
  if (rows == 0 || n == 0) return;

  args.rows = rows;
  if (x.dtype == DType::float32 && (x.stride(1) == 1 || k <= 1)) {
    args.x = x.as<const float>();
    args.ldx = k == 0 ? 0 : x.stride(0);
    return multiply(args);
  }
  const int64_t at_once = std::clamp<int64_t>(tuning::kLinearCopyBytes / (4 * std::max<int64_t>(k, 1)), 1, rows);
  float* copy = frame.take<float>(at_once * k);
  args.x = copy;
  args.ldx = k;
  const LinearGemmArgs whole = args;
  for (int64_t row = 0; row < rows; row += at_once) {
    args.rows = std::min(at_once, rows - row);
    args.residual = part_of(whole.residual, row, 0);
    args.out = part_of(whole.out, row, 0);
    copy_rows(x, row, args.rows, copy);
    multiply(args);
  }
}

}  // namespace lamina
