// Contract of norm_panel: layer norm of the tokens of a panel (see token_panels.h).
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/kernels/token_panels.h"

namespace lamina {

struct NormPanelArgs {
  const float* x;       // [features][32]
  const float* weight;  // [features], or null for ones
  const float* bias;    // [features], or null for zeros
  int64_t features;
  float eps;
  float* out;        // [features][32]; may be x
  int32_t* largest;  // [32]: the bits of each token's max |out|
};

extern const KernelTable<void(const NormPanelArgs&)> norm_panel_table;

}  // namespace lamina
