#include "ops/attention.h"

#include <algorithm>

#include "cpu/kernels/attention.h"
#include "cpu/tuning/attention.h"
#include "ops/attention_inputs.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const AttentionArgs&)> attention_f32_table;
constinit const KernelTable<void(const AttentionArgs&)> attention_bf16_table;
constinit const KernelTable<void(const AttentionArgs&)> attention_f32_as_bf16_table;
constinit const KernelTable<void(const AttentionArgs&)> attention_f32_int8_table;
constinit const KernelTable<void(const AttentionArgs&)> attention_f32_as_bf16_int8_table;
constinit const KernelTable<void(const AttentionArgs&)> attention_bf16_int8_table;
constinit const KernelTable<void(const AttentionArgs&)> attention_f16_table;
constinit const KernelTable<void(const AttentionArgs&)> attention_f64_table;

namespace {

constexpr const char* kOp = "attention";

const KernelTable<void(const AttentionArgs&)>& table_of(DType dtype, bool bfloat16_products, bool int8_scores) {
  switch (dtype) {
    case DType::bfloat16: return int8_scores ? attention_bf16_int8_table : attention_bf16_table;
    case DType::float16: return attention_f16_table;
    case DType::float64: return attention_f64_table;
    default:
      if (int8_scores) return bfloat16_products ? attention_f32_as_bf16_int8_table : attention_f32_int8_table;
      return bfloat16_products ? attention_f32_as_bf16_table : attention_f32_table;
  }
}

}  // namespace

