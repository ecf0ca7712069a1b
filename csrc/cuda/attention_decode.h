// Contract of the attention_decode kernels. Strides are in bytes and may be anything, of dimensions of size one 0.
#pragma once

#include <stdint.h>

#include "cuda/tile_sizes.h"

namespace lamina::cuda {

enum class DecodeType : int { float32, bfloat16, float16, int8 };

struct DecodeCache {
  char* data;                           // [batch or blocks, tokens, heads, size]
  int64_t first, token, head, element;  // strides
  int size;
  int copy;  // rows are copied so many bytes at a time, to which all of them are aligned: 16, 8, 4, or 0: by element
  float* scale;  // int8: [batch or blocks, tokens, heads]; else null
  int64_t scale_first, scale_token, scale_head;
};

// Where the tokens of each sequence lie.
struct DecodeSequences {
  const void* lengths;  // [batch]; what is not in 0 to capacity counts as the nearest that is
  int64_t lengths_stride;
  bool lengths_are_64_bits;
  const int32_t* table;  // [batch, blocks of a sequence], or null; an entry that is no block counts as the nearest
  int64_t table_stride;  // in elements
  int block_size, blocks;
  int capacity;
};

// Where what a block keeps in shared memory begins and how long its rows are, in bytes. Rows are an odd number of 16
// bytes apart: eight of them, as a tensor core reads them, lie in different banks.
struct DecodeRoom {
  int q_pitch, k_pitch, v_pitch;
  int query_parts;  // an int8 cache meets bfloat16 numbers whose sum is the query: one after the other, [parts][rows]
  int rows;         // position and slope of each row, behind q
  int ring;         // the stages of each warp; at the end, the sums of the block
  int v, scales;    // in a stage, behind k
  int stage_bytes;
  int stages, warps;
  int shared_bytes;
  bool pads;  // rows have columns that no copy writes
};

struct DecodeArgs {
  DecodeType q_type, cache_type;
  const char* q;
  int64_t q_batch, q_query, q_head, q_element;
  DecodeCache k, v;
  DecodeSequences sequences;
  int batch, queries, heads, kv_heads;
  // Row r of a key/value head is query r / group of its head r % group. A block takes 8 or 16 of them,
  // or 32 where a cache of two bytes has values of up to 128 columns.
  int group, rows, block_rows, row_blocks;
  int splits;            // parts of the keys that the rows of a block take, each with a block of its own
  int window;            // 0: none
  float scale, softcap;  // softcap 0: none
  const char* slopes;    // float32, or null
  int64_t slopes_batch, slopes_head;
  const char* sinks;  // float32, or null
  int64_t sinks_head;
  char* out;  // of the query's type, elements adjacent
  int64_t out_batch, out_query, out_head;
  char* lse;  // float32, or null
  int64_t lse_batch, lse_query, lse_head;
  // Of more than one split: sums [batch, kv_heads, rows, splits, partial_pitch], then maximum and total of each
  // [batch, kv_heads, rows, splits, 2], in float32.
  float* partial;
  int partial_pitch;
  DecodeRoom room;
};

struct AppendArgs {
  DecodeType type, cache_type;
  DecodeCache k_cache, v_cache;
  const char *k, *v;
  int64_t k_batch, k_token, k_head, k_element, v_batch, v_token, v_head, v_element;
  DecodeSequences sequences;
  int batch, tokens, heads;
};

void attention_decode_launch(const DecodeArgs& args, bool overlaps, void* stream);
void attention_decode_append_launch(const AppendArgs& args, void* stream);

}  // namespace lamina::cuda
