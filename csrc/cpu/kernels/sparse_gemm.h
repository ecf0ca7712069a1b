// Contract of sparse_gemm: rows of activations times one chunk of a packed sparse weight (ops/sparse_format.h).
//
//   y[n, m] (+)= sum over the blocks b of group n / R: values[b, n % R] x[index[b], m]
//
// Rows of x come as a panel, transposed: [inputs, columns], a column for each row of x, so that one weight multiplies a
// register of them. Few rows have a path of their own, without panels, that reads x as it lies.
#pragma once

#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/dispatch.h"
#include "cpu/dtype.h"
#include "cpu/kernels/sparse_group.h"

namespace lamina {

// The most columns any variant takes, and the most rows of the path for few.
inline constexpr int kSparseColumns = 64;
inline constexpr int kSparseFewRows = 4;

template <class T>
struct SparsePanelArgs {
  const T* const* rows;  // [count] of [k]
  int count;             // of columns that are there; the others become zero
  int columns;
  int64_t k;
  float* panel;  // [k, columns]
};

// The blocks of one slab of channels in one range of inputs; V: of the values.
template <class V>
struct SparseChunk {
  const SparseGroup* groups;
  int64_t group_count;
  const uint16_t* index;
  const V* values;  // [blocks, rows]; 64 bytes behind the last are readable
  int rows;         // of a block: 1, 2 or 4
  bool add;         // to the sums that are there; else groups that are not listed keep theirs
};

template <class V>
struct SparseGemmArgs {
  SparseChunk<V> chunk;
  const float* x;  // [inputs, columns]
  int columns;     // a multiple of 16, of sparse_columns at most
  float* y;        // [channels of the slab, columns]
};

// y [channels, columns] -> out [count, channels] = act(y^T + bias).
template <class Out>
struct SparseFinishArgs {
  const float* y;  // readable up to 16 rows behind the last
  int columns, count, channels;
  const float* bias;  // [channels] or null
  Activation activation;
  Out* out;
  int64_t ldo;
};

template <class V>
struct SparseFewArgs {
  SparseChunk<V> chunk;
  const float* x[kSparseFewRows];  // [count] of [inputs]
  int count;
  float* sums;  // [count, groups of the slab, 4]: lane i belongs to channel i % rows of the group
  int64_t sums_row;
};

template <class Out>
struct SparseFewFinishArgs {
  const float* sums;  // [groups, 4], of one row of x
  int rows, channels;
  const float* bias;
  Activation activation;
  float* scratch;  // [channels + 16]
  Out* out;        // [channels]
};

// Columns of a panel for blocks of so many rows: a multiple of `step`, and not more than `most`.
struct SparseColumns {
  int step, most;
};
extern const KernelTable<SparseColumns(int rows)> sparse_columns_table;
extern const KernelTable<void(const SparsePanelArgs<float>&)> sparse_panel_f32_table;
extern const KernelTable<void(const SparsePanelArgs<bf16>&)> sparse_panel_bf16_table;
extern const KernelTable<void(const SparseGemmArgs<float>&)> sparse_gemm_f32_table;
extern const KernelTable<void(const SparseGemmArgs<bf16>&)> sparse_gemm_bf16_table;
extern const KernelTable<void(const SparseFinishArgs<float>&)> sparse_finish_f32_table;
extern const KernelTable<void(const SparseFinishArgs<bf16>&)> sparse_finish_bf16_table;
extern const KernelTable<void(const SparseFewArgs<float>&)> sparse_few_f32_table;
extern const KernelTable<void(const SparseFewArgs<bf16>&)> sparse_few_bf16_table;
extern const KernelTable<void(const SparseFewFinishArgs<float>&)> sparse_few_finish_f32_table;
extern const KernelTable<void(const SparseFewFinishArgs<bf16>&)> sparse_few_finish_bf16_table;

}  // namespace lamina
