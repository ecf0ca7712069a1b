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

// |x| Phi(-|x|) in 16 pieces over t = |x| 15.5 / 4.75, each a cubic in the distance of t to the piece's number, of
// powers 0 to 3. Minimax in each, with value and slope exact at 0.
alignas(64) constexpr float kGeluTail[4][16] = {
    {0.0f, 0.116334707f, 0.165464163f, 0.164524019f, 0.135007411f, 0.0961200446f, 0.0606404506f, 0.034258984f,
     0.0174332317f, 0.00801812857f, 0.00334039074f, 0.00126229657f, 0.000433087727f, 0.000134996997f, 3.82477774e-05f,
     9.852939e-06f},
    {0.153225809f, 0.0805926174f, 0.0206346512f, -0.0188152902f, -0.0369462743f, -0.0386906266f, -0.0313555114f,
     -0.0213779751f, -0.0126662832f, -0.00662638433f, -0.00308844657f, -0.00128955499f, -0.000484124408f,
     -0.00016382731f, -5.00629394e-05f, -1.38335408e-05f},
    {-0.0375497304f, -0.0339517482f, -0.0251722727f, -0.0142050497f, -0.00446895417f, 0.00193612685f, 0.00471537979f,
     0.00485629495f, 0.00371731399f, 0.00234853104f, 0.00127366814f, 0.000604414381f, 0.00025372958f, 9.48719826e-05f,
     3.17419581e-05f, 9.53393737e-06f},
    {0.000454746536f, 0.00216888054f, 0.00349900802f, 0.00361814816f, 0.00275628897f, 0.00150130934f, 0.000410618697f,
     -0.000239165282f, -0.000462249998f, -0.000422762329f, -0.000289072254f, -0.000162712691f, -7.83008727e-05f,
     -3.28362803e-05f, -1.21351295e-05f, -3.98071734e-06f},
};

// GELU, x Phi(x), absolute error 5e-6: max(x, 0) - |x| Phi(-|x|), the second by table. Beyond 4.75 it is held at 5e-6.
// One polynomial as exact as this needs 14 products, and products are what an int8 kernel has no room for; this
// takes 4.
LAMINA_INLINE F32 gelu_erf(F32 x) {
  const F32 round = set1(12582912.0f);  // 1.5 * 2^23: a sum with it has no fraction, and its low bits are the number
  // In this order a NaN stays.
  const F32 t = min(set1(15.499999f), and_bits(x, 0x7fffffffu) * set1(15.5f / 4.75f));
  const F32 piece = t + round;
  const F32 f = t - (piece - round);
  F32 tail = lookup16(kGeluTail[3], piece);
  tail = fmadd(tail, f, lookup16(kGeluTail[2], piece));
  tail = fmadd(tail, f, lookup16(kGeluTail[1], piece));
  tail = fmadd(tail, f, lookup16(kGeluTail[0], piece));
  return max(zero(), x) - tail;
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
