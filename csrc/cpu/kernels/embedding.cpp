// Rows of a table, picked by index.
//
// A table is larger than any cache and its rows are picked at random, so a copy is bound by the wait for a row's first
// lines: those of the rows to come are asked for while the one at hand is copied.
#include "cpu/kernels/embedding.h"

#include "cpu/tuning/embedding.h"
#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int64_t kRegister = F32::lanes * int64_t(sizeof(float));
constexpr int64_t kLine = 64;

// A lane of I32 moves any four bytes as they are, where one of floats might change a NaN.
LAMINA_INLINE void copy_register(const char* from, char* to) {
  store_i32(reinterpret_cast<int32_t*>(to), load_i32(reinterpret_cast<const int32_t*>(from)));
}

LAMINA_INLINE void copy_row(const char* from, char* to, int64_t bytes) {
  if (bytes < kRegister) {
    memcpy(to, from, size_t(bytes));
    return;
  }
  int64_t i = 0;
  for (; i + 4 * kRegister <= bytes; i += 4 * kRegister) {
    LAMINA_UNROLL
    for (int k = 0; k < 4; ++k) copy_register(from + i + k * kRegister, to + i + k * kRegister);
  }
  for (; i + kRegister <= bytes; i += kRegister) copy_register(from + i, to + i);
  // The last register overlaps the one before.
  if (i < bytes) copy_register(from + bytes - kRegister, to + bytes - kRegister);
}

template <class Index>
LAMINA_INLINE int64_t embedding(const EmbeddingArgs<Index>& a) {
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t ahead = i + tuning::kEmbeddingRowsAhead;
    if (ahead < a.count) {
      const int64_t next = int64_t(a.indices[ahead * a.index_step]);
      if (uint64_t(next) < uint64_t(a.rows)) {
        const char* row = a.table + next * a.table_row;
        for (int64_t b = 0; b < a.row_bytes; b += kLine) __builtin_prefetch(row + b);
      }
    }
    const int64_t index = int64_t(a.indices[i * a.index_step]);
    if (uint64_t(index) >= uint64_t(a.rows)) return i;
    copy_row(a.table + index * a.table_row, a.out + i * a.row_bytes, a.row_bytes);
  }
  return a.count;
}

int64_t embedding_int32(const EmbeddingArgs<int32_t>& a) { return embedding(a); }
int64_t embedding_int64(const EmbeddingArgs<int64_t>& a) { return embedding(a); }

REGISTER_KERNEL(embedding_int32_table, embedding_int32);
REGISTER_KERNEL(embedding_int64_table, embedding_int64);

}  // namespace
}  // namespace lamina::LAMINA_ISA
