// The activations that kernels apply in their epilogue. vec/activate.h computes them, ops/epilogue.cpp knows their
// names.
#pragma once

namespace lamina {

enum class Activation : int { none, relu, relu6, gelu, gelu_tanh, quick_gelu, silu, hardswish, tanh };

}  // namespace lamina
