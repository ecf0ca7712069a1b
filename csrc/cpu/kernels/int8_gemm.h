// Contract of int8_gemm: rows of unsigned codes times packed panels of int8 weights, with the epilogue that turns exact
// int32 sums into the layer's output.
//
//   y[m, n] = act(float(sum_k codes[m, k] w[n, k] - compensation[n]) * w_scale[n] * x_scale[m] + bias[n] + residual[m,
//   n]) out[m, n] = y, or round_half_even(y * out_inverse) clamped to [-127, 127] (NaN gives -127)
//
// The operations before the activation happen in this order, each rounded once, without fused multiply-add: they give
// the same bits on every ISA. So do none, relu and relu6, and with them the codes of a requantized output.
//
// [NOTE] s8s8 compensation. The activations are signed, but the fast x86 instruction multiplies unsigned by signed
// bytes. So codes carry an offset of 128, and what it adds to each sum, 128 * sum_k w[n, k], is computed once when the
// weight is packed and subtracted in the epilogue. int32 wraps around without loss in between.
#pragma once

#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

// A matrix of one of the epilogue's formats; data is null where there is none.
struct EpilogueMatrix {
  enum Format : int { f32 = 4, b16 = 2, int8 = 1 };  // the value is the size of an element in bytes
  void* data = nullptr;
  int64_t ld = 0;  // row stride in elements
  Format format = f32;
};

struct Int8GemmArgs {
  const uint8_t* codes;  // [rows, k_padded], row stride ld_codes
  int64_t ld_codes;
  const float* x_scales;  // [rows]
  int64_t rows;
  int64_t k_padded;  // multiple of 4
  // Panels of 64 channels one behind the other, each [k_padded / 4, width, 4]. The last is only as wide as the channels
  // that are left, rounded up to a multiple of 16 with zeros.
  const int8_t* panels;
  int64_t channels;
  const int32_t* compensation;  // [channels rounded up to 16]
  const float* w_scales;        // [channels]
  const float* bias;            // [channels] or null
  EpilogueMatrix residual;      // [rows, channels] or null, f32 or b16
  Activation activation;
  EpilogueMatrix out;  // [rows, channels]
  float out_inverse;   // 1 / scale of an int8 output
};

extern const KernelTable<void(const Int8GemmArgs&)> int8_gemm_table;

}  // namespace lamina
