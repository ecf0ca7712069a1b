// What the linear ops have in common at their end: the activation by name, and the bias.
#pragma once

#include <string>

#include "cpu/kernels/int8_gemm.h"
#include "ops/tensor.h"
#include "ops/workspace.h"

namespace lamina {

Activation parse_activation(const char* op, const std::string& name);

// bias [n] float32 or bfloat16 as contiguous float32; a copy lives in `frame`.
const float* float_bias(const char* op, const TensorView& bias, int64_t n, WorkspaceFrame& frame);

// A residual or an output [rows, n] whose rows are contiguous; its dtype has been checked.
EpilogueMatrix epilogue_matrix(const char* op, const char* what, const TensorView& t, int64_t rows, int64_t n);

// The block of a matrix from (row, column) on; nothing stays nothing.
EpilogueMatrix part_of(const EpilogueMatrix& matrix, int64_t row, int64_t column);

}  // namespace lamina
