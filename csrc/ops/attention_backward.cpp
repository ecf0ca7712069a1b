#include "ops/attention_backward.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/kernels/attention_backward.h"
#include "cpu/tuning/attention.h"
#include "cpu/tuning/attention_backward.h"
#include "ops/attention_inputs.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const AttentionBackwardArgs&)> attention_backward_f32_table;
constinit const KernelTable<void(const AttentionBackwardArgs&)> attention_backward_bf16_table;
constinit const KernelTable<void(const AttentionBackwardArgs&)> attention_backward_f16_table;
constinit const KernelTable<void(const AttentionBackwardArgs&)> attention_backward_f64_table;
constinit const KernelTable<void(const AttentionSumArgs&)> attention_backward_sum_f32_table;
constinit const KernelTable<void(const AttentionSumArgs&)> attention_backward_sum_bf16_table;
constinit const KernelTable<void(const AttentionSumArgs&)> attention_backward_sum_f16_table;

namespace {

constexpr const char* kOp = "attention_backward";

const KernelTable<void(const AttentionBackwardArgs&)>& table_of(DType dtype) {
  switch (dtype) {
    case DType::bfloat16: return attention_backward_bf16_table;
    case DType::float16: return attention_backward_f16_table;
    case DType::float64: return attention_backward_f64_table;
    default: return attention_backward_f32_table;
  }
}

const KernelTable<void(const AttentionSumArgs&)>& sum_table_of(DType dtype) {
  switch (dtype) {
    case DType::bfloat16: return attention_backward_sum_bf16_table;
    case DType::float16: return attention_backward_sum_f16_table;
    default: return attention_backward_sum_f32_table;
  }
}

void check_like(const char* what, const TensorView& t, const TensorView& model) {
  check(t.dtype == model.dtype, kOp, what, " is ", dtype_name(t.dtype), ", but must be ", dtype_name(model.dtype));
  check(t.ndim == model.ndim && std::equal(t.shape, t.shape + t.ndim, model.shape), kOp, what, " is ", describe(t),
        ", but must be ", describe(model));
}

void check_gradient(const char* what, const TensorView& t, const TensorView& model) {
  check_like(what, t, model);
  check(t.size(3) <= 1 || t.stride(3) == 1, kOp, what, " must be contiguous in its last dimension");
}

// A gradient of floats beside the one of the tensor that it is for.
void check_gradient_of(const char* what, const std::optional<TensorView>& t, const std::optional<TensorView>& model,
                       DType floats) {
  if (!t) return;
  check(model.has_value(), kOp, "the gradient of ", what, " is wanted, but there is no ", what);
  check(t->dtype == floats, kOp, "the gradient of ", what, " is ", dtype_name(t->dtype), ", but must be ",
        dtype_name(floats));
  check(t->ndim == model->ndim && std::equal(t->shape, t->shape + t->ndim, model->shape) && t->is_contiguous(), kOp,
        "the gradient of ", what, " is ", describe(*t), ", but must be contiguous and shaped like ", describe(*model));
}

// Ranges of keys that are computed apart: the number hangs on the shapes alone, or sums would hang on the number of
// threads. One where there are heads enough to share out.
int64_t ranges_of(int64_t owners, int64_t keys) {
  if (owners >= tuning::kAttentionBackwardOwners) return 1;
  const int64_t wanted = (tuning::kAttentionBackwardOwners + owners - 1) / owners;
  const int64_t most = (keys + tuning::kAttentionBackwardRange - 1) / tuning::kAttentionBackwardRange;
  return std::max<int64_t>(1, std::min(wanted, most));
}

template <class T>
void sum_parts_of(const TensorView& to, const T* parts, int64_t count) {
  const int64_t n = to.numel();
  for (int64_t i = 0; i < n; ++i) {
    T sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * n + i];
    to.as<T>()[i] = sum;
  }
}

void sum_parts(const TensorView& to, const char* parts, int64_t count) {
  if (to.dtype == DType::float64) {
    sum_parts_of(to, reinterpret_cast<const double*>(parts), count);
  } else {
    sum_parts_of(to, reinterpret_cast<const float*>(parts), count);
  }
}

}  // namespace

