#include "ops/weight_only_linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels/weight_only_gemm.h"
#include "cpu/tuning/int8_gemm.h"
#include "cpu/tuning/weight_only_gemm.h"
#include "ops/checks.h"
#include "ops/epilogue.h"
#include "ops/int8_linear.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const WeightOnlyRowsArgs<float>&)> weight_only_rows_f32_table;
constinit const KernelTable<void(const WeightOnlyRowsArgs<bf16>&)> weight_only_rows_bf16_table;
constinit const KernelTable<void(const WeightOnlyGemmArgs<float>&)> weight_only_gemm_f32_table;
constinit const KernelTable<void(const WeightOnlyGemmArgs<bf16>&)> weight_only_gemm_bf16_table;

namespace {

constexpr const char* kOp = "weight_only_linear";
constexpr int64_t kPanel = tuning::kInt8PanelChannels;
// The digits of x are at most 128 in magnitude: 128 * 127 * k must stay below 2^31 for int32 sums to be exact.
constexpr int64_t kMaxInt8K = ((int64_t{1} << 31) - 1) / (128 * 127);

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// An int4 weight [n, k] in memory.
struct Int4Shape {
  int64_t n, k, group;
  int64_t blocks = ceil_div(k, kInt4Block);
  int64_t group_blocks = group / kInt4Block;
  int64_t groups = ceil_div(blocks, group_blocks);
  int64_t slice_bytes = groups * kInt4ScaleBytes + blocks * kInt4BlockBytes;
  int64_t slices = ceil_div(n, kInt4Slice);

  // As many zero bytes lie behind the slices as k has padding, so that the size tells k, as in int8_linear.
  int64_t marker() const { return blocks * kInt4Block - k; }
  int64_t bytes() const { return slices * slice_bytes + marker(); }
  int64_t scale_offset(int64_t n_, int64_t g) const {
    return n_ / kInt4Slice * slice_bytes + g * (kInt4ScaleBytes + group_blocks * kInt4BlockBytes) + n_ % kInt4Slice * 2;
  }
  // The byte of input k_ of channel n_, and whether it lies in the byte's high half.
  int64_t code_offset(int64_t n_, int64_t k_) const {
    const int64_t block = k_ / kInt4Block, g = block / group_blocks;
    return n_ / kInt4Slice * slice_bytes + (g + 1) * kInt4ScaleBytes + block * kInt4BlockBytes +
           k_ % kInt4Block / 8 * (kInt4Slice * 4) + n_ % kInt4Slice * 4 + k_ % 4;
  }
  static bool high_half(int64_t k_) { return k_ % 8 >= 4; }
};

void check_group(const char* op, int64_t group) {
  check(group > 0 && group % kInt4Block == 0, op, "group_size is ", group, ", but must be a positive multiple of ",
        kInt4Block);
}

// The in_features that `bytes` were packed for, or -1.
int64_t packed_k(int64_t n, int64_t group, int64_t bytes) {
  const int64_t slices = ceil_div(n, kInt4Slice);
  for (int64_t marker = 0; slices > 0 && marker < kInt4Block; ++marker) {
    const int64_t slice = (bytes - marker) / slices;
    // Exact but for the last group, which may have fewer blocks for its scales.
    const int64_t group_blocks = group / kInt4Block;
    const int64_t guess = slice * group_blocks / (group_blocks * kInt4BlockBytes + kInt4ScaleBytes);
    for (int64_t blocks = std::max<int64_t>(guess - 1, 1); blocks <= guess + 1; ++blocks) {
      const int64_t k = blocks * kInt4Block - marker;
      if (Int4Shape{n, k, group}.bytes() == bytes) return k;
    }
  }
  return -1;
}

template <class T>
struct Tables;
template <>
struct Tables<float> {
  static auto rows() { return weight_only_rows_f32_table.get(); }
  static auto gemm() { return weight_only_gemm_f32_table.get(); }
};
template <>
struct Tables<bf16> {
  static auto rows() { return weight_only_rows_bf16_table.get(); }
  static auto gemm() { return weight_only_gemm_bf16_table.get(); }
};

template <class T>
void prepare(const TensorView& x, int64_t first, int64_t rows, int group, char* to) {
  const auto kernel = Tables<T>::rows();
  const int64_t k = x.size(1), column = x.stride(1), row_bytes = weight_only_row_bytes(k);
  parallel_ranges(rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(k, 1)), [&](int64_t begin, int64_t end) {
    const T* source = x.as<T>() + (first + begin) * x.stride(0);
    char* target = to + begin * row_bytes;
    if (column == 1 || k <= 1) return kernel({source, x.stride(0), end - begin, k, group, target});
    // Strided columns: gather one row at a time.
    WorkspaceFrame frame;
    T* row = frame.take<T>(k);
    for (int64_t i = begin; i < end; ++i, source += x.stride(0), target += row_bytes) {
      for (int64_t j = 0; j < k; ++j) row[j] = source[j * column];
      kernel({row, k, 1, k, group, target});
    }
  });
}

