// Attention over panels of tokens (see ops/token_panels.h): self-attention of whole sequences, for the layers of a
// chain that stays in panels.
#pragma once

#include <optional>

#include "ops/tensor.h"

namespace lamina {

struct AttentionPanelsOptions {
  int64_t length;  // tokens of a sequence
  int64_t heads;
  double scale;
  bool bfloat16_products = false;  // products may be of bfloat16
};

// query, key [sequences * ceil(length / 32), heads * D, 32], value [..., heads * Dv, 32]: any distance from panel to
// panel, so that they may be parts of one tensor. mask: null, or [1 or sequences, length], boolean (true: takes part)
// or float32 added to the scores of a key; -inf excludes it. out [panels, heads * Dv, 32], contiguous, or null where
// only its codes and scales are asked for.
void attention_panels(const TensorView& query, const TensorView& key, const TensorView& value,
                      const std::optional<TensorView>& mask, const AttentionPanelsOptions& options,
                      const std::optional<TensorView>& out, const std::optional<TensorView>& codes,
                      const std::optional<TensorView>& scales);

}  // namespace lamina
