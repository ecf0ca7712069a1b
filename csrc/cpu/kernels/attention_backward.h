// Contract of the attention gradient kernels: the gradients of a range of keys and values of one head, summed over all
// query heads that share it, and what those keys give to the gradients of the queries.
//
//   P = exp(score - lse)                      score and lse as the forward has them
//   dS = P (Z (dO V^T) - delta)               Z: 0 where dropout drops, else 1 / keep;  delta = sum_c dO O - dlse
//   dV = (Z P)^T dO    dK = scale dS^T Q    dQ = scale dS K    dmask = dS    dsink = -sum_q exp(sink - lse) delta
//
// with dS times 1 - tanh^2 before the products where scores are capped. P and dS are computed again block by block and
// never stored as a whole.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"
#include "cpu/kernels/attention.h"
#include "cpu/tuning/attention.h"
#include "cpu/tuning/attention_backward.h"

namespace lamina {

// Strides are in elements and may be anything, 0 and negative included, unless it says otherwise. "[heads]" are the
// query heads that share the key/value head. Numbers that are `float` or `double` by the storage are double for float64
// storage and float for every other.
struct AttentionBackwardArgs {
  const void* q;  // [heads, queries, head_size]
  int64_t q_head, q_row, q_col;
  const void* out;  // [heads, queries, value_size]
  int64_t out_head, out_row, out_col;
  const void* grad;  // of out
  int64_t grad_head, grad_row, grad_col;
  const void* k;  // [keys, head_size]
  int64_t k_row, k_col;
  const void* v;  // [keys, value_size]
  int64_t v_row, v_col;
  const void* lse;  // float or double [heads, queries], natural logarithm; -inf for a query without keys
  int64_t lse_head, lse_row;
  const void* grad_lse;  // the same, or null
  int64_t grad_lse_head, grad_lse_row;

  // The options are those of AttentionArgs.
  int64_t heads, queries, keys;
  int64_t first_key, range;   // the keys to take; first_key is a multiple of the chunk
  int head_size, value_size;  // at most tuning::kAttentionMaxHeadSize
  double scale;
  int64_t shift, window_left, window_right;
  AttentionMask mask_type;
  const void* mask;  // [heads, queries, keys]
  int64_t mask_head, mask_row, mask_col;
  double softcap;
  const void* alibi_slopes;
  int64_t alibi_head;
  const void* sinks;
  int64_t sinks_head;

  // Dropout keeps a weight where 16 random bits are below `keep_below`, 65536 for no dropout; see vec/philox.h.
  uint32_t keep_below, seed[2], batch, first_head;

  void* grad_k;  // [range, head_size]; columns adjacent
  int64_t grad_k_row;
  void* grad_v;  // [range, value_size]; columns adjacent
  int64_t grad_v_row;
  // [heads, queries, head_size], columns adjacent; complete when the range is all keys. Else the part of this range
  // goes to partial_q, float [heads, queries, head_size rounded up to 16], without the scale.
  void* grad_q;
  int64_t grad_q_head, grad_q_row;
  float* partial_q;
  // float or double each, null or added to. A mask that is broadcast has strides of 0.
  void* grad_mask;
  int64_t grad_mask_head, grad_mask_row, grad_mask_col;
  void* grad_slopes;  // [heads]
  void* grad_sinks;   // [heads]; null but for one range of each head

  float* scratch;  // attention_backward_scratch_floats() of them, 64-byte aligned
};

// Upper bound over every ISA: K, V and their gradients over the range; packed Q and dO twice, the gradient of Q and the
// tiles of one chunk for a block of rows.
static inline int64_t attention_backward_scratch_floats(int head_size, int value_size, int64_t range) {
  const int64_t rows = tuning::kAttentionTaskRows, chunk = tuning::kAttentionBackwardChunk;
  const int64_t d = (head_size + 15) / 16 * 16, dv = (value_size + 15) / 16 * 16;
  return (range + 16) * (3 * d + 2 * dv) + rows * (3 * d + 2 * dv) + 5 * rows * chunk + 64;
}

// rows [count, columns] of the output's type, row by row the sum of `parts` rows of floats, times `factor`.
struct AttentionSumArgs {
  const float* parts;  // [parts][part_stride], rows row_stride apart
  int64_t part_stride, row_stride;
  int count_parts;
  void* out;
  int64_t out_row, rows;
  int columns;
  float factor;
};

extern const KernelTable<void(const AttentionBackwardArgs&)> attention_backward_f32_table;
extern const KernelTable<void(const AttentionBackwardArgs&)> attention_backward_bf16_table;
extern const KernelTable<void(const AttentionBackwardArgs&)> attention_backward_f16_table;
extern const KernelTable<void(const AttentionBackwardArgs&)> attention_backward_f64_table;
extern const KernelTable<void(const AttentionSumArgs&)> attention_backward_sum_f32_table;
extern const KernelTable<void(const AttentionSumArgs&)> attention_backward_sum_bf16_table;
extern const KernelTable<void(const AttentionSumArgs&)> attention_backward_sum_f16_table;

}  // namespace lamina
