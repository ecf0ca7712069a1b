// Contract of the attention kernels: some query rows against all keys and values of one head.
//
//   out[r, :] = sum_j p[r, j] v[j, :],   p[r, :] = softmax_j(capped(scale * q[r, :] . k[j, :]) + added[r, j])
//
// A key that is masked out (false, -inf, or outside of the row's window) takes no part, whatever its k and v hold; a
// row without keys gives 0. Scores are never stored beyond one chunk of keys.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"
#include "cpu/tuning/attention.h"

namespace lamina {

enum class AttentionMask : int { none, boolean, float16, bfloat16, float32, float64 };

// A side of a window that has no limit; far from the ends of int64, so that positions can be added to it.
inline constexpr int64_t kAttentionUnlimited = int64_t{1} << 60;

// K and V of one key/value head as a kernel packs them, kept from call to call: room for all keys,
// attention_packed_floats() each, and how many keys from 0 on are there already. The kernel counts them up.
struct AttentionPacked {
  float *k, *v;
  int64_t k_keys, v_keys;
};

// Strides are in elements and may be anything, 0 and negative included, unless it says otherwise. Numbers that are
// `float` or `double` by the storage are double for float64 storage and float for every other.
struct AttentionArgs {
  // Query heads that share the key/value head lie one after the other: row r is query r % queries of head r / queries.
  const void* q;
  int64_t q_head, q_row, q_col;
  const void* k;  // [keys, head_size]
  int64_t k_row, k_col;
  const void* v;  // [keys, value_size]
  int64_t v_row, v_col;
  void* out;  // [rows, value_size]; columns adjacent
  int64_t out_head, out_row;
  void* lse;  // null, or [rows] of float or double: log of the sum of exp(score), natural; -inf for a row without keys
  int64_t lse_head, lse_row;

  int64_t queries, keys;
  int head_size, value_size;  // at most tuning::kAttentionMaxHeadSize
  double scale;

  // Query i stands at position p = i + shift among the keys and takes the keys p - window_left .. p + window_right.
  int64_t shift, window_left, window_right;
  AttentionMask mask_type;
  const void* mask;  // [rows, keys]: boolean (true = keep) or added to the scores
  int64_t mask_head, mask_row, mask_col;
  double softcap;            // 0, or scores become softcap * tanh(score / softcap), before anything is added
  const void* alibi_slopes;  // null, or float or double for each head: -slope * |p - j| is added to the scores
  int64_t alibi_head;
  const void* sinks;  // null, or float or double for each head: one more logit, which takes weight and gives no value
  int64_t sinks_head;

  // Dropout keeps a weight where 16 random bits are below `keep_below`, 65536 for no dropout; see vec/philox.h.
  uint32_t keep_below = 65536, seed[2] = {0, 0}, batch = 0, first_head = 0;

  int64_t first_row, rows;  // the rows to compute; at most tuning::kAttentionTaskRows

  // Whether the tensors are too large to wait in cache: rows to be written are then fetched into L2 beforehand, and so
  // is what the call after this one begins to read and this one does not (with the same strides; null: no such call).
  bool far;
  const void *next_q, *next_k, *next_v;

  AttentionPacked* packed;  // null where K and V are not worth keeping; int8 kernels need it

  float* scratch;  // attention_scratch_floats() of them, 64-byte aligned
};

// Upper bound over every ISA: packed Q, scores, mask and sums of a row block, K and V of a chunk.
static inline int64_t attention_scratch_floats(int head_size, int value_size) {
  const int64_t rows = tuning::kAttentionTaskRows, keys = tuning::kAttentionMaxChunk + 32;
  const int64_t d = (head_size + 15) / 16 * 16, dv = (value_size + 15) / 16 * 16;
  return rows * (d + dv) + 2 * rows * keys + keys * (d + dv);
}

static inline int64_t attention_packed_floats(int64_t keys, int size) {
  return keys * ((size + 15) / 16 * 16 + 2) + tuning::kAttentionMaxHeadSize;
}

// By the storage of q, k, v and out. Those "as bf16" take float32 storage and may multiply in
// bfloat16, those "int8" may compute scores from int8 codes.
extern const KernelTable<void(const AttentionArgs&)> attention_f32_table;
extern const KernelTable<void(const AttentionArgs&)> attention_bf16_table;
extern const KernelTable<void(const AttentionArgs&)> attention_f32_as_bf16_table;
extern const KernelTable<void(const AttentionArgs&)> attention_f32_int8_table;
extern const KernelTable<void(const AttentionArgs&)> attention_f32_as_bf16_int8_table;
extern const KernelTable<void(const AttentionArgs&)> attention_bf16_int8_table;
extern const KernelTable<void(const AttentionArgs&)> attention_f16_table;
extern const KernelTable<void(const AttentionArgs&)> attention_f64_table;

}  // namespace lamina
