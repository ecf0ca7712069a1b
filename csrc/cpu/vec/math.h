// Elementary functions on one register of floats, with their error.
#pragma once

#include "cpu/vec/gate_tables.h"
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

constexpr float kLog2E = 1.4426950408889634f;

// Natural logarithm of a positive normal x, absolute error 2e-7 and relative error 2e-7 beside 1.
// x = m 2^e with m in [2/3, 4/3); log m = 2 atanh(z) with z = (m - 1) / (m + 1), |z| <= 1/5, by its series.
LAMINA_INLINE F32 log_of_normal(F32 x) {
  const I32 bits = bits_of(x);
  const I32 e = shift_right(bits - set1_i32(0x3f2aaaab), 23);
  const F32 m = floats_of(bits - shift_left(e, 23));
  const F32 z = (m - set1(1.0f)) / (m + set1(1.0f));
  const F32 z2 = z * z;
  F32 p = set1(2.0f / 9);
  p = fmadd(p, z2, set1(2.0f / 7));
  p = fmadd(p, z2, set1(2.0f / 5));
  p = fmadd(p, z2, set1(2.0f / 3));
  p = fmadd(p * z2, z, set1(2.0f) * z);
  return fmadd(to_float(e), set1(0.693147181f), p);
}

// x g(x) for a gate with g(-x) = 1 - g(x), by its table: max(x, 0) - |x| g(-|x|). Beyond the table's end the result is
// x or 0 exactly. Near 0 it is exact relative to x, and NaN stays NaN.
//
// An activation competes with the int8 kernel it is fused into for the multipliers. This takes 5 products; e^-x with a
// division takes 11 or more.
LAMINA_INLINE F32 gated(F32 x, const GateTable& table) {
  const F32 a = min(set1(table.limit), and_bits(x, 0x7fffffffu));  // in this order a NaN stays
  const F32 u = fmadd(a, set1(table.scale), set1(1.0f));
  const I32 piece = shift_right(bits_of(u), 20);
  const F32 f = u - or_bits(u, 0x000fffffu);
  F32 g = lookup32(table.powers[3], piece);
  g = fmadd(g, f, lookup32(table.powers[2], piece));
  g = fmadd(g, f, lookup32(table.powers[1], piece));
  g = fmadd(g, f, lookup32(table.powers[0], piece));
  return fmadd(a, g, max(zero(), x));
}

// GELU, x Phi(x), absolute error 1.5e-6.
LAMINA_INLINE F32 gelu_erf(F32 x) { return gated(x, kPhiTable); }

// The tanh form of GELU, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), absolute error 1.3e-6.
LAMINA_INLINE F32 gelu_tanh(F32 x) { return gated(x, kTanhPhiTable); }

// x sigmoid(x), absolute error 2.9e-6.
LAMINA_INLINE F32 silu(F32 x) { return gated(x, kSigmoidTable); }

// The GELU of CLIP, x sigmoid(1.702 x), absolute error 1.7e-6.
LAMINA_INLINE F32 quick_gelu(F32 x) { return gated(x, kQuickTable); }

// 1 - 2 / (1 + e^2x), absolute error 7e-7; beyond the clamp it is 1 to the last bit.
LAMINA_INLINE F32 tanh(F32 x) {
  // In this order a NaN stays.
  const F32 z = max(set1(-64.0f), min(set1(64.0f), x * set1(2.0f * kLog2E)));
  return set1(1.0f) - set1(2.0f) * reciprocal_of_normal(set1(1.0f) + exp2(z));
}

// Relative error 2e-7 everywhere: near 0, where the form above cancels, an odd polynomial (that of Cephes) instead.
LAMINA_INLINE F32 tanh_precise(F32 x) {
  const F32 a = and_bits(x, 0x7fffffffu);
  const F32 e = exp2(min(set1(20.0f), a) * set1(2.0f * kLog2E));  // min gives its second operand on NaN
  const F32 far = set1(1.0f) - set1(2.0f) / (set1(1.0f) + e);
  const F32 z = x * x;
  F32 p = set1(-5.70498872745e-3f);
  p = fmadd(p, z, set1(2.06390887954e-2f));
  p = fmadd(p, z, set1(-5.37397155531e-2f));
  p = fmadd(p, z, set1(1.33314422036e-1f));
  p = fmadd(p, z, set1(-3.33332819422e-1f));
  const F32 near = fmadd(p * z, x, x);
  return select(less(a, set1(0.625f)), near, select(less(x, zero()), zero() - far, far));
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
