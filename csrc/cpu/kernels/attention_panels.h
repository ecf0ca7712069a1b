// Contract of attention_panels: attention of one head over the tokens of one sequence, all of it in panels (see
// token_panels.h).
//
//   out[d, i] = sum_j p[j, i] v[d, j],   p[:, i] = softmax_j(factor * sum_d q[d, i] k[d, j] + added[j]) in powers of 2
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/kernels/token_panels.h"

namespace lamina {

struct AttentionPanelsArgs {
  // Panels [head_size][32], q_panel floats apart, of the queries to compute.
  const float* q;
  int64_t q_panel, panels;
  // Panels [head_size][32] and [value_size][32] of all tokens of the sequence.
  const float *k, *v;
  int64_t k_panel, v_panel;
  int64_t keys;  // tokens of the sequence; what lies behind them takes no part
  float* out;    // panels [value_size][32]
  int64_t out_panel;
  int32_t* largest;  // [panels][32]: raised to the bits of each token's max |out|
  // Null, or [keys rounded up to 32] in units of log2: -inf for a key that takes no part, whatever its k and v hold. A
  // query without keys gives 0.
  const float* added;
  int head_size, value_size;
  float factor;    // log2(e) times the scale
  float* scratch;  // attention_panels_scratch_floats() of them, 64-byte aligned
};

static inline int64_t attention_panels_scratch_floats(int64_t keys, int head_size, int value_size) {
  const int64_t padded = (keys + kPanelTokens - 1) / kPanelTokens * kPanelTokens;
  return padded * (head_size + value_size + kPanelTokens) + int64_t{head_size} * kPanelTokens + kPanelTokens;
}

extern const KernelTable<void(const AttentionPanelsArgs&)> attention_panels_f32_table;
// May multiply in bfloat16.
extern const KernelTable<void(const AttentionPanelsArgs&)> attention_panels_as_bf16_table;

}  // namespace lamina
