// Scaled dot product attention, forward: softmax(scale * Q K^T + mask) V in one pass over the keys.
// See cpu/kernels/attention.h for what a masked-out key means.
#pragma once

#include <optional>

#include "ops/tensor.h"

namespace lamina {

// query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], all float32 or all bfloat16, any strides; Hq is a
// multiple of Hkv, and query head h uses key/value head h / (Hq / Hkv); D and Dv at most 256.
// mask: broadcasts to [B, Hq, L, S]; boolean (true = keep), or float32 or the query's dtype (added to the scores).
// is_causal: query i takes the keys j <= i.
// out [B, Hq, L, Dv] of the query's dtype: last dimension contiguous, the others with any strides.
void attention(const TensorView& query, const TensorView& key, const TensorView& value,
               const std::optional<TensorView>& mask, bool is_causal, double scale, const TensorView& out);

}  // namespace lamina
