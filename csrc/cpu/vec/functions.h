// Elementary functions of any argument, infinities and NaN included, with their error; math.h has those that kernels
// fuse. Arguments for which a vector of them would need many more steps go to libm one by one: which lane goes is
// decided for each by itself, so that an element's result never depends on its neighbours.
#pragma once

#include "cpu/vec/math.h"

namespace lamina::LAMINA_ISA {
namespace {

#if defined(__AVX512F__)

LAMINA_INLINE F32 sqrt(F32 x) { return {_mm512_sqrt_ps(x.r)}; }
LAMINA_INLINE Mask equal(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_EQ_OQ)}; }
LAMINA_INLINE Mask not_equal(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_NEQ_UQ)}; }
LAMINA_INLINE Mask less_or_equal(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_LE_OQ)}; }

#elif defined(__AVX2__)

LAMINA_INLINE F32 sqrt(F32 x) { return {_mm256_sqrt_ps(x.r)}; }
LAMINA_INLINE Mask equal(F32 a, F32 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_EQ_OQ)}; }
LAMINA_INLINE Mask not_equal(F32 a, F32 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_NEQ_UQ)}; }
LAMINA_INLINE Mask less_or_equal(F32 a, F32 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LE_OQ)}; }

#else

LAMINA_INLINE F32 sqrt(F32 x) {
  for (int i = 0; i < 4; ++i) x.r[i] = __builtin_sqrtf(x.r[i]);
  return x;
}
LAMINA_INLINE Mask equal(F32 a, F32 b) { return {a.r == b.r}; }
LAMINA_INLINE Mask not_equal(F32 a, F32 b) { return {a.r != b.r}; }
LAMINA_INLINE Mask less_or_equal(F32 a, F32 b) { return {a.r <= b.r}; }

#endif

// Whether fmadd rounds once.
#if defined(__AVX2__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

LAMINA_INLINE F32 absolute(F32 x) { return and_bits(x, 0x7fffffffu); }
LAMINA_INLINE F32 negated(F32 x) { return floats_of(bits_of(x) ^ set1_i32(INT32_MIN)); }
LAMINA_INLINE F32 one_where(Mask m) { return select(m, set1(1.0f), zero()); }

// torch's: a NaN in either operand comes out.
LAMINA_INLINE F32 maximum(F32 a, F32 b) { return select(is_nan(a), a, max(a, b)); }
LAMINA_INLINE F32 minimum(F32 a, F32 b) { return select(is_nan(a), a, min(a, b)); }

// Half to even, for any x; a zero keeps the sign of x.
LAMINA_INLINE F32 rounded(F32 x) {
#if defined(__AVX2__)
  return round_even(x);
#else
  // From 2^23 on, numbers are integers; below, adding it leaves no bits for the fraction.
  const F32 a = absolute(x), whole = set1(0x1p23f);
  const F32 r = select(less(a, whole), (a + whole) - whole, a);
  return floats_of(bits_of(r) ^ bits_of(and_bits(x, 0x80000000u)));
#endif
}

LAMINA_INLINE F32 floored(F32 x) {
  const F32 r = rounded(x);
  return select(less(x, r), r - set1(1.0f), r);
}

// `fast`, but slow(x) in the lanes where it is not good.
template <class Slow>
LAMINA_INLINE F32 repaired(Mask good, F32 fast, F32 x, F32 y, const Slow& slow) {
  if (all(good)) return fast;
  alignas(64) float a[F32::lanes], b[F32::lanes], result[F32::lanes];
  store(a, x);
  store(b, y);
  store(result, fast);
  const uint32_t bits = bits_of_lanes(good);
  for (int i = 0; i < F32::lanes; ++i) {
    if (!(bits >> i & 1)) result[i] = slow(a[i], b[i]);
  }
  return load(result);
}

// e^x, relative error 2.5e-7. Results below the smallest normal number may be 0.
LAMINA_INLINE F32 exp(F32 x) {
  x = max(set1(-104.0f), min(set1(89.0f), x));  // in this order a NaN stays
  const F32 n = round_even(x * set1(kLog2E));
  // x - n log 2: the first part of log 2 has ten bits, so that its product is exact.
  F32 r = x - n * set1(0.693359375f);
  r = r - n * set1(-2.12194440e-4f);
  // 2^n in two steps: at n = 128 the result may still be finite.
  return scale_exponent(exp2(r * set1(kLog2E)), n - set1(1.0f)) * set1(2.0f);
}

// Relative error 3e-7.
LAMINA_INLINE F32 sigmoid_precise(F32 x) { return set1(1.0f) / (set1(1.0f) + exp(negated(x))); }

// Natural logarithm, relative error 3e-7.
LAMINA_INLINE F32 log(F32 x) {
  const Mask small = less(x, set1(0x1p-126f));
  const F32 normal = select(small, x * set1(0x1p23f), x);
  F32 y = log_of_normal(normal);
  y = select(small, y - set1(15.942385f), y);
  const F32 infinity = set1(__builtin_inff());
  y = select(less(x, infinity), y, x);  // infinity and NaN are their own
  y = select(less(x, zero()), set1(__builtin_nanf("")), y);
  return select(equal(x, zero()), negated(infinity), y);
}

