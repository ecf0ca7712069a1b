// Contract of panel_gemm: rows times packed panels of weights, into panels of floats.
//
//   float32 and bfloat16 weights   out[p][r][c] = bias[p][c] + sum_k x[r][k] panels[p][k][c]
//   int8 weights                   out[p][r][c] = sum_k (x[r][k] - 128) panels[p][k][c] * w_scales[p][c] * x_scales[r]
//                                                 + bias[p][c]
//
// for c in [0, 16 groups). A panel holds 16 * groups output columns, k outermost: the weights of one k (of four, if
// they are int8) are one run of memory that meets one broadcast of x. In recurrent layers a group is a gate and the 16
// columns are 16 units, so that all gates of a unit come out of one panel.
//
// Float sums run over k in order, with fused multiply-add; int8 sums are exact and scaled in the order written. So
// results do not depend on the number of rows or on how rows and panels are shared out.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

inline constexpr int kPanelLanes = 16;

// What weights of a format are multiplied with.
template <class Weight>
struct PanelOperand {
  using type = float;
  static constexpr bool is_int8 = false;
};
template <>
struct PanelOperand<int8_t> {
  using type = uint8_t;
  static constexpr bool is_int8 = true;
};

template <class Weight>  // float, bf16 or int8_t
struct PanelGemmArgs {
  static constexpr bool is_int8 = PanelOperand<Weight>::is_int8;
  using Operand = typename PanelOperand<Weight>::type;

  const Operand* x;  // [rows, k], row stride ldx, last stride 1; with int8 weights codes with an offset of 128
  int64_t ldx;
  int64_t rows, k;       // k is a multiple of 4 with int8 weights
  const Weight* panels;  // [count][k][groups][16], or int8 [count][k / 4][groups][16][4]
  int groups;            // 1, 3 or 4
  int64_t count;
  bool backwards;               // the last panel first: what the previous call read last is still in the cache
  const float* bias;            // [count][groups][16] or null
  const float* x_scales;        // [rows], int8
  const float* w_scales;        // [count][groups][16], int8
  const int32_t* compensation;  // [count][groups][16], int8
  float* out;                   // [count][rows][groups][16], strides out_panel and out_row
  int64_t out_panel, out_row;
  // For a product over a part of k, of float weights: how many inputs a whole panel has, 0 for k, and whether the sums
  // are added to those in `out`.
  int64_t panel_k;
  bool adds;
};

extern const KernelTable<void(const PanelGemmArgs<float>&)> panel_gemm_f32_table;
extern const KernelTable<void(const PanelGemmArgs<bf16>&)> panel_gemm_bf16_table;
extern const KernelTable<void(const PanelGemmArgs<int8_t>&)> panel_gemm_int8_table;

}  // namespace lamina
