// The activations of cpu/activation.h on one register of floats. Only relu, relu6 and hardswish are exact; for the
// others math.h states the error.
#pragma once

#include "cpu/activation.h"
#include "cpu/vec/math.h"

namespace lamina::LAMINA_ISA {
namespace {

// A NaN stays a NaN.
template <Activation A>
LAMINA_INLINE F32 activate(F32 x) {
  if constexpr (A == Activation::relu) return max(zero(), x);
  if constexpr (A == Activation::relu6) return min(set1(6.0f), max(zero(), x));
  if constexpr (A == Activation::gelu) return gelu_erf(x);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (A == Activation::quick_gelu) return quick_gelu(x);
  if constexpr (A == Activation::silu) return silu(x);
  if constexpr (A == Activation::hardswish) {
    // Below -3 the result is 0, also at -inf, where x * 0 would be NaN.
    return max(set1(-3.0f), x) * min(set1(6.0f), max(zero(), x + set1(3.0f))) * set1(1.0f / 6.0f);
  }
  if constexpr (A == Activation::tanh) return tanh(x);
  return x;
}

// The table of an activation that is gated(x, table), or null.
LAMINA_INLINE const GateTable* gate_table(Activation activation) {
  switch (activation) {
    case Activation::gelu: return &kPhiTable;
    case Activation::gelu_tanh: return &kTanhPhiTable;
    case Activation::quick_gelu: return &kQuickTable;
    case Activation::silu: return &kSigmoidTable;
    default: return nullptr;
  }
}

// body.operator()<A>() for the activation of a call, so that loops are compiled for each.
template <class Body>
LAMINA_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::none: return body.template operator()<Activation::none>();
    case Activation::relu: return body.template operator()<Activation::relu>();
    case Activation::relu6: return body.template operator()<Activation::relu6>();
    case Activation::gelu: return body.template operator()<Activation::gelu>();
    case Activation::gelu_tanh: return body.template operator()<Activation::gelu_tanh>();
    case Activation::quick_gelu: return body.template operator()<Activation::quick_gelu>();
    case Activation::silu: return body.template operator()<Activation::silu>();
    case Activation::hardswish: return body.template operator()<Activation::hardswish>();
    case Activation::tanh: return body.template operator()<Activation::tanh>();
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
