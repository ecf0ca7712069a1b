// Attention of a few new queries over a cache of keys and values, and how new keys and values get into the cache.
#pragma once

#include <optional>

#include "ops/tensor.h"

namespace lamina {

// q [B, L, H, D]; k_cache [B, S, Hkv, D] and v_cache [B, S, Hkv, Dv], or [blocks, block_size, Hkv, D] and
// [blocks, block_size, Hkv, Dv] with a block_table [B, max_blocks] int32 (rows contiguous); any strides. Caches have
// the query's dtype, or are int8 with scales k_scale, v_scale (the cache's shape without its last dimension, float32).
// cache_seqlens [B] int32 or int64: keys of each sequence, the L new ones included. Query i of a sequence takes its
// first cache_seqlens - L + i + 1 keys, of these the last `window`.
// alibi_slopes: [H] or [B, H] float32; sinks: [H] float32. out [B, L, H, Dv] of the query's dtype, last dimension
// contiguous; lse [B, H, L].
void attention_decode(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                      const TensorView& cache_seqlens, const std::optional<TensorView>& block_table, double scale,
                      std::optional<int64_t> window, std::optional<double> softcap,
                      const std::optional<TensorView>& alibi_slopes, const std::optional<TensorView>& sinks,
                      const std::optional<TensorView>& k_scale, const std::optional<TensorView>& v_scale,
                      const TensorView& out, const std::optional<TensorView>& lse);

// k [B, L, Hkv, D] and v [B, L, Hkv, Dv] become keys cache_seqlens, cache_seqlens + 1, ... of each sequence; an int8
// cache gets codes and scales, those of quantize_rows. Nothing is written when an argument is refused.
void attention_decode_append(const TensorView& k_cache, const TensorView& v_cache, const TensorView& cache_seqlens,
                             const TensorView& k, const TensorView& v, const std::optional<TensorView>& block_table,
                             const std::optional<TensorView>& k_scale, const std::optional<TensorView>& v_scale);

}  // namespace lamina
