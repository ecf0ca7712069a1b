// Contract of softmax: e^(x - m) / sum of e^(x - m) of rows, with m the largest element of a row.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

// Strides are in elements. Either the elements of every row are adjacent (x_step and out_step 1), or the rows are
// (x_row and out_row 1): columns of a matrix. out may be x where both have the same type and strides.
template <class X, class Out>
struct SoftmaxArgs {
  const X* x;  // [rows, n]
  int64_t x_row, x_step;
  Out* out;  // [rows, n]
  int64_t out_row, out_step;
  int64_t rows, n;
  float* scratch;  // softmax_scratch(n, whether rows are adjacent) floats
};

// Two rows where their elements are adjacent; else as many as any register has lanes, padded to whole registers.
inline int64_t softmax_scratch(int64_t n, bool columns) { return columns ? 16 * (n + 16) : 2 * n; }

extern const KernelTable<void(const SoftmaxArgs<float, float>&)> softmax_f32_table;
extern const KernelTable<void(const SoftmaxArgs<bf16, bf16>&)> softmax_bf16_table;
extern const KernelTable<void(const SoftmaxArgs<float, bf16>&)> softmax_f32_bf16_table;
extern const KernelTable<void(const SoftmaxArgs<bf16, float>&)> softmax_bf16_f32_table;

}  // namespace lamina
