// Sums, maxima and minima of many elements in an order that does not depend on how they lie in memory: rows whose
// elements are adjacent and columns give the same bits, as float sums otherwise would not.
//
// Elements come in runs. Of a piece of a run, kPiece elements, element i goes to chain i % lanes; the chains join by
// halves (0 and 8, 1 and 9, ...; then 0 and 4, ...), as the lanes of a register do. In a row, a chain is a lane, and a
// vector of the row a step of all chains. In columns a chain is a register whose lanes are the columns: the chains r,
// r + 4, r + 8, ... join among themselves first, so four visits to every fourth element each need a quarter of the
// chains, and leave registers for neighbouring columns, which are read as a stream.
//
// Chains take 32 elements each, and the sums of pieces join with the error of each addition kept (Neumaier's form of
// Kahan's), so that a sum of millions is as good as one of hundreds.
#pragma once

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
constexpr int64_t kPiece = 32 * kLanes;
// Pieces of one row that are read before those of the next.
constexpr int kPiecesOfRow = 16;
// Registers of columns that are read together.
constexpr int kColumnsTogether = 6;
constexpr int kVisits = 4;

LAMINA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// take: one more element for a chain, of which `neutral` changes nothing; join: of two chains; across: of the lanes of
// a register; add and total: of pieces.
struct Sum {
  static LAMINA_INLINE F32 identity() { return zero(); }
  static LAMINA_INLINE F32 neutral() { return zero(); }
  static LAMINA_INLINE F32 take(F32 chain, F32 x) { return chain + x; }
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

struct SumOfSquares : Sum {
  static LAMINA_INLINE F32 take(F32 chain, F32 x) { return fmadd(x, x, chain); }
};

// A NaN stays. The sign of a zero does not matter to an order, so it must not to a result: adding zero makes it +.
struct Max {
  static LAMINA_INLINE F32 identity() { return set1(-__builtin_inff()); }
  static LAMINA_INLINE F32 neutral() { return identity(); }
  static LAMINA_INLINE F32 take(F32 chain, F32 x) { return select(is_nan(x), x, max(x, chain)); }
  static LAMINA_INLINE F32 join(F32 a, F32 b) { return take(a, b); }
  static LAMINA_INLINE float across(F32 x) { return bits_of_lanes(is_nan(x)) ? __builtin_nanf("") : reduce_max(x); }

  F32 most = identity();

  LAMINA_INLINE void add(F32 x) { most = join(most, x); }
  LAMINA_INLINE F32 total() const { return most + zero(); }
};

struct Min {
  static LAMINA_INLINE F32 identity() { return set1(__builtin_inff()); }
  static LAMINA_INLINE F32 neutral() { return identity(); }
  static LAMINA_INLINE F32 take(F32 chain, F32 x) { return select(is_nan(x), x, min(x, chain)); }
  static LAMINA_INLINE F32 join(F32 a, F32 b) { return take(a, b); }
  static LAMINA_INLINE float across(F32 x) {
    return bits_of_lanes(is_nan(x)) ? __builtin_nanf("") : -reduce_max(zero() - x);
  }

  F32 least = identity();

  LAMINA_INLINE void add(F32 x) { least = join(least, x); }
  LAMINA_INLINE F32 total() const { return least + zero(); }
};

// The totals of one piece of R rows each. load(r, i, count) gives elements i to i + count.
template <class Op, int R, class Load>
LAMINA_INLINE void pieces_of_rows(int64_t begin, int64_t end, const Load& load, float* to) {
  F32 chains[R];
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) chains[r] = Op::identity();
  int64_t i = begin;
  if constexpr (R == 1) {
    // Few instructions a step, so that those of several pieces fit into the window the processor looks ahead.
    constexpr int kSteps = 8;
    for (; i + kSteps * kLanes <= end; i += kSteps * kLanes) {
      LAMINA_UNROLL
      for (int k = 0; k < kSteps; ++k) chains[0] = Op::take(chains[0], load(0, i + k * kLanes, kLanes));
    }
  }
  for (; i + kLanes <= end; i += kLanes) {
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) chains[r] = Op::take(chains[r], load(r, i, kLanes));
  }
  if (i < end) {
    const int count = int(end - i);
    const Mask there = less(iota(), set1(float(count)));
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) chains[r] = Op::take(chains[r], select(there, load(r, i, count), Op::neutral()));
  }
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) to[r] = Op::across(chains[r]);
}

