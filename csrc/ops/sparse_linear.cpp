#include "ops/sparse_linear.h"

#include <cstring>

#include "ops/checks.h"
#include "ops/epilogue.h"
#include "ops/sparse_multiply.h"

namespace lamina {
namespace {

constexpr const char* kOp = "sparse_linear";

// Rows of a matrix of any strides.
template <class T>
struct MatrixRows {
  const TensorView& x;

  int64_t rows() const { return x.size(0); }
  const T* at(int64_t row, int64_t k) const { return x.as<T>() + row * x.stride(0) + k * x.stride(1); }

  void fill(int64_t first, int count, int columns, int64_t k, int64_t inputs, float* panel) const {
    const T* pointers[kSparseColumns];
    if (x.stride(1) == 1 || inputs == 1) {
      for (int m = 0; m < count; ++m) pointers[m] = at(first + m, k);
      return SparseTables<T>::panel()({pointers, count, columns, inputs, panel});
    }
    // Strided columns: gathered first.
    WorkspaceFrame frame;
    T* copy = frame.take<T>(count * inputs);
    for (int m = 0; m < count; ++m) {
      T* to = copy + m * inputs;
      for (int64_t i = 0; i < inputs; ++i) to[i] = *at(first + m, k + i);
      pointers[m] = to;
    }
    SparseTables<T>::panel()({pointers, count, columns, inputs, panel});
  }

  void fetch(int64_t first, int count, int64_t k, int64_t inputs, int64_t part, int64_t parts) const {
    if (x.stride(1) != 1) return;
    fetch_rows<0>(at(first, k), x.stride(0) * int64_t(sizeof(T)), count, inputs * sizeof(T), part, parts);
  }

  // A row as contiguous floats; itself if it is so already.
  const float* floats(int64_t row, WorkspaceFrame& frame) const {
    const T* from = at(row, 0);
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
};

template <class T, class V>
void multiply_few(const SparseForm& form, const MatrixRows<T>& source, const SparseOutput<T>& out) {
  const int64_t rows = source.rows(), shares = std::min(sparse_threads(form, rows), form.slabs);
  WorkspaceFrame frame;
  const float* x[kSparseFewRows];
  for (int64_t m = 0; m < rows; ++m) x[m] = source.floats(m, frame);
  parallel_tasks(shares, [&](int64_t share) {
    const int64_t begin = form.slab_at(share, shares), end = form.slab_at(share + 1, shares);
    WorkspaceFrame own;
    const int64_t slab_sums = form.header.slab / form.pattern.rows * 4, sums_row = (end - begin) * slab_sums;
    float* sums = own.take<float>(rows * sums_row + kSparseSlack);
    float* scratch = own.take<float>(form.header.slab + kSparseSlack);
    for (int64_t k_block = 0; k_block < form.k_blocks; ++k_block) {
      for (int64_t slab = begin; slab < end; ++slab) {
        SparseFewArgs<V> args{.chunk = sparse_chunk<V>(form, k_block, slab),
                              .x = {},
                              .count = int(rows),
                              .sums = sums + (slab - begin) * slab_sums,
                              .sums_row = sums_row};
        for (int m = 0; m < args.count; ++m) args.x[m] = x[m] + k_block * form.header.k_block;
        SparseTables<V>::few()(args);
      }
    }
    for (int64_t slab = begin; slab < end; ++slab) {
      for (int64_t m = 0; m < rows; ++m) {
        SparseTables<T>::few_finish()({.sums = sums + m * sums_row + (slab - begin) * slab_sums,
                                       .rows = form.pattern.rows,
                                       .channels = int(form.channels(slab)),
                                       .bias = out.bias_of(slab * form.header.slab),
                                       .activation = out.activation,
                                       .scratch = scratch,
                                       .out = out.at(m, slab * form.header.slab)});
      }
    }
  });
}

template <class T, class V>
void run(const SparseForm& form, const TensorView& x, const SparseOutput<T>& out) {
  const MatrixRows<T> source{x};
  if (form.k_blocks == 0) return finish_sparse_without_inputs<T>(form, x.size(0), out);
  const int few = form.pattern.rows == 1   ? tuning::kSparseFewRows1
                  : form.pattern.rows == 2 ? tuning::kSparseFewRows2
                                           : tuning::kSparseFewRows4;
  x.size(0) <= few ? multiply_few<T, V>(form, source, out) : multiply_sparse<T, V>(form, source, out);
}

template <class T>
void run(const SparseForm& form, const TensorView& x, const float* bias, Activation activation, const TensorView& out) {
  const SparseOutput<T> to{bias, activation, out.as<T>(), out.stride(0)};
  form.dtype == DType::bfloat16 ? run<T, bf16>(form, x, to) : run<T, float>(form, x, to);
}

}  // namespace

int64_t sparse_linear_packed_size(const TensorView& weight, const std::string& pattern) {
  constexpr const char* op = "sparse_linear_pack";
  check_dtype(op, "weight", weight, kSparseFloatDTypes);
  check_shape(op, "weight", weight, {-1, -1});
  return sparse_packed_size(op, weight, sparse_float_cut(op, pattern, weight.size(0)));
}

void sparse_linear_pack(const TensorView& weight, const std::string& pattern, const TensorView& data) {
  constexpr const char* op = "sparse_linear_pack";
  check_dtype(op, "weight", weight, kSparseFloatDTypes);
  check_shape(op, "weight", weight, {-1, -1});
  sparse_pack(op, weight, sparse_float_cut(op, pattern, weight.size(0)), data);
}

void sparse_linear_unpack(const TensorView& data, const TensorView& weight) {
  constexpr const char* op = "sparse_linear_unpack";
  sparse_unpack(op, open_sparse_float(op, data), weight);
}

SparseLinearInfo sparse_linear_info(const TensorView& data) {
  const SparseForm form = open_sparse_float(kOp, data);
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
  const SparseForm form = open_sparse_float(kOp, data);
  check(x.size(1) == form.k(), kOp, "x has ", x.size(1), " features, but packed_weight was packed for ", form.k());
  check_dtype(kOp, "out", out, {x.dtype});
  check_shape(kOp, "out", out, {x.size(0), form.n()});
  check(form.n() <= 1 || out.stride(1) == 1, kOp, "the rows of out must be contiguous");
  WorkspaceFrame frame;
  const float* bias_data = bias ? float_bias(kOp, *bias, form.n(), frame) : nullptr;
  const Activation act = parse_activation(kOp, activation);
  if (x.size(0) == 0 || form.n() == 0) return;
  x.dtype == DType::bfloat16 ? run<bf16>(form, x, bias_data, act, out) : run<float>(form, x, bias_data, act, out);
}

}  // namespace lamina
