#include "ops/attention_decode_checks.h"

#include "cpu/tuning/attention.h"
#include "ops/checks.h"

namespace lamina {

namespace {

void check_scale(const char* op, const char* what, const char* cache_name, const TensorView& cache,
                 const TensorView* scale) {
  if (cache.dtype != DType::int8) {
    check(!scale, op, what, " goes with an int8 cache, but ", cache_name, " is ", dtype_name(cache.dtype));
    return;
  }
  check(scale, op, cache_name, " is int8, so ", what, " must say what its codes are worth");
  check_dtype(op, what, *scale, {DType::float32});
  check_shape(op, what, *scale, {cache.size(0), cache.size(1), cache.size(2)});
}

// Both caches; `dtype` is that of the tensors they meet.
void check_caches(const char* op, const char* other, DType dtype, const TensorView& k_cache, const TensorView& v_cache,
                  const TensorView* k_scale, const TensorView* v_scale) {
  check_shape(op, "k_cache", k_cache, {-1, -1, -1, -1});
  check_shape(op, "v_cache", v_cache, {k_cache.size(0), k_cache.size(1), k_cache.size(2), -1});
  check(k_cache.dtype == dtype || k_cache.dtype == DType::int8, op, "k_cache is ", dtype_name(k_cache.dtype),
        ", but must be int8 or of the dtype of ", other, ", ", dtype_name(dtype));
  check(v_cache.dtype == k_cache.dtype, op, "v_cache is ", dtype_name(v_cache.dtype), ", but must be ",
        dtype_name(k_cache.dtype), " like k_cache");
  check_scale(op, "k_scale", "k_cache", k_cache, k_scale);
  check_scale(op, "v_scale", "v_cache", v_cache, v_scale);
  const int64_t most = tuning::kAttentionMaxHeadSize;
  for (const TensorView* t : {&k_cache, &v_cache}) {
    check(t->size(3) >= 1 && t->size(3) <= most, op, t == &k_cache ? "k_cache" : "v_cache", " is ", describe(*t),
          ", but its head size must be 1 to ", most);
  }
}

}  // namespace

int64_t check_sequences(const char* op, const TensorView& k_cache, const TensorView& lengths,
                        const TensorView* block_table, int64_t batch) {
  check_dtype(op, "cache_seqlens", lengths, {DType::int32, DType::int64});
  check_shape(op, "cache_seqlens", lengths, {batch});
  if (!block_table) {
    check(k_cache.size(0) == batch, op, "k_cache is ", describe(k_cache), ", but must have the ", batch,
          " sequences of q; give a block_table for a cache of blocks");
    return k_cache.size(1);
  }
  check_dtype(op, "block_table", *block_table, {DType::int32});
  check_shape(op, "block_table", *block_table, {batch, -1});
  check(block_table->size(1) <= 1 || block_table->stride(1) == 1, op,
        "block_table must be contiguous in its last dimension");
  check(k_cache.size(1) > 0, op, "k_cache is ", describe(k_cache), ", but its blocks must hold at least one key");
  return block_table->size(1) * k_cache.size(1);
}

void check_attention_decode(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                            std::optional<int64_t> window, std::optional<double> softcap,
                            const TensorView* alibi_slopes, const TensorView* sinks, const TensorView* k_scale,
                            const TensorView* v_scale, const TensorView& out, const TensorView* lse) {
  constexpr const char* op = kAttentionDecode;
  check_dtype(op, "q", q, {DType::float32, DType::bfloat16, DType::float16});
  check_shape(op, "q", q, {-1, -1, -1, -1});
  check_caches(op, "q", q.dtype, k_cache, v_cache, k_scale, v_scale);
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), head_size = q.size(3);
  const int64_t kv_heads = k_cache.size(2), value_size = v_cache.size(3);
  check(k_cache.size(3) == head_size, op, "k_cache is ", describe(k_cache), ", but must have the head size of q, ",
        head_size);
  check(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, op, "q has ", heads, " heads and k_cache has ", kv_heads,
        ", but the first must be a multiple of the second");
  check(!window || *window > 0, op, "window is ", window.value_or(0), ", but must be positive");
  check(!softcap || *softcap > 0, op, "softcap is ", softcap.value_or(0), ", but must be positive");
  if (alibi_slopes) {
    check_dtype(op, "alibi_slopes", *alibi_slopes, {DType::float32});
    if (alibi_slopes->ndim == 2) {
      check_shape(op, "alibi_slopes", *alibi_slopes, {batch, heads});
    } else {
      check_shape(op, "alibi_slopes", *alibi_slopes, {heads});
    }
  }
  if (sinks) {
    check_dtype(op, "sinks", *sinks, {DType::float32});
    check_shape(op, "sinks", *sinks, {heads});
  }
  check(out.dtype == q.dtype, op, "out is ", dtype_name(out.dtype), ", but must be ", dtype_name(q.dtype));
  check_shape(op, "out", out, {batch, queries, heads, value_size});
  check(value_size <= 1 || out.stride(3) == 1, op, "out must be contiguous in its last dimension");
  if (lse) {
    check_dtype(op, "lse", *lse, {DType::float32});
    check_shape(op, "lse", *lse, {batch, heads, queries});
  }
}

void check_attention_decode_append(const TensorView& k_cache, const TensorView& v_cache, const TensorView& k,
                                   const TensorView& v, const TensorView* k_scale, const TensorView* v_scale) {
  constexpr const char* op = kAttentionDecodeAppend;
  check_dtype(op, "k", k, {DType::float32, DType::bfloat16, DType::float16});
  check(k.dtype != DType::float16 || k_cache.dtype != DType::int8, op,
        "k is float16, but what goes into an int8 cache must be float32 or bfloat16");
  check_shape(op, "k", k, {-1, -1, -1, -1});
  check_caches(op, "k", k.dtype, k_cache, v_cache, k_scale, v_scale);
  const int64_t heads = k_cache.size(2);
  check_shape(op, "k", k, {-1, -1, heads, k_cache.size(3)});
  check(v.dtype == k.dtype, op, "v is ", dtype_name(v.dtype), ", but must be ", dtype_name(k.dtype), " like k");
  check_shape(op, "v", v, {k.size(0), k.size(1), heads, v_cache.size(3)});
}

}  // namespace lamina
