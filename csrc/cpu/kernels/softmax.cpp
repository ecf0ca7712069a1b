// Softmax of rows, e^(x - m) / sum of e^(x - m) with m the largest element.
//
// Three passes over a row: the largest element; exponentials and their sum; the quotient. The first reads memory, the
// others find the row in L1. Two rows go together, so that what a row waits for (its largest element, its sum, the
// division) hides behind the other's.
//
// Rows whose elements do not lie together, columns of a matrix, are transposed in registers on their way to scratch
// and back: one order of summation whatever the strides, and so the same bits.
//
// A row that is -inf throughout gives NaN, as -inf - -inf does, and so does one that holds NaN or +inf.
#include "cpu/kernels/softmax.h"

#include "cpu/kernels/row_chains.h"
#include "cpu/vec/exp.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kTogether = 2;

// First n elements; the rest is -inf, which no maximum and no sum of exponentials notices.
template <class T>
LAMINA_INLINE F32 load_elements(const T* p, int n) {
  if (n >= kLanes) return load(p);
  return select(less(iota(), set1(float(n))), load_n(p, n), set1(-__builtin_inff()));
}

// `e` is where the exponentials go in between: the row of the output if it is float32.
template <int R, class X, class Out>
LAMINA_INLINE void softmax_rows(const X* const (&x)[R], int64_t n, float* const (&e)[R], Out* const (&out)[R]) {
  F32 most[R][kChains];
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) most[r][0] = most[r][1] = set1(-__builtin_inff());
  over_chains(0, n, [&](int c, int64_t i, int count) __attribute__((always_inline)) {
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) most[r][c] = max(most[r][c], load_elements(x[r] + i, count));
  });
  F32 largest[R];
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) largest[r] = set1(reduce_max(max(most[r][0], most[r][1])));

  double total[R] = {};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    F32 sum[R][kChains];
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = zero();
    over_chains(begin, smaller(begin + kBlock, n), [&](int c, int64_t i, int count) __attribute__((always_inline)) {
      LAMINA_UNROLL
      for (int r = 0; r < R; ++r) {
        const F32 power = exp(load_elements(x[r] + i, count) - largest[r]);
        sum[r][c] = sum[r][c] + power;
        store_up_to(e[r] + i, power, count);
      }
    });
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) total[r] += double(reduce_add(sum[r][0] + sum[r][1]));
  }

  F32 scale[R];
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) scale[r] = set1(float(1.0 / total[r]));
  over_chains(0, n, [&](int, int64_t i, int count) __attribute__((always_inline)) {
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) store_up_to(out[r] + i, load_up_to(e[r] + i, count) * scale[r], count);
  });
}

LAMINA_INLINE float* powers_of(float* out, float*) { return out; }
LAMINA_INLINE float* powers_of(bf16*, float* scratch) { return scratch; }

template <int R, class X, class Out>
void some_rows(const SoftmaxArgs<X, Out>& a, int64_t row) {
  const X* x[R];
  Out* out[R];
  float* e[R];
  for (int r = 0; r < R; ++r) {
    x[r] = a.x + (row + r) * a.x_row;
    out[r] = a.out + (row + r) * a.out_row;
    e[r] = powers_of(out[r], a.scratch + r * a.n);
  }
  softmax_rows<R>(x, a.n, e, out);
}

// Columns, as many at a time as a register has lanes.
template <class X, class Out>
void columns(const SoftmaxArgs<X, Out>& a) {
  const int64_t padded = (a.n + kLanes - 1) / kLanes * kLanes;
  for (int64_t first = 0; first < a.rows; first += kLanes) {
    const int count = int(smaller(kLanes, a.rows - first));
    for (int64_t i = 0; i < a.n; i += kLanes) {
      F32 t[kLanes];
      LAMINA_UNROLL
      for (int k = 0; k < kLanes; ++k) {
        t[k] = i + k < a.n ? load_up_to(a.x + first + (i + k) * a.x_step, count) : zero();
      }
      transpose(t);
      LAMINA_UNROLL
      for (int k = 0; k < kLanes; ++k) store(a.scratch + k * padded + i, t[k]);
    }
    int row = 0;
    for (; row + kTogether <= count; row += kTogether) {
      float* const e[kTogether] = {a.scratch + row * padded, a.scratch + (row + 1) * padded};
      const float* const x[kTogether] = {e[0], e[1]};
      softmax_rows<kTogether>(x, a.n, e, e);
    }
    if (row < count) {
      float* const e[1] = {a.scratch + row * padded};
      const float* const x[1] = {e[0]};
      softmax_rows<1>(x, a.n, e, e);
    }
    for (int64_t i = 0; i < a.n; i += kLanes) {
      F32 t[kLanes];
      LAMINA_UNROLL
      for (int k = 0; k < kLanes; ++k) t[k] = load(a.scratch + k * padded + i);
      transpose(t);
      LAMINA_UNROLL
      for (int k = 0; k < kLanes; ++k) {
        if (i + k < a.n) store_up_to(a.out + first + (i + k) * a.out_step, t[k], count);
      }
    }
  }
}

template <class X, class Out>
LAMINA_INLINE void softmax(const SoftmaxArgs<X, Out>& a) {
  if (a.n > 1 && (a.x_step != 1 || a.out_step != 1)) return columns(a);
  int64_t row = 0;
  for (; row + kTogether <= a.rows; row += kTogether) some_rows<kTogether>(a, row);
  if (row < a.rows) some_rows<1>(a, row);
}

void softmax_f32(const SoftmaxArgs<float, float>& a) { softmax(a); }
void softmax_bf16(const SoftmaxArgs<bf16, bf16>& a) { softmax(a); }
void softmax_f32_bf16(const SoftmaxArgs<float, bf16>& a) { softmax(a); }
void softmax_bf16_f32(const SoftmaxArgs<bf16, float>& a) { softmax(a); }

REGISTER_KERNEL(softmax_f32_table, softmax_f32);
REGISTER_KERNEL(softmax_bf16_table, softmax_bf16);
REGISTER_KERNEL(softmax_f32_bf16_table, softmax_f32_bf16);
REGISTER_KERNEL(softmax_bf16_f32_table, softmax_bf16_f32);

}  // namespace
}  // namespace lamina::LAMINA_ISA
