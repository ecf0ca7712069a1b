// Rows of activations times a packed sparse float weight: what sparse_linear and sparse_conv2d share. A source says
// where the rows come from:
//
//   int64_t rows() const
//   void fill(int64_t first, int count, int columns, int64_t k, int64_t inputs, float* panel) const
//       rows [first, first + count), inputs [k, k + inputs) as a panel [inputs, columns]
//   void fetch(int64_t first, int count, int64_t k, int64_t inputs, int64_t part, int64_t parts) const
//       asks for a part of what a later fill will read
#pragma once

#include <algorithm>
#include <string>

#include "cpu/kernels/sparse_gemm.h"
#include "cpu/tuning/sparse_gemm.h"
#include "ops/parallel.h"
#include "ops/sparse_format.h"
#include "ops/workspace.h"

namespace lamina {

inline constexpr std::initializer_list<const char*> kSparseFloatPatterns = {"unstructured", "2x1", "4x1"};
inline constexpr std::initializer_list<DType> kSparseFloatDTypes = {DType::float32, DType::bfloat16};
// What finishing kernels read behind the last channel.
inline constexpr int64_t kSparseSlack = 16;

// How a float weight of so many output channels is cut.
SparseCut sparse_float_cut(const char* op, const std::string& pattern, int64_t channels);

// open_sparse for float patterns and values.
SparseForm open_sparse_float(const char* op, const TensorView& data);

template <class T>
struct SparseTables;
template <>
struct SparseTables<float> {
  static auto panel() { return sparse_panel_f32_table.get(); }
  static auto gemm() { return sparse_gemm_f32_table.get(); }
  static auto finish() { return sparse_finish_f32_table.get(); }
  static auto few() { return sparse_few_f32_table.get(); }
  static auto few_finish() { return sparse_few_finish_f32_table.get(); }
};
template <>
struct SparseTables<bf16> {
  static auto panel() { return sparse_panel_bf16_table.get(); }
  static auto gemm() { return sparse_gemm_bf16_table.get(); }
  static auto finish() { return sparse_finish_bf16_table.get(); }
  static auto few() { return sparse_few_bf16_table.get(); }
  static auto few_finish() { return sparse_few_finish_bf16_table.get(); }
};

// Where results go: out [rows, n] = act(sums + bias).
template <class T>
struct SparseOutput {
  const float* bias;
  Activation activation;
  T* data;
  int64_t row_stride;

  const float* bias_of(int64_t channel) const { return bias ? bias + channel : nullptr; }
  T* at(int64_t row, int64_t channel) const { return data + row * row_stride + channel; }
};

// The blocks of a slab in a range of inputs.
template <class V>
SparseChunk<V> sparse_chunk(const SparseForm& form, int64_t k_block, int64_t slab) {
  const int64_t i = k_block * form.slabs + slab;
  return {.groups = form.groups + form.group_first[i],
          .group_count = form.group_first[i + 1] - form.group_first[i],
          .index = form.index + form.chunk_first[i],
          .values = reinterpret_cast<const V*>(form.values) + form.chunk_first[i] * form.pattern.rows,
          .rows = form.pattern.rows,
          .add = k_block > 0};
}

// How many threads a product with so many rows is worth.
inline int64_t sparse_threads(const SparseForm& form, int64_t rows) {
  const int64_t work = (form.header.blocks * form.pattern.rows + form.n() + form.k()) * rows;
  return std::clamp<int64_t>(work / tuning::kSparseWorkPerThread, 1, max_threads());
}

// Asks for `bytes` of each of the rows of part `part` of `parts`.
template <int write>
void fetch_rows(const void* from, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t part, int64_t parts) {
  for (int64_t m = rows * part / parts; m < rows * (part + 1) / parts; ++m) {
    const char* row = static_cast<const char*>(from) + m * row_bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, write, 2);
  }
}

