// Contract of the attention_decode kernels: some query rows that share a key/value head against one piece of its cache.
//
//   sums[r, :] = sum_j 2^(s[r, j] - maximum[r]) v[j, :],   total[r] = sum_j 2^(s[r, j] - maximum[r])
//   s[r, j] = log2(e) * score of key j for row r;   maximum[r] = max_j s[r, j]
//
// over the keys j of the piece that row r takes. A piece is a fixed part of the cache, whoever computes it, so results
// do not depend on the number of threads. The merge brings the pieces of a row together:
//
//   out[r, :] = sum_p 2^(maximum[p, r] - m) sums[p, r, :] / sum_p 2^(maximum[p, r] - m) total[p, r],  m = max_p maximum
//
// A key that a row does not take has no part in it, whatever its k and v hold; a row without keys gives 0.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"
#include "cpu/tuning/attention_decode.h"

namespace lamina {

// Strides are in elements and may be anything.
struct DecodeCache {
  const void* data;    // [keys, size] of one head, or blocks of such keys
  int64_t row, col;    // between keys and between the elements of one
  int64_t block;       // between blocks, when there is a table of them
  const float* scale;  // int8: [keys] or [blocks, block_size]; else null
  int64_t scale_row, scale_block;
};

struct DecodeArgs {
  // Row r is query r / group of head r % group.
  const void* q;  // of the cache's type, or float32, bfloat16 or float16 with an int8 cache: see q_type
  enum class Type : int { float32, bfloat16, float16 } q_type;
  int64_t q_query, q_head, q_col;
  int64_t group;
  int64_t first_row;
  int rows;  // at most tuning::kDecodeTaskRows

  DecodeCache k, v;
  const int32_t* block_table;  // block of keys i * block_size and on, or null
  int64_t block_size;
  int head_size, value_size;

  int64_t first_key;  // of the piece
  int keys;           // at most tuning::kDecodePiece
  int64_t length;     // keys in the whole cache: beyond them nothing is read
  // Query i lies at position first_position + i and takes the keys up to it, the last `window` of them (0: all).
  int64_t first_position;
  int64_t window;

  float scale;
  float softcap;              // 0: none
  const float* alibi_slopes;  // [group], or null
  int64_t alibi_stride;

  float* sums;  // [rows][decode_columns(value_size)], then maximum [rows] and total [rows]
  float* scratch;
};

struct DecodeMergeArgs {
  const float* partial;  // `pieces` records of decode_record_floats() each
  int64_t pieces;
  int64_t group, first_row;
  int rows;
  int value_size;
  const float* sinks;  // [group] in the unit of scores, or null
  int64_t sink_stride;
  void* out;  // row r at (r / group) * out_query + (r % group) * out_head, columns adjacent
  int64_t out_query, out_head;
  float* lse;  // null, or the logarithm of the sum of exponentials of each row
  int64_t lse_query, lse_head;
};

// Columns of a row of sums: whole registers of pairs on every ISA.
static inline int64_t decode_columns(int value_size) { return (value_size + 31) / 32 * 32; }
static inline int64_t decode_record_floats(int rows, int value_size) { return rows * (decode_columns(value_size) + 2); }

// Rows that are asked for from memory before they are read, in each of the places that are read side by side.
static inline int64_t decode_rows_ahead(int64_t row_bytes) {
  const int64_t rows = tuning::kDecodeAheadBytes / (row_bytes > 0 ? row_bytes : 1);
  constexpr int64_t kMost = tuning::kDecodePiece / tuning::kDecodeStreams;
  return rows < 1 ? 1 : rows > kMost ? kMost : rows;
}

// Upper bound over every ISA and cache type: packed queries, scores, addresses of keys and values, scales, and copies
// of rows whose elements lie apart.
static inline int64_t decode_scratch_floats(int head_size, int value_size, bool copies) {
  const int64_t rows = tuning::kDecodeTaskRows, keys = tuning::kDecodePiece;
  const int64_t d = (head_size + 31) / 32 * 32, dv = decode_columns(value_size);
  const int64_t addresses = 2 * (2 * keys) * 2;
  return rows * d + rows * keys + addresses + 2 * 4 * keys + (copies ? keys * (d + dv) : 0) + 64;
}

extern const KernelTable<void(const DecodeArgs&)> attention_decode_f32_table;
extern const KernelTable<void(const DecodeArgs&)> attention_decode_bf16_table;
extern const KernelTable<void(const DecodeArgs&)> attention_decode_f16_table;
extern const KernelTable<void(const DecodeArgs&)> attention_decode_i8_table;
extern const KernelTable<void(const DecodeMergeArgs&)> attention_decode_merge_f32_table;
extern const KernelTable<void(const DecodeMergeArgs&)> attention_decode_merge_bf16_table;
extern const KernelTable<void(const DecodeMergeArgs&)> attention_decode_merge_f16_table;

}  // namespace lamina
