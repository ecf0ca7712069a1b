// Contract of the int8 GEMMs on GPUs: rows of codes times rows of weight codes, both int8, summed exactly in int32 by
// tensor cores, with an epilogue that turns sums into outputs.
//
//   y[m, n] = act(float(sum_k codes[m, k] weight[n, k]) * w_scale[n] * x_scale[m] + bias[n] + residual[m, n])
//   out[m, n] = y, or round_half_even(y * (1 / out_scale)) clamped to [-127, 127] (NaN gives -127)
//
// See int8_epilogue.h for the order of operations. One kernel for each generation of tensor cores, built from CUTLASS.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "cuda/int8_epilogue.h"

namespace lamina::cuda {

struct Int8GemmArgs {
  const int8_t* codes;  // [rows, k], row stride ld_codes
  int64_t ld_codes;
  const int8_t* weight;  // [channels, k], row stride ld_weight
  int64_t ld_weight;
  int rows, channels, k;
  Int8Epilogue epilogue;
  int multiprocessors;  // of the current device
  cudaStream_t stream;
};

// All pointers, and all row strides in bytes, of codes, weight and out are multiples of this: the width of a load or a
// store of either kernel. channels and k are multiples as well.
inline constexpr int kInt8GemmAlignment = 16;

// For compute capability 9.0: wgmma and the copy engine.
cudaError_t int8_gemm_sm90(const Int8GemmArgs& args);

// For all others from 8.0 on: mma and cp.async, which every later generation still has. runs_here: this build has code
// for the current device.
cudaError_t int8_gemm_sm80(const Int8GemmArgs& args);
bool int8_gemm_sm80_runs_here();

}  // namespace lamina::cuda
