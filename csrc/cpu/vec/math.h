// Elementary functions on one register of floats, with their error.
#pragma once

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

// 2^x, relative error 8e-8 for x in [-126, 127]; smaller x give 0 or a subnormal, NaN stays NaN.
// Degree-6 minimax polynomial of 2^f on [-1/2, 1/2], exact at 0. Degree 5 would be off by 1.7e-7.
LAMINA_INLINE F32 exp2(F32 x) {
  const F32 n = round_even(x);
  const F32 f = x - n;
  F32 p = set1(1.535336341e-04f);
  p = fmadd(p, f, set1(1.339887385e-03f));
  p = fmadd(p, f, set1(9.618436918e-03f));
  p = fmadd(p, f, set1(5.550332367e-02f));
  p = fmadd(p, f, set1(2.402264774e-01f));
  p = fmadd(p, f, set1(6.931471825e-01f));
  p = fmadd(p, f, set1(1.0f));
  return scale_exponent(p, n);
}

// The same with a polynomial of degree 3, relative error 1e-4: for results that are rounded to bfloat16.
LAMINA_INLINE F32 exp2_bf16(F32 x) {
  const F32 n = round_even(x);
  const F32 f = x - n;
  F32 p = set1(5.5171669e-2f);
  p = fmadd(p, f, set1(2.4261112e-1f));
  p = fmadd(p, f, set1(6.9326099e-1f));
  p = fmadd(p, f, set1(9.9992807e-1f));
  return scale_exponent(p, n);
}

constexpr float kLog2E = 1.4426950408889634f;

// x * sigmoid(z) with z already times log2(e), clamped to where the sigmoid is 0 and 1 but for 1e-36.
LAMINA_INLINE F32 times_sigmoid_log2(F32 x, F32 z) {
  // max and min return the second operand on NaN: z NaN comes only from x NaN, and x * anything keeps it.
  const F32 clamped = min(max(z, set1(-120.0f)), set1(120.0f));
  // x is held as well: -inf times what is left of zero would be -inf.
  return max(set1(-1e30f), x) * reciprocal_of_normal(set1(1.0f) + exp2(zero() - clamped));
}

LAMINA_INLINE F32 silu(F32 x) { return times_sigmoid_log2(x, x * set1(kLog2E)); }

// The GELU of CLIP, x sigmoid(1.702 x).
LAMINA_INLINE F32 quick_gelu(F32 x) { return times_sigmoid_log2(x, x * set1(1.702f * kLog2E)); }

// 1 - 2 / (1 + e^2x), absolute error 7e-7; beyond the clamp it is 1 to the last bit.
LAMINA_INLINE F32 tanh(F32 x) {
  // In this order a NaN stays.
  const F32 z = max(set1(-64.0f), min(set1(64.0f), x * set1(2.0f * kLog2E)));
  return set1(1.0f) - set1(2.0f) * reciprocal_of_normal(set1(1.0f) + exp2(z));
}

// The tanh form of GELU, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x sigmoid(2 sqrt(2/pi) (...)).
LAMINA_INLINE F32 gelu_tanh(F32 x) {
  const F32 linear = set1(2.0f * 0.7978845608028654f * kLog2E);
  const F32 cubic = set1(2.0f * 0.7978845608028654f * 0.044715f * kLog2E);
  return times_sigmoid_log2(x, x * fmadd(x * x, cubic, linear));
}

// GELU, x Phi(x), absolute error 5.4e-6 for |x| <= 4.75 and 1e-7 |x| + 5e-6 beyond.
// Phi(x) = 1/2 + x P(x^2) with P minimax on |x| <= 4.75, held to 1/2 / 4.75 at the end so that the clamped tail
// is exactly 0 and 1. P is evaluated in u = 2 x^2 / 4.75^2 - 1: powers of x^2 up to 22 would cancel.
LAMINA_INLINE F32 gelu_erf(F32 x) {
  const F32 c = min(max(x, set1(-4.75f)), set1(4.75f));
  const F32 u = fmadd(c * c, set1(2.0f / (4.75f * 4.75f)), set1(-1.0f));
  F32 p = set1(0.0012050798f);
  p = fmadd(p, u, set1(-0.0037874596f));
  p = fmadd(p, u, set1(0.0052105654f));
  p = fmadd(p, u, set1(-0.007133387f));
  p = fmadd(p, u, set1(0.013224526f));
  p = fmadd(p, u, set1(-0.021668017f));
  p = fmadd(p, u, set1(0.030469526f));
  p = fmadd(p, u, set1(-0.040565547f));
  p = fmadd(p, u, set1(0.053226985f));
  p = fmadd(p, u, set1(-0.07366756f));
  p = fmadd(p, u, set1(0.14874844f));
  // Left of the clamp x is held too: -inf times a tail that is not exactly 0 would be -inf. A NaN stays.
  return max(set1(-4.75f), x) * fmadd(c, p, set1(0.5f));
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