// Where one panel of either format lies.
struct Panels {
  const uint8_t* data;
  int64_t n, bytes_of_channel;  // int4: of 16 channels, divided by 16
  int64_t n_padded = round_up(n, 16);
  int64_t count = ceil_div(n, kPanel);

  int width(int64_t panel) const { return int(std::min(kPanel, n_padded - panel * kPanel)); }
  int channels(int64_t panel) const { return int(std::min(kPanel, n - panel * kPanel)); }
  const uint8_t* at(int64_t panel) const { return data + panel * kPanel * bytes_of_channel; }
};

template <class T>
void run(const TensorView& x, const Panels& panels, const float* scale, const int32_t* compensation, const float* bias,
         int group, Activation activation, const TensorView& out) {
  const int64_t k = x.size(1), row_bytes = weight_only_row_bytes(k);
  // Prepared rows are kept for a part of a long x only, or they would take as much memory as x itself.
  const int64_t chunk = std::max<int64_t>(16, tuning::kWeightOnlyChunkBytes / row_bytes);
  const int64_t block = std::max<int64_t>(8, tuning::kWeightOnlyRowBlockBytes / row_bytes / 8 * 8);
  WorkspaceFrame frame;
  char* prepared = frame.take<char>(std::min(chunk, x.size(0)) * row_bytes);
  for (int64_t first = 0; first < x.size(0); first += chunk) {
    const int64_t rows = std::min(chunk, x.size(0) - first);
    prepare<T>(x, first, rows, group, prepared);
    const auto gemm = Tables<T>::gemm();
    const int64_t threads =
        std::clamp<int64_t>(rows * out.size(1) * k / tuning::kWeightOnlyWorkPerThread, 1, max_threads());
    // Panels first: so each weight is read once a chunk. Rows are split only when there are too few panels.
    const int64_t by_panels = std::min(panels.count, threads);
    const int64_t by_rows = std::clamp<int64_t>(threads / by_panels, 1, ceil_div(rows, 8));
    parallel_tasks(by_panels * by_rows, [&](int64_t task) {
      const int64_t p = task % by_panels, r = task / by_panels;
      const int64_t row_end = rows * (r + 1) / by_rows;
      for (int64_t row = rows * r / by_rows; row < row_end; row += block) {
        for (int64_t panel = panels.count * p / by_panels; panel < panels.count * (p + 1) / by_panels; ++panel) {
          const int64_t n = panel * kPanel;
          gemm({.prepared = prepared + row * row_bytes,
                .rows = std::min(block, row_end - row),
                .k = k,
                .group = group,
                .panel = panels.at(panel),
                .width = panels.width(panel),
                .channels = panels.channels(panel),
                .compensation = compensation ? compensation + n : nullptr,
                .w_scales = scale ? scale + n : nullptr,
                .bias = bias ? bias + n : nullptr,
                .activation = activation,
                .out = out.as<T>() + (first + row) * out.stride(0) + n,
                .ldo = out.stride(0)});
        }
      }
    });
  }
}

void check_int4_sizes(const char* op, const TensorView& codes, const TensorView& scale, int64_t group,
                      const TensorView& data) {
  check_group(op, group);
  check_dtype(op, "codes", codes, {DType::int8});
  check_shape(op, "codes", codes, {-1, -1});
  check_contiguous(op, "codes", codes);
  const Int4Shape shape{codes.size(0), codes.size(1), group};
  check_dtype(op, "scale", scale, {DType::bfloat16});
  check_shape(op, "scale", scale, {shape.n, shape.groups});
  check_contiguous(op, "scale", scale);
  check_dtype(op, "data", data, {DType::uint8});
  check_shape(op, "data", data, {shape.bytes()});
  check_contiguous(op, "data", data);
}

}  // namespace

int64_t weight_only_linear_packed_size(int64_t n, int64_t k, int64_t group) {
  check_group("weight_only_linear_packed_size", group);
  return Int4Shape{n, k, group}.bytes();
}

void weight_only_linear_pack(const TensorView& codes, const TensorView& scale, int64_t group, const TensorView& data) {
  constexpr const char* op = "weight_only_linear_pack";
  check_int4_sizes(op, codes, scale, group, data);
  const Int4Shape shape{codes.size(0), codes.size(1), group};
  const int8_t* from = codes.as<int8_t>();
  for (int64_t i = 0; i < shape.n * shape.k; ++i) {
    check(from[i] >= -8 && from[i] <= 7, op, "codes[", i / shape.k, ", ", i % shape.k, "] is ", int(from[i]),
          ", but must lie in [-8, 7]");
  }
  const bf16* scales = scale.as<bf16>();
  for (int64_t i = 0; i < shape.n * shape.groups; ++i) {
    check((scales[i].bits & 0x7f80) != 0x7f80, op, "scale[", i / shape.groups, ", ", i % shape.groups,
          "] is not finite");
  }
  uint8_t* to = data.as<uint8_t>();
  std::fill_n(to + shape.slices * shape.slice_bytes, shape.marker(), uint8_t{0});
  parallel_ranges(shape.slices, 4, [&](int64_t begin, int64_t end) {
    // Every code 8, which means zero, and every scale 0: what is left of it is padding.
    std::fill_n(to + begin * shape.slice_bytes, (end - begin) * shape.slice_bytes, uint8_t{0x88});
    for (int64_t n = begin * kInt4Slice; n < end * kInt4Slice; ++n) {
      for (int64_t g = 0; g < shape.groups; ++g) {
        const bf16 value = n < shape.n ? scales[n * shape.groups + g] : bf16{0};
        std::memcpy(to + shape.scale_offset(n, g), &value, 2);
      }
      for (int64_t k = 0; n < shape.n && k < shape.k; ++k) {
        uint8_t& byte = to[shape.code_offset(n, k)];
        const uint8_t code = uint8_t(from[n * shape.k + k] + 8);
        byte = Int4Shape::high_half(k) ? uint8_t((byte & 0x0f) | code << 4) : uint8_t((byte & 0xf0) | code);
      }
    }
  });
}

