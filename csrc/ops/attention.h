// Scaled dot product attention, forward: softmax(scale * Q K^T + mask) V in one pass over the keys.
// See cpu/kernels/attention.h for what a masked-out key means.
#pragma once

#include <optional>

#include "ops/tensor.h"

namespace lamina {

// What may be asked of attention besides a mask. Tensors that are "of floats" are float64 where the query is, and
// float32 where it is anything else.
struct AttentionOptions {
  bool is_causal = false;  // window_right is 0
  double scale = 1.0;
  // Query i, at position p = i, or i + S - L where bottom_right, takes the keys p - window_left .. p + window_right;
  // negative: no limit on that side.
  int64_t window_left = -1, window_right = -1;
  bool bottom_right = false;
  double softcap = 0.0;                         // scores become softcap * tanh(score / softcap); 0: they stay
  std::optional<TensorView> alibi_slopes = {};  // of floats, [Hq] or [B, Hq]: -slope * |p - j| is added to the scores
  std::optional<TensorView> sinks = {};  // of floats, [Hq]: one more logit, which takes weight and gives no value
  // Dropout of weights: kept with probability 1 - dropout_p, rounded to a multiple of 2^-16, and grown by its inverse.
  // Which ones hangs on the seed and their place alone.
  double dropout_p = 0.0;
  int64_t seed = 0;
  std::optional<TensorView> lse = {};  // output, of floats, [B, Hq, L]: log of the sum of exp(score), natural
  bool bfloat16_products = false;      // float32 inputs may be multiplied in bfloat16
  bool int8_scores = false;            // float32 and bfloat16 inputs may have scores computed from int8 codes
};

// query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], all of one floating dtype, any strides; Hq is a
// multiple of Hkv, and query head h uses key/value head h / (Hq / Hkv); D and Dv at most 256.
// mask: broadcasts to [B, Hq, L, S]; boolean (true = keep), or float32 or the query's dtype (added to the scores).
// out [B, Hq, L, Dv] of the query's dtype: last dimension contiguous, the others with any strides.
void attention(const TensorView& query, const TensorView& key, const TensorView& value,
               const std::optional<TensorView>& mask, const AttentionOptions& options, const TensorView& out);

}  // namespace lamina
