// Contract of norm_rows: layer norm and root mean square norm of rows, of a sum of two inputs where there are two.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

// T: of x, out and sum. Elements of a row are adjacent; row strides are in elements and may be anything.
// out may be x or a residual of type T: an element is read before it is written.
template <class T>
struct NormRowsArgs {
  const T* x;  // [rows, n]
  int64_t x_row;
  const T* residual;          // [rows, n]: added to x before anything else; or null
  const bf16* residual_bf16;  // the same, where T is float; at most one of the two is not null
  int64_t residual_row;
  const float* weight;  // [n], or null for ones
  const float* bias;    // [n], or null for zeros
  T* out;               // [rows, n]
  int64_t out_row;
  T* sum;  // [rows, n]: x + residual as well, or null
  int64_t sum_row;
  int64_t rows, n;
  float eps;
  bool centred;    // layer norm; else root mean square norm
  float* scratch;  // [2, n] where T is bf16
};

extern const KernelTable<void(const NormRowsArgs<float>&)> norm_rows_f32_table;
extern const KernelTable<void(const NormRowsArgs<bf16>&)> norm_rows_bf16_table;

}  // namespace lamina
