// The product of int8_linear on CUDA devices: rows that are codes already, times weight codes, with the whole epilogue.
#pragma once

#include <optional>
#include <string>

#include "ops/tensor.h"

namespace lamina {

// Whether int8_linear_cuda has a kernel for these: codes [m, k] and weight_codes [n, k], k and n multiples of 16, rows
// contiguous and all rows, like those of out [m, n], at multiples of 16 bytes; a device that this build has code for;
// and a build with CUTLASS at all.
bool int8_linear_fits_cuda(const CudaTensorView& codes, const CudaTensorView& weight_codes, const CudaTensorView& out);

// out [m, n] = activation(codes [m, k] weight_codes [n, k]^T * w_scale [n] * x_scale + bias [n] + residual [m, n]), in
// the CPU's order of operations, see cuda/int8_gemm.h. x_scale: [] or [m]. bias: contiguous; residual: rows contiguous;
// both float32, bfloat16 or float16. out: the same, rows contiguous, or int8 with out_scale []. Scales are float32, and
// as they lie on the device their values are not checked. Refuses what int8_linear_fits_cuda does not accept.
void int8_linear_cuda(const CudaTensorView& codes, const CudaTensorView& weight_codes, const CudaTensorView& x_scale,
                      const CudaTensorView& w_scale, const std::optional<CudaTensorView>& bias,
                      const std::optional<CudaTensorView>& residual, const std::string& activation,
                      const std::optional<CudaTensorView>& out_scale, const CudaTensorView& out);

}  // namespace lamina