// sin(x + kQuarters pi / 2), absolute error 2e-7: x less multiples of pi / 2 in three steps (Cody, Waite), and the
// polynomials of Cephes on [-pi/4, pi/4].
template <int kQuarters>
LAMINA_INLINE F32 sine(F32 x) {
  const F32 n = round_even(x * set1(0.636619772f));
  F32 r = x - n * set1(1.5703125f);
  r = r - n * set1(4.837512969970703125e-4f);
  r = r - n * set1(7.54978995489188216e-8f);
  const F32 z = r * r;
  F32 s = fmadd(set1(-1.9515295891e-4f), z, set1(8.3321608736e-3f));
  s = fmadd(s, z, set1(-1.6666654611e-1f));
  s = fmadd(s * z, r, r);
  F32 c = fmadd(set1(2.443315711809948e-5f), z, set1(-1.388731625493765e-3f));
  c = fmadd(c, z, set1(4.166664568298827e-2f));
  c = fmadd(c * z, z, fmadd(set1(-0.5f), z, set1(1.0f)));
  // The low bits of n + 1.5 * 2^23 are those of n.
  const I32 quarter = bits_of(n + set1(12582912.0f)) + set1_i32(kQuarters);
  const Mask odd = less(zero(), floats_of(shift_left(quarter & set1_i32(1), 30)));
  const F32 y = floats_of(bits_of(select(odd, c, s)) ^ shift_left(quarter & set1_i32(2), 30));
  return repaired(less(absolute(x), set1(8192.0f)), y, x, x,
                  [](float v, float) { return kQuarters ? __builtin_cosf(v) : __builtin_sinf(v); });
}
LAMINA_INLINE F32 sin(F32 x) { return sine<0>(x); }
LAMINA_INLINE F32 cos(F32 x) { return sine<1>(x); }

// The error function, absolute and relative error 4e-7: an odd rational function (that of Eigen) up to 4,
// where erf is 1 to the last bit.
LAMINA_INLINE F32 erf(F32 x) {
  x = max(set1(-4.0f), min(set1(4.0f), x));  // in this order a NaN stays
  const F32 z = x * x;
  F32 p = set1(-2.72614225801306e-10f);
  p = fmadd(p, z, set1(2.77068142495902e-08f));
  p = fmadd(p, z, set1(-2.10102402082508e-06f));
  p = fmadd(p, z, set1(-5.69250639462346e-05f));
  p = fmadd(p, z, set1(-7.34990630326855e-04f));
  p = fmadd(p, z, set1(-2.95459980854025e-03f));
  p = fmadd(p, z, set1(-1.60960333262415e-02f));
  F32 q = set1(-1.45660718464996e-05f);
  q = fmadd(q, z, set1(-2.13374055278905e-04f));
  q = fmadd(q, z, set1(-1.68282697438203e-03f));
  q = fmadd(q, z, set1(-7.37332916720468e-03f));
  q = fmadd(q, z, set1(-1.42647390514189e-02f));
  return x * p / q;
}

// x^y, relative error 5e-7: 2^(y log2 x), the logarithm and its product with y as sums of two floats. What is not a
// positive normal x with a result in the normal range is libm's, and all of it where fmadd rounds twice.
LAMINA_INLINE F32 pow(F32 x, F32 y) {
  const auto slow = [](float a, float b) { return __builtin_powf(a, b); };
  if constexpr (!kFused) return repaired(less(x, x), x, x, y, slow);
  const I32 bits = bits_of(x);
  const I32 exponent = shift_right(bits - set1_i32(0x3f2aaaab), 23);
  const F32 m = floats_of(bits - shift_left(exponent, 23));  // in [2/3, 4/3)
  // log2 m = 2 / log 2 (z + z^3 / 3 + ...), z = (m - 1) / (m + 1) = high + low.
  const F32 above = m - set1(1.0f), below = m + set1(1.0f);
  const F32 below_rest = m - (below - set1(1.0f));
  const F32 high = above / below;
  F32 rest = fmadd(negated(high), below, above);
  rest = fmadd(negated(high), below_rest, rest);
  const F32 low = rest / below;
  const F32 z2 = high * high;
  F32 p = set1(2.0f / 11);
  p = fmadd(p, z2, set1(2.0f / 9));
  p = fmadd(p, z2, set1(2.0f / 7));
  p = fmadd(p, z2, set1(2.0f / 5));
  p = fmadd(p, z2, set1(2.0f / 3));
  const F32 scale = set1(2.88539004f), scale_rest = set1(3.85192598e-8f);  // 2 / log 2
  const F32 first = high * scale;
  F32 tail = fmadd(high, scale, negated(first));
  tail = fmadd(low, scale, fmadd(high, scale_rest, tail));
  tail = fmadd(p * z2, high * set1(kLog2E), tail);
  // exponent + first + tail; the exponent is 0 or larger than first.
  const F32 e = to_float(exponent);
  const F32 sum = e + first;
  tail = tail + (first - (sum - e));
  const F32 product = sum * y;
  const F32 error = fmadd(tail, y, fmadd(sum, y, negated(product)));
  const F32 n = round_even(product);
  const F32 fast = scale_exponent(exp2((product - n) + error), n);
  const Mask good = less(set1(0x1p-126f), x) & less(x, set1(__builtin_inff())) & less(absolute(product), set1(125.0f));
  return repaired(good, fast, x, y, slow);
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
