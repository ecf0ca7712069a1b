// Layer norm, (v - mean) / sqrt(variance + eps) * weight + bias, and root mean square norm, v / sqrt(mean v^2 + eps) *
// weight, of the rows of v = x + residual.
//
// A row comes in from memory once: the pass that adds the residual leaves it as float32 where it is at hand next (the
// sum asked for, the output's own row, or scratch), and what follows reads it from L1.
//
// The variance is taken of distances from the mean, never as E[v^2] - E[v]^2, which cancels. The mean itself is
// rounded; what it is off by is the mean of the distances d, and is taken out of both moments:
//   variance = E[d^2] - E[d]^2,   v - mean = d - E[d]
// (the corrected two-pass algorithm; Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983).
// It costs one addition a vector, and a constant row comes out as zeros at any offset.
#include "cpu/kernels/norm_rows.h"

#include "cpu/kernels/row_chains.h"
#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

// Rows that go together: the sums, the division and the square root of one hide behind the other's, and both share a
// load of weight and bias.
constexpr int kTogether = 2;

// Calls load(row, index, count) for each vector of n elements of R rows; total is the sum of what it gives (kSquares:
// of its squares).
template <int R, bool kSquares, class Load>
LAMINA_INLINE void sum_rows(int64_t n, const Load& load, double (&total)[R]) {
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    F32 s[R][kChains];
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      LAMINA_UNROLL
      for (int c = 0; c < kChains; ++c) s[r][c] = zero();
    }
    over_chains(begin, smaller(begin + kBlock, n), [&](int c, int64_t i, int count) __attribute__((always_inline)) {
      LAMINA_UNROLL
      for (int r = 0; r < R; ++r) {
        const F32 v = load(r, i, count);
        s[r][c] = kSquares ? fmadd(v, v, s[r][c]) : s[r][c] + v;
      }
    });
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) total[r] += double(reduce_add(s[r][0] + s[r][1]));
  }
}

// Sums of v - mean and of its square.
template <int R>
LAMINA_INLINE void moments_about(const float (&mean)[R], const float* const (&v)[R], int64_t n, double (&first)[R],
                                 double (&second)[R]) {
  F32 m[R];
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) m[r] = set1(mean[r]);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    F32 s[R][kChains], q[R][kChains];
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      LAMINA_UNROLL
      for (int c = 0; c < kChains; ++c) s[r][c] = q[r][c] = zero();
    }
    over_chains(begin, smaller(begin + kBlock, n), [&](int c, int64_t i, int count) __attribute__((always_inline)) {
      LAMINA_UNROLL
      for (int r = 0; r < R; ++r) {
        F32 x = load_up_to(v[r] + i, count);
        // Lanes behind the end must add nothing, so they are the mean.
        if (count < kLanes) x = select(less(iota(), set1(float(count))), x, m[r]);
        const F32 d = x - m[r];
        s[r][c] = s[r][c] + d;
        q[r][c] = fmadd(d, d, q[r][c]);
      }
    });
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      first[r] += double(reduce_add(s[r][0] + s[r][1]));
      second[r] += double(reduce_add(q[r][0] + q[r][1]));
    }
  }
}

// What becomes of each element of a row: (v - mean) * scale + shift.
struct Scale {
  float mean, scale, shift;
};

template <class T, int R, bool kCentred, bool kWeight, bool kBias>
LAMINA_INLINE void scale_rows(const float* const (&v)[R], const Scale (&by)[R], const NormRowsArgs<T>& a,
                              T* const (&out)[R]) {
  const float *weights = a.weight, *biases = a.bias;
  F32 mean[R], scale[R], shift[R];
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) {
    mean[r] = set1(by[r].mean);
    scale[r] = set1(by[r].scale);
    shift[r] = set1(by[r].shift);
  }
  over_chains(0, a.n, [&](int, int64_t i, int count) __attribute__((always_inline)) {
    const F32 weight = kWeight ? load_up_to(weights + i, count) : zero();
    const F32 bias = kBias ? load_up_to(biases + i, count) : zero();
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      F32 y = load_up_to(v[r] + i, count);
      y = kCentred ? fmadd(y - mean[r], scale[r], shift[r]) : y * scale[r];
      if constexpr (kWeight && kBias) {
        y = fmadd(y, weight, bias);
      } else if constexpr (kWeight) {
        y = y * weight;
      } else if constexpr (kBias) {
        y = y + bias;
      }
      store_up_to(out[r] + i, y, count);
    }
  });
}

