// Contract of token_panels: rows of tokens to panels and back, and a panel's codes.
//
// A panel holds 32 tokens, feature by feature: [features][32] floats. What is done to each token by itself (a sum over
// its features, its largest value, an activation) is then done to whole registers of tokens, and the codes of a panel,
// [features / 4][32][4], are what sparse_int8 multiplies as they lie. Tokens behind the last one are zeros where rows
// become a panel; what later kernels make of them stays in their lanes.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

inline constexpr int kPanelTokens = 32;

template <class T>
struct PanelOfRowsArgs {
  const T* x;  // [rows, features], row stride ldx, last stride 1
  int64_t ldx;
  int rows;  // at most kPanelTokens
  int64_t features;
  float* panel;
};

struct RowsOfPanelArgs {
  const float* panel;
  int rows;
  int64_t features;
  float* out;  // [rows, features], row stride ld
  int64_t ld;
};

struct QuantizePanelArgs {
  const float* panel;
  int64_t features;
  const int32_t* largest;  // [32]: the bits of each token's max |x|, or null where it is to be found
  // [features / 4, rounded up][32][4]: round_half_even(x * (127 / max |x|)) + 128, and 128 behind the last feature.
  uint8_t* codes;
  float* scales;  // [32]: max |x| / 127; NaN, with codes of zero, for a token that holds NaN or infinity
};

extern const KernelTable<void(const PanelOfRowsArgs<float>&)> panel_of_rows_f32_table;
extern const KernelTable<void(const PanelOfRowsArgs<bf16>&)> panel_of_rows_bf16_table;
extern const KernelTable<void(const RowsOfPanelArgs&)> rows_of_panel_table;
extern const KernelTable<void(const QuantizePanelArgs&)> quantize_panel_table;

}  // namespace lamina
