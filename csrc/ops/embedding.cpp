#include "ops/embedding.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/kernels/embedding.h"
#include "cpu/tuning/embedding.h"
#include "ops/checks.h"
#include "ops/loops.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<int64_t(const EmbeddingArgs<int32_t>&)> embedding_int32_table;
constinit const KernelTable<int64_t(const EmbeddingArgs<int64_t>&)> embedding_int64_table;

namespace {

constexpr const char* kOp = "embedding";

int64_t bytes_of(DType dtype) {
  check(dtype != DType::other, kOp, "weight is ", dtype_name(dtype),
        ", but its elements must be numbers of 1 to 8 bytes");
  return dtype_bytes(dtype);
}

// The rows of the table brought together where their elements are apart: in `to`, [count, size].
template <class Index>
void gather(const EmbeddingArgs<Index>& a, int64_t element_step, int64_t bytes, int64_t& bad) {
  for (bad = 0; bad < a.count; ++bad) {
    const int64_t index = int64_t(a.indices[bad * a.index_step]);
    if (index < 0 || index >= a.rows) return;
    const char* row = a.table + index * a.table_row;
    char* to = a.out + bad * a.row_bytes;
    for (int64_t i = 0; i < a.row_bytes; i += bytes, row += element_step) std::memcpy(to + i, row, size_t(bytes));
  }
}

template <class Index>
void run(const TensorView& indices, const TensorView& weight, const TensorView& out,
         int64_t (*kernel)(const EmbeddingArgs<Index>&)) {
  Loops<1> loops;
  for (int i = 0; i < indices.ndim; ++i) loops.add(indices.shape[i], {indices.strides[i]});
  const int64_t bytes = bytes_of(weight.dtype), size = weight.shape[1];
  const bool adjacent = size == 1 || weight.strides[1] == 1;
  const EmbeddingArgs<Index> all = {.indices = indices.as<const Index>(),
                                    .index_step = loops.step(0),
                                    .table = weight.as<const char>(),
                                    .table_row = weight.strides[0] * bytes,
                                    .rows = weight.shape[0],
                                    .row_bytes = size * bytes,
                                    .out = out.as<char>(),
                                    .count = 0};
  std::atomic<const Index*> refused = nullptr;
  const int64_t grain = std::max<int64_t>(1, tuning::kEmbeddingBytesPerThread / all.row_bytes);
  parallel_ranges(loops.total(), grain, [&](int64_t begin, int64_t end) {
    EmbeddingArgs<Index> args = all;
    args.out += begin * args.row_bytes;
    loops.pieces(begin, end, [&](const int64_t (&at)[1], int64_t count) {
      args.indices = all.indices + at[0];
      args.count = count;
      int64_t done = 0;
      if (adjacent) {
        done = kernel(args);
      } else {
        gather(args, weight.strides[1] * bytes, bytes, done);
      }
      if (done < count) refused = args.indices + done * args.index_step;
      args.out += count * args.row_bytes;
    });
  });
  if (const Index* index = refused) {
    fail(kOp, "index ", *index, " is out of range, weight is ", describe(weight), " and indices must be in [0, ",
         weight.shape[0], ")");
  }
}

}  // namespace

void embedding(const TensorView& indices, const TensorView& weight, const TensorView& out) {
  check_dtype(kOp, "indices", indices, {DType::int32, DType::int64});
  check_dimensions(kOp, "indices", indices);
  check(weight.ndim == 2, kOp, "weight is ", describe(weight), ", but must be [V, D]");
  const bool fits = out.dtype == weight.dtype && out.ndim == indices.ndim + 1 &&
                    std::equal(indices.shape, indices.shape + indices.ndim, out.shape) &&
                    out.shape[indices.ndim] == weight.shape[1];
  check(fits, kOp, "out is ", describe(out), ", but must have the shape of indices, ", describe(indices),
        ", and a row of weight, ", describe(weight), ", behind it");
  check_contiguous(kOp, "out", out);
  if (out.numel() == 0) return;
  if (indices.dtype == DType::int32) {
    run(indices, weight, out, embedding_int32_table.get());
  } else {
    run(indices, weight, out, embedding_int64_table.get());
  }
}

}  // namespace lamina