// `load(row, i, count)` gives x + residual, and leaves it at v[row] + i where it does not lie there already.
template <class T, int R, bool kCentred, class Load>
LAMINA_INLINE void norm_rows(const NormRowsArgs<T>& a, const Load& load, const float* const (&v)[R],
                             T* const (&out)[R]) {
  const double one_of_n = 1.0 / double(a.n);
  double total[R] = {};
  Scale by[R];
  sum_rows<R, !kCentred>(a.n, load, total);
  if constexpr (kCentred) {
    float mean[R];
    double first[R] = {}, second[R] = {};
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) mean[r] = float(total[r] * one_of_n);
    moments_about(mean, v, a.n, first, second);
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      const double off = first[r] * one_of_n, variance = second[r] * one_of_n - off * off;
      // max(0, .) by a comparison that a NaN fails, so that it stays.
      const float scale = 1.0f / __builtin_sqrtf(float(variance < 0 ? 0 : variance) + a.eps);
      by[r] = {mean[r], scale, float(-off) * scale};
    }
  } else {
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) by[r] = {0.0f, 1.0f / __builtin_sqrtf(float(total[r] * one_of_n) + a.eps), 0.0f};
  }
  if (a.weight && a.bias) {
    scale_rows<T, R, kCentred, true, true>(v, by, a, out);
  } else if (a.weight) {
    scale_rows<T, R, kCentred, true, false>(v, by, a, out);
  } else if (a.bias) {
    scale_rows<T, R, kCentred, false, true>(v, by, a, out);
  } else {
    scale_rows<T, R, kCentred, false, false>(v, by, a, out);
  }
}

// R rows from `row` on. x + residual stays, as float32, where it is at hand: in x itself, the sum, the output or
// scratch.
template <int R, bool kCentred>
void norm_float_rows(const NormRowsArgs<float>& a, int64_t row) {
  const float *x[R], *v[R];
  float *out[R], *sum[R];
  for (int r = 0; r < R; ++r) {
    x[r] = a.x + (row + r) * a.x_row;
    out[r] = a.out + (row + r) * a.out_row;
    sum[r] = a.sum ? a.sum + (row + r) * a.sum_row : out[r];
    v[r] = a.residual || a.residual_bf16 ? sum[r] : x[r];
  }
  const auto add = [&](const auto* residual) __attribute__((always_inline)) {
    decltype(residual) from[R];
    for (int r = 0; r < R; ++r) from[r] = residual + (row + r) * a.residual_row;
    const auto load = [&](int r, int64_t i, int count) __attribute__((always_inline)) {
      const F32 s = load_up_to(x[r] + i, count) + load_up_to(from[r] + i, count);
      store_up_to(sum[r] + i, s, count);
      return s;
    };
    norm_rows<float, R, kCentred>(a, load, v, out);
  };
  if (a.residual) {
    add(a.residual);
  } else if (a.residual_bf16) {
    add(a.residual_bf16);
  } else {
    const auto load = [&](int r, int64_t i, int count)
                          __attribute__((always_inline)) { return load_up_to(x[r] + i, count); };
    norm_rows<float, R, kCentred>(a, load, v, out);
  }
}

template <int R, bool kCentred>
void norm_bf16_rows(const NormRowsArgs<bf16>& a, int64_t row) {
  const bf16 *x[R], *residual[R];
  const float* v[R];
  bf16 *out[R], *sum[R];
  float* widened[R];
  for (int r = 0; r < R; ++r) {
    x[r] = a.x + (row + r) * a.x_row;
    residual[r] = a.residual ? a.residual + (row + r) * a.residual_row : nullptr;
    out[r] = a.out + (row + r) * a.out_row;
    sum[r] = a.sum ? a.sum + (row + r) * a.sum_row : nullptr;
    v[r] = widened[r] = a.scratch + r * a.n;
  }
  const auto load = [&](int r, int64_t i, int count) __attribute__((always_inline)) {
    F32 s = load_up_to(x[r] + i, count);
    if (residual[r]) s = s + load_up_to(residual[r] + i, count);
    if (sum[r]) store_up_to(sum[r] + i, s, count);
    store_up_to(widened[r] + i, s, count);
    return s;
  };
  norm_rows<bf16, R, kCentred>(a, load, v, out);
}

template <bool kCentred>
void norm_all(const NormRowsArgs<float>& a) {
  int64_t row = 0;
  for (; row + kTogether <= a.rows; row += kTogether) norm_float_rows<kTogether, kCentred>(a, row);
  if (row < a.rows) norm_float_rows<1, kCentred>(a, row);
}
template <bool kCentred>
void norm_all(const NormRowsArgs<bf16>& a) {
  int64_t row = 0;
  for (; row + kTogether <= a.rows; row += kTogether) norm_bf16_rows<kTogether, kCentred>(a, row);
  if (row < a.rows) norm_bf16_rows<1, kCentred>(a, row);
}

void norm_rows_f32(const NormRowsArgs<float>& a) { a.centred ? norm_all<true>(a) : norm_all<false>(a); }
void norm_rows_bf16(const NormRowsArgs<bf16>& a) { a.centred ? norm_all<true>(a) : norm_all<false>(a); }

REGISTER_KERNEL(norm_rows_f32_table, norm_rows_f32);
REGISTER_KERNEL(norm_rows_bf16_table, norm_rows_bf16);

}  // namespace
}  // namespace lamina::LAMINA_ISA
