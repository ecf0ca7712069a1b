// Sums, means, maxima and minima of rows and of columns, as many results at a time as a register has lanes.
//
// Sums are float32 whatever the storage, in the order of ordered_totals.h: the same bits for every layout.
#include "cpu/kernels/reduce.h"

#include "cpu/kernels/ordered_totals.h"

namespace lamina::LAMINA_ISA {
namespace {

template <class T, class Op>
LAMINA_INLINE F32 totals(const ReduceArgs<T>& a, const T* x, int count) {
  const int64_t runs = a.runs, run_step = a.run_step, n = a.n, step = a.step;
  if (!a.columns) {
    const int64_t x_output = a.x_output;
    const auto element = [=](int row, int64_t run, int64_t i, int some) __attribute__((always_inline)) {
      return load_up_to(x + row * x_output + run * run_step + i, some);
    };
    return totals_of_rows<Op>(count, runs, n, element);
  }
  if (count == kLanes) {
    const auto all = [](const T* p) __attribute__((always_inline)) { return load(p); };
    return totals_of_columns<Op>(x, runs, run_step, n, step, all);
  }
  const auto some = [count](const T* p) __attribute__((always_inline)) { return load_n(p, count); };
  return totals_of_columns<Op>(x, runs, run_step, n, step, some);
}

template <class T, class Op>
void reduce(const ReduceArgs<T>& a) {
  const F32 size = set1(float(a.runs * a.n));
  for (int64_t first = 0; first < a.outputs; first += kLanes) {
    const int count = int(smaller(kLanes, a.outputs - first));
    F32 y = totals<T, Op>(a, a.x + first * a.x_output, count);
    if (a.how == Reduction::mean) y = y / size;
    T* out = a.out + first * a.out_output;
    if (a.out_output == 1 || count == 1) {
      store_up_to(out, y, count);
    } else {
      T each[kLanes];
      store(each, y);
      for (int i = 0; i < count; ++i) out[i * a.out_output] = each[i];
    }
  }
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
