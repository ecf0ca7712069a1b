// attention over sequences that lie one after the other, without padding.
#pragma once

#include <optional>

#include "ops/attention.h"
#include "ops/tensor.h"

namespace lamina {

// q [total_q, H, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv], any strides; sequence b is the tokens cu_seqlens[b] to
// cu_seqlens[b + 1], both int32 or int64 [B + 1], rising from 0 to the total. Each sequence is a call of `attention`
// with these options: alibi_slopes [H] or [B, H], lse [H, total_q]. out [total_q, H, Dv], last dimension contiguous.
void attention_varlen(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& cu_seqlens_q,
                      const TensorView& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                      const AttentionOptions& options, const TensorView& out);

}  // namespace lamina
