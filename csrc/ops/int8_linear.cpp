#include "ops/int8_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/kernels/int8_gemm.h"
#include "cpu/kernels/quantize_rows.h"
#include "cpu/tuning.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const QuantizeRowsArgs<float>&)> quantize_rows_f32_table;
constinit const KernelTable<void(const QuantizeRowsArgs<bf16>&)> quantize_rows_bf16_table;
constinit const KernelTable<void(const Int8GemmArgs<float>&)> int8_gemm_f32_table;
constinit const KernelTable<void(const Int8GemmArgs<bf16>&)> int8_gemm_bf16_table;

namespace {

constexpr const char* kOp = "int8_linear";
constexpr int64_t kPanel = tuning::kInt8PanelChannels;
// 127 * 127 * k must stay below 2^31, or an int32 sum of extreme codes would wrap.
constexpr int64_t kMaxK = ((int64_t{1} << 31) - 1) / (127 * 127);

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

Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  fail(kOp, "activation '", name, "' is unknown; use none, relu, gelu, gelu_tanh or silu");
}

template <class T>
struct Tables;
template <>
struct Tables<float> {
  static auto quantize() { return quantize_rows_f32_table.get(); }
  static auto gemm() { return int8_gemm_f32_table.get(); }
};
template <>
struct Tables<bf16> {
  static auto quantize() { return quantize_rows_bf16_table.get(); }
  static auto gemm() { return int8_gemm_bf16_table.get(); }
};

// The quantized activations of one call.
struct Codes {
  uint8_t* codes;
  int64_t ld;
  float* scales;
};

template <class T>
void quantize(const TensorView& x, const PackedShape& shape, const Codes& to) {
  const auto kernel = Tables<T>::quantize();
  const int64_t rows = x.size(0), k = x.size(1), column = x.stride(1);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(k, 1));
  parallel_ranges(rows, grain, [&](int64_t begin, int64_t end) {
    const T* source = x.as<T>() + begin * x.stride(0);
    QuantizeRowsArgs<T> args{source, x.stride(0),    end - begin,      k, to.codes + begin * to.ld,
                             to.ld,  shape.k_padded, to.scales + begin};
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

// Into how many shares the rows are split, the rest of the threads going to panels of channels. Splitting panels reads
// each weight once per call; splitting rows as well balances better when the panels do not divide by the threads.
int64_t row_shares(int64_t row_tiles, int64_t panels, int64_t threads) {
  const auto load = [&](int64_t shares) {
    const int64_t columns = std::max<int64_t>(1, threads / shares);
    return ((row_tiles + shares - 1) / shares) * ((panels + columns - 1) / columns);
  };
  int64_t best = 1;
  for (int64_t shares = 2; shares <= std::min(row_tiles, threads); ++shares) {
    if (threads % shares == 0 && load(shares) * 100 < load(best) * 95) best = shares;
  }
  return best;
}

template <class T>
void run(const TensorView& x, const int8_t* data, const float* scale, const int32_t* compensation, const float* bias,
         Activation activation, const TensorView& out, const PackedShape& shape) {
  const int64_t rows = x.size(0);
  WorkspaceFrame frame;
  const int64_t ld = round_up(shape.k_padded, 64) + tuning::kInt8RowPadding;
  const Codes x_codes{frame.take<uint8_t>(rows * ld), ld, frame.take<float>(rows)};
  quantize<T>(x, shape, x_codes);

  const auto gemm = Tables<T>::gemm();
  const int64_t work = rows * shape.n * shape.k / tuning::kInt8WorkPerThread;
  const int64_t threads = std::clamp<int64_t>(work, 1, max_threads());
  const int64_t tiles = (rows + 5) / 6;
  const int64_t by_rows = row_shares(tiles, shape.panels, threads);
  const int64_t by_panels = std::min(shape.panels, std::max<int64_t>(1, threads / by_rows));
  const int64_t block = std::max<int64_t>(6, tuning::kInt8RowBlockBytes / ld / 6 * 6);

  parallel_tasks(by_rows * by_panels, [&](int64_t task) {
    const int64_t r = task / by_panels, p = task % by_panels;
    const int64_t row_end = std::min(rows, tiles * (r + 1) / by_rows * 6);
    const int64_t panel_begin = shape.panels * p / by_panels, panel_end = shape.panels * (p + 1) / by_panels;
    for (int64_t row = tiles * r / by_rows * 6; row < row_end; row += block) {
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        const int64_t n = panel * kPanel;
        gemm({.codes = x_codes.codes + row * ld,
              .ld_codes = ld,
              .x_scales = x_codes.scales + row,
              .rows = std::min(block, row_end - row),
              .k_padded = shape.k_padded,
              .panel = data + shape.offset(panel),
              .width = shape.width(panel),
              .channels = shape.channels(panel),
              .compensation = compensation + n,
              .w_scales = scale + n,
              .bias = bias ? bias + n : nullptr,
              .activation = activation,
              .out = out.as<T>() + row * out.stride(0) + n,
              .ldo = out.stride(0)});
      }
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
                 const std::optional<TensorView>& bias, const std::string& activation, const TensorView& out) {
  check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  check_shape(kOp, "x", x, {-1, -1});
  check_dtype(kOp, "packed_weight.scale", scale, {DType::float32});
  check_shape(kOp, "packed_weight.scale", scale, {-1});
  check_contiguous(kOp, "packed_weight.scale", scale);
  const PackedShape shape{scale.size(0), x.size(1)};
  check_dtype(kOp, "packed_weight.data", data, {DType::int8});
  check_shape(kOp, "packed_weight.data", data, {-1});
  check_contiguous(kOp, "packed_weight.data", data);
  if (data.size(0) != shape.bytes()) fail_on_packed_size(shape, data.size(0));
  check_dtype(kOp, "packed_weight.compensation", compensation, {DType::int32});
  check_shape(kOp, "packed_weight.compensation", compensation, {shape.n_padded});
  check_contiguous(kOp, "packed_weight.compensation", compensation);
  check_dtype(kOp, "out", out, {x.dtype});
  check_shape(kOp, "out", out, {x.size(0), shape.n});
  check(shape.n <= 1 || out.stride(1) == 1, kOp, "the rows of out must be contiguous");
  const Activation act = parse_activation(activation);

  WorkspaceFrame frame;
  const float* bias_data = nullptr;
  if (bias) {
    check_dtype(kOp, "bias", *bias, {DType::float32, DType::bfloat16});
    check_shape(kOp, "bias", *bias, {shape.n});
    if (bias->dtype == DType::float32 && bias->is_contiguous()) {
      bias_data = bias->as<float>();
    } else {
      float* copy = frame.take<float>(shape.n);
      for (int64_t i = 0; i < shape.n; ++i) {
        if (bias->dtype == DType::float32) {
          copy[i] = bias->as<float>()[i * bias->stride(0)];
        } else {
          const uint32_t bits = uint32_t(bias->as<bf16>()[i * bias->stride(0)].bits) << 16;
          std::memcpy(&copy[i], &bits, 4);
        }
      }
      bias_data = copy;
    }
  }
  if (x.size(0) == 0 || shape.n == 0) return;
  const auto run_as = x.dtype == DType::float32 ? run<float> : run<bf16>;
  run_as(x, data.as<int8_t>(), scale.as<float>(), compensation.as<int32_t>(), bias_data, act, out, shape);
}

}  // namespace lamina
