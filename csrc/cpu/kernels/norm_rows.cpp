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

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
// Sums run in as many chains as hide the latency of an addition, and over so many elements at most before they join
// the total in float64: chains stay short in rows of any length.
constexpr int kChains = 4;
constexpr int64_t kBlock = 4096;

LAMINA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

LAMINA_INLINE float joined(const F32 (&s)[kChains]) { return reduce_add((s[0] + s[1]) + (s[2] + s[3])); }

// Calls each(chain, index, count) over the vectors of [begin, end), the chains taking turns.
template <class Each>
LAMINA_INLINE void over_chains(int64_t begin, int64_t end, const Each& each) {
  int64_t i = begin;
  for (; i + kChains * kLanes <= end; i += kChains * kLanes) {
    LAMINA_UNROLL
    for (int c = 0; c < kChains; ++c) each(c, i + c * kLanes, kLanes);
  }
  for (; i < end; i += kLanes) each(0, i, int(smaller(end - i, kLanes)));
}

// Calls load(index, count) for each vector of n elements; returns the sum of what it gives (kSquares: of its squares).
template <bool kSquares, class Load>
LAMINA_INLINE double sum_of(int64_t n, const Load& load) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    F32 s[kChains] = {zero(), zero(), zero(), zero()};
    over_chains(begin, smaller(begin + kBlock, n), [&](int c, int64_t i, int count) {
      const F32 v = load(i, count);
      s[c] = kSquares ? fmadd(v, v, s[c]) : s[c] + v;
    });
    total += double(joined(s));
  }
  return total;
}

struct Moments {
  double first, second;
};

// Sums of v - mean and of its square.
LAMINA_INLINE Moments moments_about(float mean, const float* v, int64_t n) {
  Moments total = {0, 0};
  const F32 m = set1(mean);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    F32 s[kChains] = {zero(), zero(), zero(), zero()}, q[kChains] = {zero(), zero(), zero(), zero()};
    const int64_t end = smaller(begin + kBlock, n), whole = begin + (end - begin) / kLanes * kLanes;
    over_chains(begin, whole, [&](int c, int64_t i, int) {
      const F32 d = load(v + i) - m;
      s[c] = s[c] + d;
      q[c] = fmadd(d, d, q[c]);
    });
    if (whole < end) {
      // Lanes behind the end must add nothing, so they are the mean.
      const int count = int(end - whole);
      const F32 d = select(less(iota(), set1(float(count))), load_n(v + whole, count), m) - m;
      s[0] = s[0] + d;
      q[0] = fmadd(d, d, q[0]);
    }
    total.first += double(joined(s));
    total.second += double(joined(q));
  }
  return total;
}

// out = (v - mean) * scale + shift, times weight, plus bias.
template <class T, bool kCentred, bool kWeight, bool kBias>
LAMINA_INLINE void scale_row(const float* v, float mean, float scale, float shift, const NormRowsArgs<T>& a, T* out) {
  const F32 m = set1(mean), f = set1(scale), g = set1(shift);
  over_chains(0, a.n, [&](int, int64_t i, int count) {
    F32 y = load_up_to(v + i, count);
    y = kCentred ? fmadd(y - m, f, g) : y * f;
    if constexpr (kWeight && kBias) {
      y = fmadd(y, load_up_to(a.weight + i, count), load_up_to(a.bias + i, count));
    } else if constexpr (kWeight) {
      y = y * load_up_to(a.weight + i, count);
    } else if constexpr (kBias) {
      y = y + load_up_to(a.bias + i, count);
    }
    store_up_to(out + i, y, count);
  });
}

template <class T, bool kCentred>
LAMINA_INLINE void scale_row(const float* v, float mean, float scale, float shift, const NormRowsArgs<T>& a, T* out) {
  if (a.weight && a.bias) {
    scale_row<T, kCentred, true, true>(v, mean, scale, shift, a, out);
  } else if (a.weight) {
    scale_row<T, kCentred, true, false>(v, mean, scale, shift, a, out);
  } else if (a.bias) {
    scale_row<T, kCentred, false, true>(v, mean, scale, shift, a, out);
  } else {
    scale_row<T, kCentred, false, false>(v, mean, scale, shift, a, out);
  }
}

