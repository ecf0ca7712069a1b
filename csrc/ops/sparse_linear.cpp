#include "ops/sparse_linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels/sparse_gemm.h"
#include "cpu/tuning.h"
#include "ops/checks.h"
#include "ops/epilogue.h"
#include "ops/parallel.h"
#include "ops/sparse_format.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<SparseColumns(int)> sparse_columns_table;
constinit const KernelTable<void(const SparsePanelArgs<float>&)> sparse_panel_f32_table;
constinit const KernelTable<void(const SparsePanelArgs<bf16>&)> sparse_panel_bf16_table;
constinit const KernelTable<void(const SparseGemmArgs<float>&)> sparse_gemm_f32_table;
constinit const KernelTable<void(const SparseGemmArgs<bf16>&)> sparse_gemm_bf16_table;
constinit const KernelTable<void(const SparseFinishArgs<float>&)> sparse_finish_f32_table;
constinit const KernelTable<void(const SparseFinishArgs<bf16>&)> sparse_finish_bf16_table;
constinit const KernelTable<void(const SparseFewArgs<float>&)> sparse_few_f32_table;
constinit const KernelTable<void(const SparseFewArgs<bf16>&)> sparse_few_bf16_table;
constinit const KernelTable<void(const SparseFewFinishArgs<float>&)> sparse_few_finish_f32_table;
constinit const KernelTable<void(const SparseFewFinishArgs<bf16>&)> sparse_few_finish_bf16_table;

namespace {

constexpr const char* kOp = "sparse_linear";
constexpr std::initializer_list<const char*> kPatterns = {"unstructured", "2x1", "4x1"};
constexpr std::initializer_list<DType> kDTypes = {DType::float32, DType::bfloat16};
// What finishing kernels read behind the last channel.
constexpr int64_t kSlack = 16;

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

template <class T>
struct Tables;
template <>
struct Tables<float> {
  static auto panel() { return sparse_panel_f32_table.get(); }
  static auto gemm() { return sparse_gemm_f32_table.get(); }
  static auto finish() { return sparse_finish_f32_table.get(); }
  static auto few() { return sparse_few_f32_table.get(); }
  static auto few_finish() { return sparse_few_finish_f32_table.get(); }
};
template <>
struct Tables<bf16> {
  static auto panel() { return sparse_panel_bf16_table.get(); }
  static auto gemm() { return sparse_gemm_bf16_table.get(); }
  static auto finish() { return sparse_finish_bf16_table.get(); }
  static auto few() { return sparse_few_bf16_table.get(); }
  static auto few_finish() { return sparse_few_finish_bf16_table.get(); }
};

SparseCut cut_of(const char* op, const std::string& pattern) {
  const SparsePattern shape = parse_sparse_pattern(op, pattern, kPatterns);
  const int64_t inputs = shape.rows == 1   ? tuning::kSparseInputs1
                         : shape.rows == 2 ? tuning::kSparseInputs2
                                           : tuning::kSparseInputs4;
  return {pattern, shape, inputs, tuning::kSparseSlab};
}

SparseForm open(const char* op, const TensorView& data) { return open_sparse(op, data, kPatterns, kDTypes); }

struct Call {
  const TensorView& x;
  const SparseForm& form;
  const float* bias;
  Activation activation;
  const TensorView& out;