// Rows [first, first + count) times the slabs [begin, end).
template <class T, class V, class Source>
void multiply_sparse_panel(const SparseForm& form, const Source& source, const SparseOutput<T>& out, int64_t first,
                           int count, int columns, int64_t begin, int64_t end) {
  WorkspaceFrame frame;
  const int64_t slab_floats = form.header.slab * columns;
  float* panel = frame.take<float>(std::min<int64_t>(form.header.k_block, form.k()) * columns);
  // Sums of all slabs wait between two ranges of inputs; with one range those of a slab are done at once.
  const bool single = form.k_blocks <= 1;
  float* y = frame.take<float>((single ? 1 : end - begin) * slab_floats + kSparseSlack * columns);
  for (int64_t k_block = 0; k_block < form.k_blocks; ++k_block) {
    const int64_t k = k_block * form.header.k_block;
    source.fill(first, count, columns, k, form.inputs(k_block), panel);
    const bool last = k_block + 1 == form.k_blocks;
    for (int64_t slab = begin; slab < end; ++slab) {
      const int64_t channel = slab * form.header.slab, channels = form.channels(slab);
      // Memory is asked for while something else is multiplied: rows lie pages apart, where no prefetcher finds them.
      if (last) {
        fetch_rows<1>(out.at(first, channel), out.row_stride * sizeof(T), count, channels * sizeof(T), 0, 1);
      } else {
        source.fetch(first, count, k + form.header.k_block, form.inputs(k_block + 1), slab - begin, end - begin);
      }
      float* sums = y + (single ? 0 : slab - begin) * slab_floats;
      SparseTables<V>::gemm()({sparse_chunk<V>(form, k_block, slab), panel, columns, sums});
      if (!last) continue;
      SparseTables<T>::finish()({.y = sums,
                                 .columns = columns,
                                 .count = count,
                                 .channels = int(channels),
                                 .bias = out.bias_of(channel),
                                 .activation = out.activation,
                                 .out = out.at(first, channel),
                                 .ldo = out.row_stride});
    }
  }
}

// All rows, in panels; the weight has inputs.
template <class T, class V, class Source>
void multiply_sparse(const SparseForm& form, const Source& source, const SparseOutput<T>& out) {
  const SparseColumns width = sparse_columns_table.get()(form.pattern.rows);
  const int64_t rows = source.rows(), threads = sparse_threads(form, rows);
  int64_t panels = (rows + width.most - 1) / width.most;
  // Narrower panels rather than a thread without work, as long as a register of columns has enough of them.
  if (panels < threads && rows >= threads * width.step) panels = threads;
  const int64_t height = (rows + panels - 1) / panels;
  panels = (rows + height - 1) / height;
  const int columns = int((height + width.step - 1) / width.step * width.step);
  // Where panels do not come out even, each is cut into shares of about equally many blocks.
  int64_t shares = 1;
  while (shares < form.slabs && panels * shares % threads != 0 && panels * shares < 4 * threads) ++shares;
  parallel_tasks(panels * shares, [&](int64_t task) {
    const int64_t first = task / shares * height, share = task % shares;
    const int count = int(std::min(height, rows - first));
    multiply_sparse_panel<T, V>(form, source, out, first, count, columns, form.slab_at(share, shares),
                                form.slab_at(share + 1, shares));
  });
}

// Without inputs: the activation of the bias.
template <class T>
void finish_sparse_without_inputs(const SparseForm& form, int64_t rows, const SparseOutput<T>& out) {
  WorkspaceFrame frame;
  const int64_t groups = (form.n() + form.pattern.rows - 1) / form.pattern.rows;
  float* sums = frame.take<float>(groups * 4 + kSparseSlack);
  std::fill_n(sums, groups * 4, 0.0f);
  float* scratch = frame.take<float>(form.n() + kSparseSlack);
  for (int64_t m = 0; m < rows; ++m) {
    SparseTables<T>::few_finish()(
        {sums, form.pattern.rows, int(form.n()), out.bias, out.activation, scratch, out.at(m, 0)});
  }
}

}  // namespace lamina