void attention(const TensorView& query, const TensorView& key, const TensorView& value,
               const std::optional<TensorView>& mask, const AttentionOptions& options, const TensorView& out) {
  check_attention_inputs(kOp, query, key, value, out);
  check(value.size(3) <= 1 || out.stride(3) == 1, kOp, "out must be contiguous in its last dimension");
  check_attention_options(kOp, options, query);
  const int64_t keys = key.size(2);
  const AttentionMaskView mask_view = mask ? broadcast_mask(kOp, *mask, query, keys) : AttentionMaskView{};
  if (out.numel() == 0 && !(options.lse && options.lse->numel() > 0)) return;

  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  const int64_t head_size = query.size(3), value_size = value.size(3);
  const int64_t group = heads / key.size(1);
  // With few queries the heads that share keys go through the kernel as one longer row of queries.
  const int64_t together = queries < tuning::kAttentionTaskRows ? group : 1;
  const int64_t rows = together * queries;
  const int64_t blocks = (rows + tuning::kAttentionTaskRows - 1) / tuning::kAttentionTaskRows;
  const int64_t tasks = batch * (heads / together) * blocks;
  const int64_t left = options.window_left < 0 ? kAttentionUnlimited : options.window_left;
  const int64_t right = options.is_causal ? 0 : options.window_right < 0 ? kAttentionUnlimited : options.window_right;
  const double seen = double(std::min(keys, std::min(left, keys) + std::min(right, keys) + 1));  // at most, by a query
  const double work = double(batch * heads) * double(queries) * seen * double(head_size + value_size);
  // Tasks go out in shares: one where a second thread would not pay, else several for each, for an even load.
  const bool alone = work < 2 * double(tuning::kAttentionWorkPerThread);
  const int64_t most = max_threads() == 1 ? 1 : tuning::kAttentionSharesPerThread * max_threads();
  const int64_t shares = alone ? 1 : std::min({tasks, most, int64_t(4 * work / tuning::kAttentionWorkPerThread)});

  const bool int8 = options.int8_scores && rows >= tuning::kAttentionInt8Rows && keys > 0;
  const auto kernel = table_of(query.dtype, options.bfloat16_products, int8).get();
  const int64_t size = element_size(query.dtype);
  const int64_t floats_size = query.dtype == DType::float64 ? 8 : 4;
  const int64_t head_bytes = size * keys * (head_size + value_size);
  const bool far =
      head_bytes >= tuning::kAttentionFarHeadBytes &&
      batch * (2 * heads * queries * head_size * size + key.size(1) * head_bytes) >= tuning::kAttentionFarBytes;
  // What a kernel packs is worth keeping for the other blocks that read the same keys.
  const int64_t per_kv_head = group / together * blocks;  // tasks
  const int64_t k_floats = attention_packed_floats(keys, int(head_size));
  const int64_t v_floats = attention_packed_floats(keys, int(value_size));
  const bool packs = int8 || (per_kv_head > 1 && keys * (head_size + value_size) <= tuning::kAttentionPackedFloats);
  // The numbers of heads from (b, h) on, in a tensor [B, Hq, ...] or [Hq] of floats.
  const auto floats_at = [floats_size](const std::optional<TensorView>& t, int64_t b, int64_t h, int dims) -> char* {
    if (!t) return nullptr;
    const int64_t at = t->ndim == dims ? b * t->stride(0) + h * t->stride(1) : h * t->stride(0);
    return t->as<char>() + at * floats_size;
  };
  const auto at = [size](const TensorView& t, int64_t b, int64_t h) {
    return t.as<char>() + (b * t.stride(0) + h * t.stride(1)) * size;
  };

  parallel_tasks(shares, [&](int64_t share) {
    WorkspaceFrame frame;
    float* scratch = frame.take<float>(attention_scratch_floats(int(head_size), int(value_size)));
    AttentionPacked packed{packs ? frame.take<float>(k_floats) : nullptr, packs ? frame.take<float>(v_floats) : nullptr,
                           0, 0};
    const int64_t begin = tasks * share / shares, end = tasks * (share + 1) / shares;
    for (int64_t task = begin; task < end; ++task) {
      if (task % per_kv_head == 0) packed.k_keys = packed.v_keys = 0;
      const int64_t b = task / blocks / (heads / together), h = task / blocks % (heads / together) * together;
      // The head after this one, when this is the last task that works on this one's keys.
      const int64_t next = far && task + 1 < end && (task + 1) % blocks == 0 ? (task + 1) / blocks : -1;
      const int64_t next_b = next / (heads / together), next_h = next % (heads / together) * together;
      // Causal blocks grow with the query: the longest first, so that none is left alone at the end.
      const int64_t block = right == 0 ? blocks - 1 - task % blocks : task % blocks;
      const int64_t next_row = right == 0 && together == 1 ? (blocks - 1) * tuning::kAttentionTaskRows : 0;
      const int64_t row = block * tuning::kAttentionTaskRows;
      kernel({.q = at(query, b, h),
              .q_head = query.stride(1),
              .q_row = query.stride(2),
              .q_col = query.stride(3),
              .k = at(key, b, h / group),
              .k_row = key.stride(2),
              .k_col = head_size == 1 ? 1 : key.stride(3),
              .v = at(value, b, h / group),
              .v_row = value.stride(2),
              .v_col = value_size == 1 ? 1 : value.stride(3),
              .out = at(out, b, h),
              .out_head = out.stride(1),
              .out_row = out.stride(2),
              .lse = floats_at(options.lse, b, h, 3),
              .lse_head = options.lse ? options.lse->stride(1) : 0,
              .lse_row = options.lse ? options.lse->stride(2) : 0,
              .queries = queries,
              .keys = keys,
              .head_size = int(head_size),
              .value_size = int(value_size),
              .scale = options.scale,
              .shift = options.bottom_right ? keys - queries : 0,
              .window_left = left,
              .window_right = right,
              .mask_type = mask_view.type,
              .mask = mask_view.data + (b * mask_view.strides[0] + h * mask_view.strides[1]) * mask_view.element_size,
              .mask_head = mask_view.strides[1],
              .mask_row = mask_view.strides[2],
              .mask_col = mask_view.strides[3],
              .softcap = options.softcap,
              .alibi_slopes = floats_at(options.alibi_slopes, b, h, 2),
              .alibi_head = options.alibi_slopes ? options.alibi_slopes->stride(-1) : 0,
              .sinks = floats_at(options.sinks, b, h, 2),
              .sinks_head = options.sinks ? options.sinks->stride(0) : 0,
              .keep_below = keep_below(options.dropout_p),
              .seed = {uint32_t(uint64_t(options.seed)), uint32_t(uint64_t(options.seed) >> 32)},
              .batch = uint32_t(b),
              .first_head = uint32_t(h),
              .first_row = row,
              .rows = std::min<int64_t>(tuning::kAttentionTaskRows, rows - row),
              .far = far,
              .next_q = next < 0 ? nullptr : at(query, next_b, next_h) + next_row * query.stride(2) * size,
              .next_k = next < 0 ? nullptr : at(key, next_b, next_h / group),
              .next_v = next < 0 ? nullptr : at(value, next_b, next_h / group),
              .packed = packs ? &packed : nullptr,
              .scratch = scratch});
    }
  });
}

}  // namespace lamina
