// What attention_decode refuses on every device: all that shows in dtypes and shapes. What lies in cache_seqlens and in
// the block table is the business of who can read it.
#pragma once

#include <optional>

#include "ops/tensor.h"

namespace lamina {

inline constexpr const char* kAttentionDecode = "attention_decode";
inline constexpr const char* kAttentionDecodeAppend = "attention_decode.append";

// Pointers to what is optional are null where it is not given. out and lse are the operands of attention_decode.
void check_attention_decode(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                            std::optional<int64_t> window, std::optional<double> softcap,
                            const TensorView* alibi_slopes, const TensorView* sinks, const TensorView* k_scale,
                            const TensorView* v_scale, const TensorView& out, const TensorView* lse);

void check_attention_decode_append(const TensorView& k_cache, const TensorView& v_cache, const TensorView& k,
                                   const TensorView& v, const TensorView* k_scale, const TensorView* v_scale);

// cache_seqlens and the block table. Returns how many keys a sequence can have.
int64_t check_sequences(const char* op, const TensorView& k_cache, const TensorView& lengths,
                        const TensorView* block_table, int64_t batch);

}  // namespace lamina