void weight_only_linear_unpack(const TensorView& data, int64_t group, const TensorView& codes,
                               const TensorView& scale) {
  check_int4_sizes("weight_only_linear_unpack", codes, scale, group, data);
  const Int4Shape shape{codes.size(0), codes.size(1), group};
  const uint8_t* from = data.as<uint8_t>();
  parallel_ranges(shape.n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t g = 0; g < shape.groups; ++g) {
        std::memcpy(scale.as<bf16>() + n * shape.groups + g, from + shape.scale_offset(n, g), 2);
      }
      for (int64_t k = 0; k < shape.k; ++k) {
        const uint8_t byte = from[shape.code_offset(n, k)];
        codes.as<int8_t>()[n * shape.k + k] = int8_t((Int4Shape::high_half(k) ? byte >> 4 : byte & 15) - 8);
      }
    }
  });
}

void weight_only_linear(const TensorView& x, const TensorView& data, const std::optional<TensorView>& scale,
                        const std::optional<TensorView>& compensation, const std::optional<TensorView>& bias,
                        int64_t group, const std::string& activation, const TensorView& out) {
  check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  check_shape(kOp, "x", x, {-1, -1});
  check_dtype(kOp, "out", out, {x.dtype});
  const int64_t m = x.size(0), k = x.size(1);
  check_shape(kOp, "packed_weight.data", data, {-1});
  check_contiguous(kOp, "packed_weight.data", data);
  int64_t n, bytes_of_channel;
  if (group == 0) {
    check(scale && compensation, kOp, "an int8 packed_weight has scale and compensation");
    check_dtype(kOp, "packed_weight.scale", *scale, {DType::float32});
    check_shape(kOp, "packed_weight.scale", *scale, {-1});
    check_contiguous(kOp, "packed_weight.scale", *scale);
    n = scale->size(0);
    check_dtype(kOp, "packed_weight.data", data, {DType::int8});
    const int64_t bytes = int8_linear_packed_size(n, k);
    check(data.size(0) == bytes, kOp, "x has ", k, " features, but packed_weight.data has ", data.size(0),
          " bytes and not the ", bytes, " of a weight [", n, ", ", k, "]");
    check_dtype(kOp, "packed_weight.compensation", *compensation, {DType::int32});
    check_shape(kOp, "packed_weight.compensation", *compensation, {round_up(n, 16)});
    check_contiguous(kOp, "packed_weight.compensation", *compensation);
    check(k <= kMaxInt8K, kOp, "in_features is ", k, ", but int32 sums are exact only up to ", kMaxInt8K);
    bytes_of_channel = round_up(k, 4);
    check_shape(kOp, "out", out, {m, n});
  } else {
    check_group(kOp, group);
    check_shape(kOp, "out", out, {m, -1});
    n = out.size(1);
    check_dtype(kOp, "packed_weight.data", data, {DType::uint8});
    const Int4Shape shape{n, k, group};
    if (data.size(0) != shape.bytes()) {
      const int64_t packed = packed_k(n, group, data.size(0));
      check(packed < 0, kOp, "x has ", k, " features, but packed_weight was packed for ", packed);
      fail(kOp, "packed_weight.data has ", data.size(0), " bytes, but a weight [", n, ", ", k, "] in groups of ", group,
           " takes ", shape.bytes());
    }
    bytes_of_channel = shape.slice_bytes / kInt4Slice;
  }
  check(n <= 1 || out.stride(1) == 1, kOp, "the rows of out must be contiguous");
  const Activation act = parse_activation(kOp, activation);
  WorkspaceFrame frame;
  const float* bias_data = bias ? float_bias(kOp, *bias, n, frame) : nullptr;
  if (m == 0 || n == 0) return;
  const auto run_as = x.dtype == DType::float32 ? run<float> : run<bf16>;
  run_as(x, Panels{data.as<uint8_t>(), n, bytes_of_channel}, scale ? scale->as<float>() : nullptr,
         compensation ? compensation->as<int32_t>() : nullptr, bias_data, int(group), act, out);
}

}  // namespace lamina