  int64_t rows() const { return x.size(0); }
  const float* bias_of(int64_t slab) const { return bias ? bias + slab * form.header.slab : nullptr; }
  // How many threads the work is worth.
  int64_t threads() const {
    const int64_t work = (form.header.blocks * form.pattern.rows + form.n()) * rows() + form.k() * rows();
    return std::clamp<int64_t>(work / tuning::kSparseWorkPerThread, 1, max_threads());
  }
};

template <class V>
SparseChunk<V> chunk_of(const SparseForm& form, int64_t k_block, int64_t slab) {
  const int64_t i = k_block * form.slabs + slab;
  return {.groups = form.groups + form.group_first[i],
          .group_count = form.group_first[i + 1] - form.group_first[i],
          .index = form.index + form.chunk_first[i],
          .values = reinterpret_cast<const V*>(form.values) + form.chunk_first[i] * form.pattern.rows,
          .rows = form.pattern.rows,
          .add = k_block > 0};
}

// x[first, first + count) of inputs [k, k + inputs) as a panel.
template <class T>
void fill_panel(const TensorView& x, int64_t first, int count, int columns, int64_t k, int64_t inputs, float* panel) {
  const int64_t column = x.stride(1);
  const T* rows[kSparseColumns];
  const T* from = x.as<T>() + first * x.stride(0) + k * column;
  if (column == 1 || inputs == 1) {
    for (int m = 0; m < count; ++m) rows[m] = from + m * x.stride(0);
    return Tables<T>::panel()({rows, count, columns, inputs, panel});
  }
  // Strided columns: gathered first.
  WorkspaceFrame frame;
  T* copy = frame.take<T>(count * inputs);
  for (int m = 0; m < count; ++m) {
    T* to = copy + m * inputs;
    for (int64_t i = 0; i < inputs; ++i) to[i] = from[m * x.stride(0) + i * column];
    rows[m] = to;
  }
  Tables<T>::panel()({rows, count, columns, inputs, panel});
}

// Rows [first, first + count) of x times the slabs [begin, end).
template <class T, class V>
void multiply_panel(const Call& call, int64_t first, int count, int columns, int64_t begin, int64_t end) {
  const SparseForm& form = call.form;
  WorkspaceFrame frame;
  const int64_t slab_floats = round_up(form.header.slab, form.pattern.rows) * columns;
  float* panel = frame.take<float>(std::min<int64_t>(form.header.k_block, form.k()) * columns);
  // Sums of all slabs wait between two ranges of inputs; with one range those of a slab are done at once.
  const bool single = form.k_blocks <= 1;
  float* y = frame.take<float>((single ? 1 : end - begin) * slab_floats + kSlack * columns);
  for (int64_t k_block = 0; k_block < form.k_blocks; ++k_block) {
    fill_panel<T>(call.x, first, count, columns, k_block * form.header.k_block, form.inputs(k_block), panel);
    for (int64_t slab = begin; slab < end; ++slab) {
      float* sums = y + (single ? 0 : slab - begin) * slab_floats;
      Tables<V>::gemm()({chunk_of<V>(form, k_block, slab), panel, columns, sums});
      if (k_block + 1 < form.k_blocks) continue;
      Tables<T>::finish()({.y = sums,
                           .columns = columns,
                           .count = count,
                           .channels = int(form.channels(slab)),
                           .bias = call.bias_of(slab),
                           .activation = call.activation,
                           .out = call.out.as<T>() + first * call.out.stride(0) + slab * form.header.slab,
                           .ldo = call.out.stride(0)});
    }
  }
}

template <class T, class V>
void multiply(const Call& call) {
  const SparseForm& form = call.form;
  const SparseColumns width = sparse_columns_table.get()(form.pattern.rows);
  const int64_t panels = ceil_div(call.rows(), width.most);
  const int64_t height = ceil_div(call.rows(), panels);
  const int columns = int(round_up(height, width.step));
  const int64_t threads = call.threads();
  // Panels are shared out first. Where they do not come out even, each is cut into shares of equally many blocks.
  int64_t shares = 1;
  while (shares < form.slabs && panels * shares % threads != 0 && panels * shares < 4 * threads) ++shares;
  parallel_tasks(panels * shares, [&](int64_t task) {
    const int64_t panel = task / shares, share = task % shares;
    const int64_t first = panel * height;
    const int count = int(std::min(height, call.rows() - first));
    multiply_panel<T, V>(call, first, count, columns, form.slab_at(share, shares), form.slab_at(share + 1, shares));
  });
}

// Rows of x as contiguous floats; those that are so already as they lie.
template <class T>
const float* float_row(const TensorView& x, int64_t row, WorkspaceFrame& frame) {
  const T* from = x.as<T>() + row * x.stride(0);
  const int64_t column = x.stride(1), k = x.size(1);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (column == 1 || k == 1) return from;
  }
  float* copy = frame.take<float>(k);
  for (int64_t i = 0; i < k; ++i) {
    if constexpr (sizeof(T) == sizeof(float)) {
      copy[i] = from[i * column];
    } else {
      const uint32_t bits = uint32_t(from[i * column].bits) << 16;
      std::memcpy(copy + i, &bits, 4);
    }
  }
  return copy;
}