// `load(i, count)` gives x + residual, and leaves it at v + i where it does not lie there already.
template <class T, bool kCentred, class Load>
LAMINA_INLINE void norm_row(const NormRowsArgs<T>& a, const Load& load, const float* v, T* out) {
  const double one_of_n = 1.0 / double(a.n);
  if constexpr (kCentred) {
    const float mean = float(sum_of<false>(a.n, load) * one_of_n);
    const Moments about = moments_about(mean, v, a.n);
    const double off = about.first * one_of_n, variance = about.second * one_of_n - off * off;
    // max(0, .) by a comparison that a NaN fails, so that it stays.
    const float scale = 1.0f / __builtin_sqrtf(float(variance < 0 ? 0 : variance) + a.eps);
    scale_row<T, true>(v, mean, scale, float(-off) * scale, a, out);
  } else {
    const double square = sum_of<true>(a.n, load) * one_of_n;
    scale_row<T, false>(v, 0.0f, 1.0f / __builtin_sqrtf(float(square) + a.eps), 0.0f, a, out);
  }
}

template <bool kCentred>
void norm_float_rows(const NormRowsArgs<float>& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const float* x = a.x + row * a.x_row;
    float* out = a.out + row * a.out_row;
    float* v = a.sum ? a.sum + row * a.sum_row : out;
    if (a.residual) {
      const float* r = a.residual + row * a.residual_row;
      const auto add = [=](int64_t i, int count) {
        const F32 s = load_up_to(x + i, count) + load_up_to(r + i, count);
        store_up_to(v + i, s, count);
        return s;
      };
      norm_row<float, kCentred>(a, add, v, out);
    } else if (a.residual_bf16) {
      const bf16* r = a.residual_bf16 + row * a.residual_row;
      const auto add = [=](int64_t i, int count) {
        const F32 s = load_up_to(x + i, count) + load_up_to(r + i, count);
        store_up_to(v + i, s, count);
        return s;
      };
      norm_row<float, kCentred>(a, add, v, out);
    } else {
      norm_row<float, kCentred>(a, [=](int64_t i, int count) { return load_up_to(x + i, count); }, x, out);
    }
  }
}

template <bool kCentred>
void norm_bf16_rows(const NormRowsArgs<bf16>& a) {
  float* v = a.scratch;
  for (int64_t row = 0; row < a.rows; ++row) {
    const bf16* x = a.x + row * a.x_row;
    bf16* out = a.out + row * a.out_row;
    if (a.residual) {
      const bf16* r = a.residual + row * a.residual_row;
      bf16* sum = a.sum ? a.sum + row * a.sum_row : nullptr;
      const auto add = [=](int64_t i, int count) {
        const F32 s = load_up_to(x + i, count) + load_up_to(r + i, count);
        store_up_to(v + i, s, count);
        if (sum) store_up_to(sum + i, s, count);
        return s;
      };
      norm_row<bf16, kCentred>(a, add, v, out);
    } else {
      const auto widen = [=](int64_t i, int count) {
        const F32 s = load_up_to(x + i, count);
        store_up_to(v + i, s, count);
        return s;
      };
      norm_row<bf16, kCentred>(a, widen, v, out);
    }
  }
}

void norm_rows_f32(const NormRowsArgs<float>& a) { a.centred ? norm_float_rows<true>(a) : norm_float_rows<false>(a); }
void norm_rows_bf16(const NormRowsArgs<bf16>& a) { a.centred ? norm_bf16_rows<true>(a) : norm_bf16_rows<false>(a); }

REGISTER_KERNEL(norm_rows_f32_table, norm_rows_f32);
REGISTER_KERNEL(norm_rows_bf16_table, norm_rows_bf16);

}  // namespace
}  // namespace lamina::LAMINA_ISA
