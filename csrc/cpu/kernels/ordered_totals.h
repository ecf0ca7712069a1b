// Sums, maxima and minima of many elements in an order that does not depend on how they lie in memory: rows whose
// elements are adjacent and columns give the same bits, as float sums otherwise would not.
//
// Elements come in runs. Of a piece of a run, kPiece elements, element i goes to chain i % lanes; the chains join by
// halves (0 and 8, 1 and 9, ...; then 0 and 4, ...), as the lanes of a register do. In a row, a chain is a lane, and a
// vector of the row a step of all chains; in columns a chain is a register, and its lanes are the columns.
//
// Chains take 32 elements each, and the sums of pieces join with the error of each addition kept (Neumaier's form of
// Kahan's), so that a sum of millions is as good as one of hundreds.
#pragma once

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
constexpr int64_t kPiece = 32 * kLanes;
// Rows, or pieces of a row, that go together: an addition waits for the one before in its own row only.
constexpr int kTogether = 4;

LAMINA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

LAMINA_INLINE F32 first_or(F32 x, int count, F32 rest) { return select(less(iota(), set1(float(count))), x, rest); }

struct Sum {
  static LAMINA_INLINE F32 identity() { return zero(); }
  static LAMINA_INLINE F32 join(F32 a, F32 b) { return a + b; }
  static LAMINA_INLINE float across(F32 x) { return reduce_add(x); }

  F32 sum = zero(), error = zero();

  LAMINA_INLINE void add(F32 x) {
    const F32 t = sum + x, seen = t - sum;
    error = error + ((sum - (t - seen)) + (x - seen));
    sum = t;
  }
  // Where the sum is infinite or NaN, the error is NaN.
  LAMINA_INLINE F32 total() const {
    return select(less(and_bits(error, 0x7fffffffu), set1(__builtin_inff())), sum + error, sum);
  }
};

// A NaN stays. The sign of a zero does not matter to an order, so it must not to a result: adding zero makes it +.
struct Max {
  static LAMINA_INLINE F32 identity() { return set1(-__builtin_inff()); }
  static LAMINA_INLINE F32 join(F32 a, F32 b) { return select(is_nan(b), b, max(b, a)); }
  static LAMINA_INLINE float across(F32 x) { return bits_of_lanes(is_nan(x)) ? __builtin_nanf("") : reduce_max(x); }

  F32 most = identity();

  LAMINA_INLINE void add(F32 x) { most = join(most, x); }
  LAMINA_INLINE F32 total() const { return most + zero(); }
};

struct Min {
  static LAMINA_INLINE F32 identity() { return set1(__builtin_inff()); }
  static LAMINA_INLINE F32 join(F32 a, F32 b) { return select(is_nan(b), b, min(b, a)); }
  static LAMINA_INLINE float across(F32 x) {
    return bits_of_lanes(is_nan(x)) ? __builtin_nanf("") : -reduce_max(zero() - x);
  }

  F32 least = identity();

  LAMINA_INLINE void add(F32 x) { least = join(least, x); }
  LAMINA_INLINE F32 total() const { return least + zero(); }
};

// The pieces [begin[r], begin[r] + n) of R streams.
template <class Op, int R, class Load>
LAMINA_INLINE void join_pieces(int64_t n, const Load& load, float* const (&to)[R]) {
  F32 x[R];
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) x[r] = Op::identity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) x[r] = Op::join(x[r], load(r, i, kLanes));
  }
  if (i < n) {
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      x[r] = Op::join(x[r], first_or(load(r, i, int(n - i)), int(n - i), Op::identity()));
    }
  }
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) *to[r] = Op::across(x[r]);
}

// Lane r is the total of row r < rows <= lanes. load(row, run, i, count) gives elements i to i + count of a run of n.
template <class Op, class Load>
LAMINA_INLINE F32 totals_of_rows(int rows, int64_t runs, int64_t n, const Load& load) {
  Op op;
  alignas(64) float found[kTogether][kLanes] = {};
  for (int64_t run = 0; run < runs; ++run) {
    int64_t begin = 0;
    if (rows < kTogether) {
      for (; begin + kTogether * kPiece <= n; begin += kTogether * kPiece) {
        for (int row = 0; row < rows; ++row) {
          float* const to[kTogether] = {found[0] + row, found[1] + row, found[2] + row, found[3] + row};
          const auto piece = [&](int r, int64_t i, int count) __attribute__((always_inline)) {
            return load(row, run, begin + r * kPiece + i, count);
          };
          join_pieces<Op>(kPiece, piece, to);
        }
        LAMINA_UNROLL
        for (int r = 0; r < kTogether; ++r) op.add(load_up_to(found[r], kLanes));
      }
    }
    for (; begin < n; begin += kPiece) {
      const int64_t size = smaller(kPiece, n - begin);
      int row = 0;
      for (; row + kTogether <= rows; row += kTogether) {
        float* const first = found[0] + row;
        float* const to[kTogether] = {first, first + 1, first + 2, first + 3};
        const auto piece = [&](int r, int64_t i, int count)
                               __attribute__((always_inline)) { return load(row + r, run, begin + i, count); };
        join_pieces<Op>(size, piece, to);
      }
      for (; row < rows; ++row) {
        float* const to[1] = {found[0] + row};
        const auto piece = [&](int, int64_t i, int count)
                               __attribute__((always_inline)) { return load(row, run, begin + i, count); };
        join_pieces<Op>(size, piece, to);
      }
      op.add(load_up_to(found[0], kLanes));
    }
  }
  return op.total();
}

template <class Op, int kHalf>
LAMINA_INLINE void join_halves(F32 (&x)[kLanes]) {
  LAMINA_UNROLL
  for (int k = 0; k < kHalf; ++k) x[k] = Op::join(x[k], x[k + kHalf]);
  if constexpr (kHalf > 1) join_halves<Op, kHalf / 2>(x);
}

// Lane c is the total of column c. load(p) gives one element of every column, at x and `step` further each.
template <class Op, class T, class Load>
LAMINA_INLINE F32 totals_of_columns(const T* x, int64_t runs, int64_t run_step, int64_t n, int64_t step,
                                    const Load& load) {
  Op op;
  for (int64_t run = 0; run < runs; ++run) {
    const T* p = x + run * run_step;
    for (int64_t begin = 0; begin < n; begin += kPiece) {
      const int64_t size = smaller(kPiece, n - begin);
      F32 chain[kLanes];
      LAMINA_UNROLL
      for (int k = 0; k < kLanes; ++k) chain[k] = Op::identity();
      int64_t i = 0;
      for (; i + kLanes <= size; i += kLanes) {
        LAMINA_UNROLL
        for (int k = 0; k < kLanes; k += 4) {
          LAMINA_UNROLL
          for (int j = 0; j < 4; ++j) chain[k + j] = Op::join(chain[k + j], load(p + j * step));
          p += 4 * step;
          __asm__(""
                  : "+r"(p));  // keeps the compiler from holding the multiples of step in registers, and spilling them
        }
      }
      LAMINA_UNROLL
      for (int k = 0; k < kLanes; ++k) {
        if (i + k < size) chain[k] = Op::join(chain[k], load(p + k * step));
      }
      p += (size - i) * step;
      join_halves<Op, kLanes / 2>(chain);
      op.add(chain[0]);
    }
  }
  return op.total();
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