template <class T, class V>
void multiply_few(const Call& call) {
  const SparseForm& form = call.form;
  const int64_t shares = std::min(call.threads(), form.slabs);
  WorkspaceFrame frame;
  const float* x[kSparseFewRows];
  for (int64_t m = 0; m < call.rows(); ++m) x[m] = float_row<T>(call.x, m, frame);
  parallel_tasks(shares, [&](int64_t share) {
    const int64_t begin = form.slab_at(share, shares), end = form.slab_at(share + 1, shares);
    WorkspaceFrame own;
    const int64_t groups = form.header.slab / form.pattern.rows, sums_row = (end - begin) * groups * 4;
    float* sums = own.take<float>(call.rows() * sums_row + kSlack);
    float* scratch = own.take<float>(form.header.slab + kSlack);
    for (int64_t k_block = 0; k_block < form.k_blocks; ++k_block) {
      for (int64_t slab = begin; slab < end; ++slab) {
        SparseFewArgs<V> args{.chunk = chunk_of<V>(form, k_block, slab),
                              .x = {},
                              .count = int(call.rows()),
                              .sums = sums + (slab - begin) * groups * 4,
                              .sums_row = sums_row};
        for (int m = 0; m < args.count; ++m) args.x[m] = x[m] + k_block * form.header.k_block;
        Tables<V>::few()(args);
      }
    }
    for (int64_t slab = begin; slab < end; ++slab) {
      for (int64_t m = 0; m < call.rows(); ++m) {
        Tables<T>::few_finish()({.sums = sums + m * sums_row + (slab - begin) * groups * 4,
                                 .rows = form.pattern.rows,
                                 .channels = int(form.channels(slab)),
                                 .bias = call.bias_of(slab),
                                 .activation = call.activation,
                                 .scratch = scratch,
                                 .out = call.out.as<T>() + m * call.out.stride(0) + slab * form.header.slab});
      }
    }
  });
}

// Without inputs: the activation of the bias.
template <class T>
void finish_without_inputs(const Call& call) {
  WorkspaceFrame frame;
  const int64_t groups = ceil_div(call.form.n(), call.form.pattern.rows);
  float* sums = frame.take<float>(groups * 4 + kSlack);
  std::fill_n(sums, groups * 4, 0.0f);
  float* scratch = frame.take<float>(call.form.n() + kSlack);
  for (int64_t m = 0; m < call.rows(); ++m) {
    Tables<T>::few_finish()({sums, call.form.pattern.rows, int(call.form.n()), call.bias, call.activation, scratch,
                             call.out.as<T>() + m * call.out.stride(0)});
  }
}

template <class T, class V>
void run(const Call& call) {
  if (call.form.k_blocks == 0) return finish_without_inputs<T>(call);
  const int few = call.form.pattern.rows == 1   ? tuning::kSparseFewRows1
                  : call.form.pattern.rows == 2 ? tuning::kSparseFewRows2
                                                : tuning::kSparseFewRows4;
  call.rows() <= few ? multiply_few<T, V>(call) : multiply<T, V>(call);
}

}  // namespace

int64_t sparse_linear_packed_size(const TensorView& weight, const std::string& pattern) {
  constexpr const char* op = "sparse_linear_pack";
  check_dtype(op, "weight", weight, kDTypes);
  return sparse_packed_size(op, weight, cut_of(op, pattern));
}

void sparse_linear_pack(const TensorView& weight, const std::string& pattern, const TensorView& data) {
  constexpr const char* op = "sparse_linear_pack";
  check_dtype(op, "weight", weight, kDTypes);
  sparse_pack(op, weight, cut_of(op, pattern), data);
}

void sparse_linear_unpack(const TensorView& data, const TensorView& weight) {
  constexpr const char* op = "sparse_linear_unpack";
  sparse_unpack(op, open(op, data), weight);
}

SparseLinearInfo sparse_linear_info(const TensorView& data) {
  const SparseForm form = open(kOp, data);
  check_sparse_sections(kOp, form);
  const SparseHeader& h = form.header;
  return {std::string(h.pattern, strnlen(h.pattern, sizeof h.pattern)),
          dtype_name(form.dtype),
          h.n,
          h.k,
          h.blocks,
          h.nonzeros};
}

void sparse_linear(const TensorView& x, const TensorView& data, const std::optional<TensorView>& bias,
                   const std::string& activation, const TensorView& out) {
  check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  check_shape(kOp, "x", x, {-1, -1});
  const SparseForm form = open(kOp, data);
  check(x.size(1) == form.k(), kOp, "x has ", x.size(1), " features, but packed_weight was packed for ", form.k());
  check_dtype(kOp, "out", out, {x.dtype});
  check_shape(kOp, "out", out, {x.size(0), form.n()});
  check(form.n() <= 1 || out.stride(1) == 1, kOp, "the rows of out must be contiguous");
  WorkspaceFrame frame;
  const Call call{x, form, bias ? float_bias(kOp, *bias, form.n(), frame) : nullptr, parse_activation(kOp, activation),
                  out};
  if (x.size(0) == 0 || form.n() == 0) return;
  const bool narrow_x = x.dtype == DType::bfloat16, narrow_values = form.dtype == DType::bfloat16;
  if (narrow_x) return narrow_values ? run<bf16, bf16>(call) : run<bf16, float>(call);
  narrow_values ? run<float, bf16>(call) : run<float, float>(call);
}

}  // namespace lamina