void attention_backward(const TensorView& grad_out, const TensorView& query, const TensorView& key,
                        const TensorView& value, const TensorView& out, const TensorView& lse,
                        const std::optional<TensorView>& grad_lse, const std::optional<TensorView>& mask,
                        const AttentionOptions& options, const AttentionGradients& gradients) {
  check_attention_inputs(kOp, query, key, value, out);
  check_attention_options(kOp, options, query);
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), head_size = query.size(3);
  const int64_t kv_heads = key.size(1), keys = key.size(2), value_size = value.size(3);
  const DType floats = query.dtype == DType::float64 ? DType::float64 : DType::float32;
  check_like("grad_out", grad_out, out);
  check_dtype(kOp, "lse", lse, {floats});
  check_shape(kOp, "lse", lse, {batch, heads, queries});
  if (grad_lse) check_like("grad_lse", *grad_lse, lse);
  const AttentionMaskView mask_view = mask ? broadcast_mask(kOp, *mask, query, keys) : AttentionMaskView{};
  check_gradient("the gradient of query", gradients.query, query);
  check_gradient("the gradient of key", gradients.key, key);
  check_gradient("the gradient of value", gradients.value, value);
  check_gradient_of("attn_mask", gradients.mask, mask, floats);
  check_gradient_of("alibi_slopes", gradients.alibi_slopes, options.alibi_slopes, floats);
  check_gradient_of("sinks", gradients.sinks, options.sinks, floats);
  check(!gradients.mask || mask_view.type != AttentionMask::boolean, kOp,
        "attn_mask is boolean, but only one that is added has a gradient");
  const AttentionMaskView grad_mask =
      gradients.mask ? broadcast_mask(kOp, *gradients.mask, query, keys) : AttentionMaskView{};

  if (batch == 0 || kv_heads == 0) return;
  const int64_t group = heads / kv_heads;
  const bool is_double = query.dtype == DType::float64;
  const int64_t size = element_size(query.dtype), floats_size = is_double ? 8 : 4;
  const auto sum = sum_table_of(query.dtype).get();
  const auto kernel = table_of(query.dtype).get();
  const auto at = [size](const TensorView& t, int64_t b, int64_t h) {
    return t.as<char>() + (b * t.stride(0) + h * t.stride(1)) * size;
  };

  // The gradient of a mask that several batches or heads share has one owner, who takes them one after the other.
  const bool shares_batch = gradients.mask && grad_mask.strides[0] == 0;
  const bool shares_heads = gradients.mask && grad_mask.strides[1] == 0;
  const int64_t batch_owners = shares_batch ? 1 : batch, head_owners = shares_heads ? 1 : kv_heads;
  const int64_t owners = batch_owners * head_owners;
  const bool one_range = is_double || (gradients.mask && grad_mask.strides[3] == 0);
  const int64_t ranges = one_range ? 1 : ranges_of(owners, keys);
  // A multiple of the chunk, so that all but the last are made of whole ones.
  const int64_t chunk = tuning::kAttentionBackwardChunk;
  const int64_t range = ((keys + ranges - 1) / ranges + chunk - 1) / chunk * chunk;

  WorkspaceFrame frame;
  const int64_t q_columns = (head_size + 15) / 16 * 16;
  float* partial = ranges > 1 ? frame.take<float>(size_t(ranges * batch * heads * queries * q_columns)) : nullptr;
  // What each owner adds to slopes and sinks, [ranges][batch][heads] and [batch][heads].
  const auto take_parts = [&](bool wanted, int64_t count) -> char* {
    if (!wanted) return nullptr;
    char* parts = frame.take<char>(size_t(count * floats_size));
    std::memset(parts, 0, size_t(count * floats_size));
    return parts;
  };
  char* slope_parts = take_parts(gradients.alibi_slopes.has_value(), ranges * batch * heads);
  char* sink_parts = take_parts(gradients.sinks.has_value(), batch * heads);

  const int64_t left = options.window_left < 0 ? kAttentionUnlimited : options.window_left;
  const int64_t right = options.is_causal ? 0 : options.window_right < 0 ? kAttentionUnlimited : options.window_right;
  const double work = double(batch * heads) * double(queries) * double(keys) * double(head_size + value_size);
  const bool alone = work < double(tuning::kAttentionWorkPerThread);
  // The numbers of head h of batch b, in a tensor [B, Hq, ...] or [Hq] of floats.
  const auto floats_at = [floats_size](const std::optional<TensorView>& t, int64_t b, int64_t h, int dims) -> char* {
    if (!t) return nullptr;
    const int64_t at = t->ndim == dims ? b * t->stride(0) + h * t->stride(1) : h * t->stride(0);
    return t->as<char>() + at * floats_size;
  };

  const auto one_range_of_head = [&](int64_t b, int64_t kv_head, int64_t part, float* scratch) {
    const int64_t h = kv_head * group, first = part * range;
    const int64_t count = std::clamp<int64_t>(keys - first, 0, range);
    const auto mask_at = [&](const AttentionMaskView& view) {
      return view.data + (b * view.strides[0] + h * view.strides[1]) * view.element_size;
    };
    kernel({.q = at(query, b, h),
            .q_head = query.stride(1),
            .q_row = query.stride(2),
            .q_col = head_size == 1 ? 1 : query.stride(3),
            .out = at(out, b, h),
            .out_head = out.stride(1),
            .out_row = out.stride(2),
            .out_col = value_size == 1 ? 1 : out.stride(3),
            .grad = at(grad_out, b, h),
            .grad_head = grad_out.stride(1),
            .grad_row = grad_out.stride(2),
            .grad_col = value_size == 1 ? 1 : grad_out.stride(3),
            .k = at(key, b, kv_head),
            .k_row = key.stride(2),
            .k_col = head_size == 1 ? 1 : key.stride(3),
            .v = at(value, b, kv_head),
            .v_row = value.stride(2),
            .v_col = value_size == 1 ? 1 : value.stride(3),
            .lse = lse.as<char>() + (b * lse.stride(0) + h * lse.stride(1)) * floats_size,
            .lse_head = lse.stride(1),
            .lse_row = lse.stride(2),
            .grad_lse = floats_at(grad_lse, b, h, 3),
            .grad_lse_head = grad_lse ? grad_lse->stride(1) : 0,
            .grad_lse_row = grad_lse ? grad_lse->stride(2) : 0,
            .heads = group,
            .queries = queries,
            .keys = keys,
            .first_key = first,
            .range = count,
            .head_size = int(head_size),
            .value_size = int(value_size),
            .scale = options.scale,
            .shift = options.bottom_right ? keys - queries : 0,
            .window_left = left,
            .window_right = right,
            .mask_type = mask_view.type,
            .mask = mask_at(mask_view),
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
            .grad_k = at(gradients.key, b, kv_head) + first * gradients.key.stride(2) * size,
            .grad_k_row = gradients.key.stride(2),
            .grad_v = at(gradients.value, b, kv_head) + first * gradients.value.stride(2) * size,
            .grad_v_row = gradients.value.stride(2),
            .grad_q = at(gradients.query, b, h),
            .grad_q_head = gradients.query.stride(1),
            .grad_q_row = gradients.query.stride(2),
            .partial_q = partial ? partial + ((part * batch + b) * heads + h) * queries * q_columns : nullptr,
            .grad_mask = gradients.mask ? mask_at(grad_mask) : nullptr,
            .grad_mask_head = grad_mask.strides[1],
            .grad_mask_row = grad_mask.strides[2],
            .grad_mask_col = grad_mask.strides[3],
            .grad_slopes = slope_parts ? slope_parts + ((part * batch + b) * heads + h) * floats_size : nullptr,
            .grad_sinks = sink_parts && part == 0 ? sink_parts + (b * heads + h) * floats_size : nullptr,
            .scratch = scratch});
  };

  const int64_t tasks = owners * ranges;
  const auto task_of = [&](int64_t task) {
    WorkspaceFrame own;
    float* scratch = own.take<float>(
        size_t(attention_backward_scratch_floats(int(head_size), int(value_size), std::min(range, keys + chunk))));
    const int64_t owner = task / ranges, part = task % ranges;
    const int64_t b0 = owner / head_owners, h0 = owner % head_owners;
    for (int64_t b = b0; b < (shares_batch ? batch : b0 + 1); ++b) {
      for (int64_t h = h0; h < (shares_heads ? kv_heads : h0 + 1); ++h) one_range_of_head(b, h, part, scratch);
    }
  };
  if (alone) {
    for (int64_t task = 0; task < tasks; ++task) task_of(task);
  } else {
    parallel_tasks(tasks, task_of);
  }

  if (partial) {
    const int64_t blocks = (queries + tuning::kAttentionTaskRows - 1) / tuning::kAttentionTaskRows;
    const auto sum_of = [&](int64_t i) {
      const int64_t row = i % blocks * tuning::kAttentionTaskRows, head = i / blocks;
      sum({.parts = partial + (head * queries + row) * q_columns,
           .part_stride = batch * heads * queries * q_columns,
           .row_stride = q_columns,
           .count_parts = int(ranges),
           .out = at(gradients.query, head / heads, head % heads) + row * gradients.query.stride(2) * size,
           .out_row = gradients.query.stride(2),
           .rows = std::min<int64_t>(tuning::kAttentionTaskRows, queries - row),
           .columns = int(head_size),
           .factor = float(options.scale)});
    };
    if (alone) {
      for (int64_t i = 0; i < batch * heads * blocks; ++i) sum_of(i);
    } else {
      parallel_tasks(batch * heads * blocks, sum_of);
    }
  }
  if (gradients.alibi_slopes) {
    // Of slopes [Hq] the batches are summed too.
    const bool each_batch = gradients.alibi_slopes->ndim == 2;
    sum_parts(*gradients.alibi_slopes, slope_parts, each_batch ? ranges : ranges * batch);
  }
  if (gradients.sinks) sum_parts(*gradients.sinks, sink_parts, batch);
}

}  // namespace lamina
