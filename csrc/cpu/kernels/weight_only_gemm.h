// Contract of weight_only_gemm: rows of float activations times one packed panel of int8 or int4 weights.
//
//   int8   out[m, n] = act(sum_k x[m, k] code[n, k] * w_scale[n] + bias[n])
//   int4   out[m, n] = act(sum_g scale[n, g] sum_{k in g} x[m, k] code[n, k] + bias[n])
//
// Only the weights are rounded: x keeps its float32 precision. How it is held is each variant's affair, so there are
// two kernels, always of the same ISA: one turns rows of x into the form that the other reads.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"
#include "cpu/kernels/int8_gemm.h"

namespace lamina {

// Inputs that share one step of the int4 layout; a group is a multiple of it.
inline constexpr int kInt4Block = 32;
// Output channels of one int4 slice, the unit that is contiguous in memory: one 512-bit register of int32.
inline constexpr int kInt4Slice = 16;
// Bytes of one slice: the codes of a block, and the bfloat16 scales before the first block of each group.
inline constexpr int kInt4BlockBytes = kInt4Block * kInt4Slice / 2;
inline constexpr int kInt4ScaleBytes = kInt4Slice * 2;

// Bytes of one prepared row: whatever the variant makes of it, it has four bytes an input and a rest to spare.
// Not a multiple of 4096, so that rows do not fight for the same L1 sets.
inline constexpr int64_t weight_only_row_bytes(int64_t k) {
  return (k + kInt4Block - 1) / kInt4Block * kInt4Block * 4 + 320;
}

template <class T>
struct WeightOnlyRowsArgs {
  const T* x;  // [rows, k], row stride ldx, last stride 1
  int64_t ldx;
  int64_t rows, k;
  int group;       // as in WeightOnlyGemmArgs
  char* prepared;  // [rows, weight_only_row_bytes(k)]
};

template <class Out>
struct WeightOnlyGemmArgs {
  const char* prepared;  // [rows, weight_only_row_bytes(k)] from the other kernel
  int64_t rows, k;
  int group;  // inputs that share an int4 scale, a multiple of 32; 0: the weights are int8
  // int8: [k / 4, width, 4] signed codes, k padded with zeros to a multiple of 4.
  // int4: width / 16 slices, each [groups]: 16 bfloat16 scales, then per block of 32 inputs [4, 16, 4] bytes; byte b of
  //       the j-th quarter holds code + 8 of input 8 j + b in its low and of input 8 j + 4 + b in its high half. Codes
  //       behind k are 8, zero.
  const uint8_t* panel;
  int width;                    // 16, 32, 48 or 64: channels in the panel, the last ones zero padding
  int channels;                 // width less the padding
  const int32_t* compensation;  // int8: [width], 128 times the sum of a channel's codes
  const float* w_scales;        // int8: [channels]
  const float* bias;            // [channels] or null
  Activation activation;
  Out* out;  // [rows, channels], row stride ldo
  int64_t ldo;
};

extern const KernelTable<void(const WeightOnlyRowsArgs<float>&)> weight_only_rows_f32_table;
extern const KernelTable<void(const WeightOnlyRowsArgs<bf16>&)> weight_only_rows_bf16_table;
extern const KernelTable<void(const WeightOnlyGemmArgs<float>&)> weight_only_gemm_f32_table;
extern const KernelTable<void(const WeightOnlyGemmArgs<bf16>&)> weight_only_gemm_bf16_table;

}  // namespace lamina
