// Contract of panel_gemm: rows of floats times packed panels of float weights, float32 FMA.
//
//   out[p][r][c] = bias[p][c] + sum_k x[r][k] panels[p][k][c],   c in [0, 16 groups)
//
// A panel holds 16 * groups output columns, k outermost: the weights of one k are one run of memory that meets one
// broadcast of x. In recurrent layers a group is a gate and the 16 columns are 16 units, so that all gates of a unit
// come out of one panel. Each sum runs over k in order, whatever the number of rows, so results do not depend on how
// rows and panels are shared out.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"

namespace lamina {

inline constexpr int kPanelLanes = 16;

struct PanelGemmArgs {
  const float* x;  // [rows, k], row stride ldx, last stride 1
  int64_t ldx;
  int64_t rows, k;
  const float* panels;  // [count][k][groups][16]
  int groups;           // 3 or 4
  int64_t count;
  bool backwards;     // the last panel first: what the previous call read last is still in the cache
  const float* bias;  // [count][groups][16] or null
  float* out;         // [count][rows][groups][16], strides out_panel and out_row
  int64_t out_panel, out_row;
};

extern const KernelTable<void(const PanelGemmArgs&)> panel_gemm_table;

}  // namespace lamina
