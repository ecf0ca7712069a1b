// Panels of tokens, the layout of a chain of sparse int8 layers: rows to panels, panels to rows, and their codes.
//
// A tensor of panels is float32 [panels, features, 32], its codes are uint8 [panels, features / 4 rounded up, 32, 4]
// with scales [panels, 32] (see cpu/kernels/token_panels.h). Each sequence begins with a panel of its own.
#pragma once

#include <optional>

#include "cpu/kernels/token_panels.h"
#include "ops/tensor.h"

namespace lamina {

// x [sequences, length, features] float32 or bfloat16, any strides -> panels [sequences * ceil(length / 32), features,
// 32], contiguous; zeros behind the last token of a sequence.
void token_panels(const TensorView& x, const TensorView& panels);

// The inverse: panels -> rows [sequences, length, features] float32, contiguous.
void token_rows(const TensorView& panels, const TensorView& rows);

// panels -> codes and scales, contiguous: those of quantize_rows for each token, with an offset of 128.
void quantize_panels(const TensorView& panels, const TensorView& codes, const TensorView& scales);

// Panels [panels, features, 32] whose features lie one behind the other; -1 for any number of either.
void check_panels(const char* op, const char* what, const TensorView& t, int64_t panels, int64_t features);

// Where the codes of panels go.
struct PanelCodes {
  uint8_t* codes;
  float* scales;
  int64_t features;

  // largest: the bits of each token's max |x|, or null.
  void quantize(const float* panel, int64_t index, const int32_t* largest) const;
};

// The codes and scales of `panels` panels of so many features, checked; null where codes is.
std::optional<PanelCodes> panel_codes(const char* op, const std::optional<TensorView>& codes,
                                      const std::optional<TensorView>& scales, int64_t panels, int64_t features);

}  // namespace lamina
