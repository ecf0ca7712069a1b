// The exponential function on one register of floats, where attention's 2^x of a rounded product is not good enough.
#pragma once

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

// e^x for x <= 88, relative error 1.5e-7; below -87 the result is 0 or a subnormal, -inf gives 0, NaN stays NaN.
//
// x = n log 2 + r with |r| <= log 2 / 2. log 2 goes in two pieces, the first of so few bits that its product with n is
// exact (Cody, Waite, "Software Manual for the Elementary Functions", 1980): r is right to the last bit of x at any
// distance from 0. The polynomial is that of Cephes.
LAMINA_INLINE F32 exp(F32 x) {
  const F32 bounded = max(set1(-104.0f), x);  // in this order a NaN stays
  const F32 n = round_even(bounded * set1(1.4426950408889634f));
  F32 r = fmadd(n, set1(-0.693359375f), bounded);
  r = fmadd(n, set1(2.12194440e-4f), r);
  F32 p = set1(1.9875691500e-4f);
  p = fmadd(p, r, set1(1.3981999507e-3f));
  p = fmadd(p, r, set1(8.3334519073e-3f));
  p = fmadd(p, r, set1(4.1665795894e-2f));
  p = fmadd(p, r, set1(1.6666665459e-1f));
  p = fmadd(p, r, set1(5.0000001201e-1f));
  p = fmadd(p, r * r, r);
  return scale_exponent(p + set1(1.0f), n);
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
