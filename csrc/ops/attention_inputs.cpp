#include "ops/attention_inputs.h"

#include <cmath>

#include "cpu/tuning/attention.h"
#include "ops/checks.h"

namespace lamina {

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::boolean: return 1;
    case DType::float32: return 4;
    case DType::float64: return 8;
    default: return 2;
  }
}

AttentionMask mask_type(DType dtype) {
  switch (dtype) {
    case DType::boolean: return AttentionMask::boolean;
    case DType::float16: return AttentionMask::float16;
    case DType::bfloat16: return AttentionMask::bfloat16;
    case DType::float64: return AttentionMask::float64;
    default: return AttentionMask::float32;
  }
}

AttentionMaskView broadcast_mask(const char* op, const TensorView& mask, const TensorView& query, int64_t keys) {
  if (query.dtype == DType::float32) {
    check_dtype(op, "attn_mask", mask, {DType::boolean, DType::float32});
  } else {
    check_dtype(op, "attn_mask", mask, {DType::boolean, DType::float32, query.dtype});
  }
  const int64_t full[4] = {query.size(0), query.size(1), query.size(2), keys};
  bool fits = mask.ndim <= 4;
  AttentionMaskView view;
  for (int i = 1; fits && i <= mask.ndim; ++i) {
    fits = mask.size(-i) == full[4 - i] || mask.size(-i) == 1;
    view.strides[4 - i] = mask.size(-i) == 1 ? 0 : mask.stride(-i);
  }
  check(fits, op, "attn_mask is ", describe(mask), ", but must broadcast to [", full[0], ", ", full[1], ", ", full[2],
        ", ", full[3], "]");
  view.data = mask.as<char>();
  view.type = mask_type(mask.dtype);
  view.element_size = element_size(mask.dtype);
  return view;
}

void check_attention_inputs(const char* op, const TensorView& query, const TensorView& key, const TensorView& value,
                            const TensorView& out) {
  check_dtype(op, "query", query, {DType::float32, DType::bfloat16, DType::float16, DType::float64});
  check(key.dtype == query.dtype && value.dtype == query.dtype, op, "key is ", dtype_name(key.dtype), " and value is ",
        dtype_name(value.dtype), ", but both must be the query's ", dtype_name(query.dtype));
  check_shape(op, "query", query, {-1, -1, -1, -1});
  const int64_t batch = query.size(0), heads = query.size(1), head_size = query.size(3);
  check_shape(op, "key", key, {batch, -1, -1, head_size});
  const int64_t kv_heads = key.size(1);
  check(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, op, "query has ", heads, " heads and key has ", kv_heads,
        ", but the first must be a multiple of the second");
  check_shape(op, "value", value, {batch, kv_heads, key.size(2), -1});
  const int64_t value_size = value.size(3), most = tuning::kAttentionMaxHeadSize;
  check(head_size >= 1 && head_size <= most, op, "query is ", describe(query), ", but its head size must be 1 to ",
        most);
  check(value_size <= most, op, "value is ", describe(value), ", but its head size must be at most ", most);
  check(out.dtype == query.dtype, op, "out is ", dtype_name(out.dtype), ", but must be ", dtype_name(query.dtype));
  check_shape(op, "out", out, {batch, heads, query.size(2), value_size});
}

void check_attention_options(const char* op, const AttentionOptions& options, const TensorView& query) {
  const int64_t batch = query.size(0), heads = query.size(1);
  const DType floats = query.dtype == DType::float64 ? DType::float64 : DType::float32;
  check(options.softcap >= 0.0, op, "softcap is ", options.softcap, ", but must be positive, or 0 for none");
  check(options.dropout_p >= 0.0 && options.dropout_p <= 1.0, op, "dropout_p is ", options.dropout_p,
        ", but must be between 0 and 1");
  if (options.alibi_slopes) {
    const TensorView& slopes = *options.alibi_slopes;
    check_dtype(op, "alibi_slopes", slopes, {floats});
    check((slopes.ndim == 1 && slopes.size(0) == heads) ||
              (slopes.ndim == 2 && slopes.size(0) == batch && slopes.size(1) == heads),
          op, "alibi_slopes is ", describe(slopes), ", but must be [", heads, "] or [", batch, ", ", heads, "]");
  }
  if (options.sinks) {
    check_dtype(op, "sinks", *options.sinks, {floats});
    check_shape(op, "sinks", *options.sinks, {heads});
  }
  if (options.lse) {
    check_dtype(op, "lse", *options.lse, {floats});
    check_shape(op, "lse", *options.lse, {batch, heads, query.size(2)});
  }
}

uint32_t keep_below(double dropout_p) { return uint32_t(std::nearbyint((1.0 - dropout_p) * 65536)); }

}  // namespace lamina
