// Contract of embedding: rows of a table, picked by index, one behind the other.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"

namespace lamina {

template <class Index>
struct EmbeddingArgs {
  const Index* indices;  // [count]
  int64_t index_step;
  const char* table;  // [rows, row_bytes]: the bytes of a row are adjacent
  int64_t table_row;  // in bytes, as is row_bytes
  int64_t rows, row_bytes;
  char* out;  // [count, row_bytes]
  int64_t count;
};

// The position of the first index that is not in [0, rows), with the rows of the indices before it copied; or count.
extern const KernelTable<int64_t(const EmbeddingArgs<int32_t>&)> embedding_int32_table;
extern const KernelTable<int64_t(const EmbeddingArgs<int64_t>&)> embedding_int64_table;

}  // namespace lamina