// Lane r is the total of row r < rows <= lanes. load(row, run, i, count) gives elements i to i + count of a run of n.
// Short rows go together, four at a time; of long ones, a piece is one chain of additions, and that of the next is
// under way before it ends.
template <class Op, class Load>
LAMINA_INLINE F32 totals_of_rows(int rows, int64_t runs, int64_t n, const Load& load) {
  Op op;
  alignas(64) float found[kPiecesOfRow][kLanes];
  // Lanes without a row are zeros; a short row needs one register of them.
  for (int64_t piece = 0; piece < kPiecesOfRow && piece * kPiece < n; ++piece) store(found[piece], zero());
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t first = 0; first < n; first += kPiecesOfRow * kPiece) {
      const int64_t last = smaller(first + kPiecesOfRow * kPiece, n);
      int row = 0;
      for (; last - first <= kPiece && row + 4 <= rows; row += 4) {
        const auto element = [&](int r, int64_t i, int count)
                                 __attribute__((always_inline)) { return load(row + r, run, i, count); };
        pieces_of_rows<Op, 4>(first, last, element, found[0] + row);
      }
      for (; row < rows; ++row) {
        const auto element = [&](int, int64_t i, int count)
                                 __attribute__((always_inline)) { return load(row, run, i, count); };
        float* to = found[0] + row;
        for (int64_t begin = first; begin < last; begin += kPiece, to += kLanes) {
          pieces_of_rows<Op, 1>(begin, smaller(begin + kPiece, last), element, to);
        }
      }
      const int pieces = int((last - first + kPiece - 1) / kPiece);
      for (int piece = 0; piece < pieces; ++piece) op.add(load_up_to(found[piece], kLanes));
    }
  }
  return op.total();
}

template <class Op, int kChains, int C>
LAMINA_INLINE void join_halves(F32 (&chain)[kChains][C]) {
  if constexpr (kChains > 1) {
    F32 half[kChains / 2][C];
    LAMINA_UNROLL
    for (int k = 0; k < kChains / 2; ++k) {
      LAMINA_UNROLL
      for (int c = 0; c < C; ++c) half[k][c] = Op::join(chain[k][c], chain[k + kChains / 2][c]);
    }
    join_halves<Op>(half);
    LAMINA_UNROLL
    for (int c = 0; c < C; ++c) chain[0][c] = half[0][c];
  }
}

// totals[c], lane l: of column c * lanes + l. load(p, c) gives one element of each column of register c, from the
// address of the first; the next elements of the columns are `step` further each.
template <class Op, int C, class T, class Load>
LAMINA_INLINE void totals_of_columns(const T* x, int64_t runs, int64_t run_step, int64_t n, int64_t step,
                                     const Load& load, F32 (&totals)[C]) {
  constexpr int kChains = kLanes / kVisits;
  Op op[C];
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t begin = 0; begin < n; begin += kPiece) {
      const int64_t size = smaller(kPiece, n - begin), rounds = size / kLanes, rest = size % kLanes;
      F32 found[kVisits][C];
      for (int visit = 0; visit < kVisits; ++visit) {
        const T* p = x + run * run_step + (begin + visit) * step;
        F32 chain[kChains][C];
        LAMINA_UNROLL
        for (int k = 0; k < kChains; ++k) {
          LAMINA_UNROLL
          for (int c = 0; c < C; ++c) chain[k][c] = Op::identity();
        }
        for (int64_t round = 0; round < rounds; ++round) {
          LAMINA_UNROLL
          for (int k = 0; k < kChains; ++k) {
            LAMINA_UNROLL
            for (int c = 0; c < C; ++c) chain[k][c] = Op::take(chain[k][c], load(p + c * kLanes, c));
            p += kVisits * step;
          }
        }
        LAMINA_UNROLL
        for (int k = 0; k < kChains; ++k) {
          if (visit + kVisits * k < rest) {
            LAMINA_UNROLL
            for (int c = 0; c < C; ++c) chain[k][c] = Op::take(chain[k][c], load(p + c * kLanes, c));
            p += kVisits * step;
          }
        }
        join_halves<Op>(chain);
        LAMINA_UNROLL
        for (int c = 0; c < C; ++c) found[visit][c] = chain[0][c];
      }
      join_halves<Op>(found);
      LAMINA_UNROLL
      for (int c = 0; c < C; ++c) op[c].add(found[0][c]);
    }
  }
  LAMINA_UNROLL
  for (int c = 0; c < C; ++c) totals[c] = op[c].total();
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
