// Contract of int8_gemm: rows of unsigned codes times one packed panel of int8 weights, with the epilogue that turns
// exact int32 sums into the layer's output.
//
//   out[m, n] = act((sum_k codes[m, k] w[n, k] - compensation[n]) * w_scale[n] * x_scale[m] + bias[n])
//
// [NOTE] s8s8 compensation. The activations are signed, but the fast x86 instruction multiplies unsigned by signed
// bytes. So codes carry an offset of 128, and what it adds to each sum, 128 * sum_k w[n, k], is computed once when the
// weight is packed and subtracted in the epilogue. int32 wraps around without loss in between.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

enum class Activation : int { none, relu, gelu, gelu_tanh, silu };

template <class Out>
struct Int8GemmArgs {
  const uint8_t* codes;  // [rows, k_padded], row stride ld_codes
  int64_t ld_codes;
  const float* x_scales;  // [rows]
  int64_t rows;
  int64_t k_padded;             // multiple of 4
  const int8_t* panel;          // [k_padded / 4, width, 4]
  int width;                    // 16, 32, 48 or 64: channels in the panel, the last ones zero padding
  int channels;                 // width less the padding
  const int32_t* compensation;  // [width]
  const float* w_scales;        // [channels]
  const float* bias;            // [channels] or null
  Activation activation;
  Out* out;  // [rows, channels], row stride ldo
  int64_t ldo;
};

extern const KernelTable<void(const Int8GemmArgs<float>&)> int8_gemm_f32_table;
extern const KernelTable<void(const Int8GemmArgs<bf16>&)> int8_gemm_bf16_table;

}  // namespace lamina
