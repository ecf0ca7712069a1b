// Sums, means, maxima and minima of rows and of columns, as many results at a time as a register has lanes.
//
// Sums are float32 whatever the storage, in the order of ordered_totals.h: the same bits for every layout.
#include "cpu/kernels/reduce.h"

#include "cpu/kernels/ordered_totals.h"

namespace lamina::LAMINA_ISA {
namespace {

// The results of `count` <= lanes outputs.
template <class T>
LAMINA_INLINE void store_results(const ReduceArgs<T>& a, int64_t first, F32 y, int count) {
  if (a.how == Reduction::mean) y = y / set1(float(a.runs * a.n));
  T* out = a.out + first * a.out_output;
  if (a.out_output == 1 || count == 1) {
    store_up_to(out, y, count);
  } else {
    T each[kLanes];
    store(each, y);
    for (int i = 0; i < count; ++i) out[i * a.out_output] = each[i];
  }
}

template <class T, class Op>
void reduce_rows(const ReduceArgs<T>& a) {
  for (int64_t first = 0; first < a.outputs; first += kLanes) {
    const int count = int(smaller(kLanes, a.outputs - first));
    const int64_t x_output = a.x_output, run_step = a.run_step;
    const T* x = a.x + first * x_output;
    const auto element = [=](int row, int64_t run, int64_t i, int some) __attribute__((always_inline)) {
      return load_up_to(x + row * x_output + run * run_step + i, some);
    };
    store_results(a, first, totals_of_rows<Op>(count, a.runs, a.n, element), count);
  }
}

// As many groups of C registers of columns as there are, from `first` on.
template <class T, class Op, int C>
LAMINA_INLINE void reduce_groups(const ReduceArgs<T>& a, int64_t& first) {
  for (; first + C * kLanes <= a.outputs; first += C * kLanes) {
    F32 y[C];
    const auto element = [](const T* p, int) __attribute__((always_inline)) { return load(p); };
    totals_of_columns<Op>(a.x + first, a.runs, a.run_step, a.n, a.step, element, y);
    LAMINA_UNROLL
    for (int c = 0; c < C; ++c) store_results(a, first + c * kLanes, y[c], kLanes);
  }
}

template <class T, class Op>
void reduce_columns(const ReduceArgs<T>& a) {
  int64_t first = 0;
  reduce_groups<T, Op, kColumnsTogether>(a, first);
  reduce_groups<T, Op, 4>(a, first);
  reduce_groups<T, Op, 1>(a, first);
  if (first < a.outputs) {
    const int count = int(a.outputs - first);
    F32 y[1];
    const auto element = [count](const T* p, int) __attribute__((always_inline)) { return load_n(p, count); };
    totals_of_columns<Op>(a.x + first, a.runs, a.run_step, a.n, a.step, element, y);
    store_results(a, first, y[0], count);
  }
}

template <class T, class Op>
LAMINA_INLINE void reduce(const ReduceArgs<T>& a) {
  a.columns ? reduce_columns<T, Op>(a) : reduce_rows<T, Op>(a);
}

template <class T>
LAMINA_INLINE void reduce_any(const ReduceArgs<T>& a) {
  switch (a.how) {
    case Reduction::sum:
    case Reduction::mean: return reduce<T, Sum>(a);
    case Reduction::max: return reduce<T, Max>(a);
    case Reduction::min: return reduce<T, Min>(a);
  }
}

void reduce_f32(const ReduceArgs<float>& a) { reduce_any(a); }
void reduce_bf16(const ReduceArgs<bf16>& a) { reduce_any(a); }

REGISTER_KERNEL(reduce_f32_table, reduce_f32);
REGISTER_KERNEL(reduce_bf16_table, reduce_bf16);

}  // namespace
}  // namespace lamina::LAMINA_ISA
