// Contract of reduce: sums, means, maxima and minima over some dimensions of a tensor.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

enum class Reduction : int { sum, mean, max, min };

// Each of `outputs` results is over `runs` runs of n elements. Strides are in elements. Either the elements of a run
// are adjacent (step 1), or, with `columns`, the first elements of the outputs are (x_output 1).
template <class T>
struct ReduceArgs {
  const T* x;
  int64_t runs, run_step;
  int64_t n, step;
  int64_t outputs, x_output;
  T* out;
  int64_t out_output;
  bool columns;
  Reduction how;
};

extern const KernelTable<void(const ReduceArgs<float>&)> reduce_f32_table;
extern const KernelTable<void(const ReduceArgs<bf16>&)> reduce_bf16_table;

}  // namespace lamina
