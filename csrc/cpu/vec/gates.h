// Sigmoid and tanh of one register of floats, as the gates of recurrent cells use them: through e^-x, so that a cell
// can share its divisions among several of them.
#pragma once

#include "cpu/vec/math.h"

namespace lamina::LAMINA_ISA {
namespace {

// 2^x for x held to [-126, 30], relative error 8e-8. The upper end leaves room for products of four such factors in
// float32, and is where 1 / (1 + 2^x) is 1e-9, nothing beside 1. NaN stays NaN.
LAMINA_INLINE F32 exp2_held(F32 x) { return exp2(max(set1(-126.0f), min(set1(30.0f), x))); }

// e^-x of a sigmoid's argument, e^-2x of a tanh's.
LAMINA_INLINE F32 sigmoid_exp(F32 x) { return exp2_held(x * set1(-kLog2E)); }
LAMINA_INLINE F32 tanh_exp(F32 x) { return exp2_held(x * set1(-2.0f * kLog2E)); }

// 1 / (1 + e^-x), absolute error 2e-7.
LAMINA_INLINE F32 sigmoid(F32 x) { return reciprocal(set1(1.0f) + sigmoid_exp(x)); }

}  // namespace
}  // namespace lamina::LAMINA_ISA
