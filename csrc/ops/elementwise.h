// A short program of arithmetic over broadcast tensors, in one pass over memory.
#pragma once

#include <vector>

#include "ops/tensor.h"

namespace lamina {

// inputs: float32, bfloat16 or bool (as 0 and 1), any strides, each broadcasting to the shape of out. program: for each
// instruction four numbers, its code (cpu/kernels/elementwise.h) and three operands, -1 for those it does not take.
// Operands are counted: inputs, then constants, then the results of instructions. All is computed in float32; the last
// result goes to out, float32, bfloat16 (rounded once) or bool (what is not 0), in any strides without overlap. out may
// be one of the inputs, if both lie in the same strides.
void elementwise(const std::vector<TensorView>& inputs, const std::vector<int64_t>& program,
                 const std::vector<double>& constants, const TensorView& out);

}  // namespace lamina
