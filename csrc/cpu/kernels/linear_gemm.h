// Contract of linear_gemm: rows of floats times packed panels of weights, with the end of a linear layer.
//
//   out[m, n] = act(bias[n] + sum_k x[m, k] w[n, k] + residual[m, n])
//
// The panels are those of panel_gemm.h with four groups: 64 output channels, k outermost, so that the weights of one k
// are one run of memory that meets one broadcast of x, and all of a panel is one stream.
//
// A sum is one of partial sums over at most kLinearPartialSum inputs, the first of which starts with the bias; each
// runs over k in order, with fused multiply-add, and they are added in order. So an output does not depend on the
// number of rows or channels, or on how they are shared out.
#pragma once

#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/dispatch.h"
#include "cpu/kernels/int8_gemm.h"

namespace lamina {

struct LinearGemmArgs {
  const float* x;  // [rows, k], row stride ldx, last stride 1
  int64_t ldx;
  int64_t rows, k;
  // Panels of 64 channels one behind the other, each [k, width]. The last is only as wide as the channels that are
  // left, rounded up to a multiple of 16 with zeros.
  const float* panels;
  int64_t channels;
  const float* bias;        // [channels] or null
  EpilogueMatrix residual;  // [rows, channels] or null, f32 or b16
  Activation activation;
  EpilogueMatrix out;  // [rows, channels], f32 or b16
};

extern const KernelTable<void(const LinearGemmArgs&)> linear_gemm_table;

}  // namespace lamina
