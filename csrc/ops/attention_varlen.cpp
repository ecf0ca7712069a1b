#include "ops/attention_varlen.h"

#include <algorithm>

#include "cpu/tuning/attention.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {
namespace {

constexpr const char* kOp = "attention_varlen";

int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

int64_t element(const TensorView& t, int64_t i) {
  return t.dtype == DType::int32 ? t.as<int32_t>()[i * t.stride(0)] : t.as<int64_t>()[i * t.stride(0)];
}

void check_cumulative(const char* name, const TensorView& t, int64_t batch, int64_t total, int64_t most) {
  check_dtype(kOp, name, t, {DType::int32, DType::int64});
  check_shape(kOp, name, t, {batch + 1});
  check(element(t, 0) == 0 && element(t, batch) == total, kOp, name, " runs from ", element(t, 0), " to ",
        element(t, batch), ", but must run from 0 to the ", total, " tokens there are");
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = element(t, b + 1) - element(t, b);
    check(length >= 0 && length <= most, kOp, name, " gives sequence ", b, " ", length,
          " tokens, but it must be 0 to the ", most, " of max_seqlen");
  }
}

// Some heads of the tokens of one sequence of a packed [total, heads, size] tensor, as [1, heads, length, size].
struct Part {
  int64_t shape[4], strides[4];
  TensorView view;

  Part(const TensorView& t, int64_t token, int64_t length, int64_t head, int64_t heads)
      : shape{1, heads, length, t.size(2)}, strides{0, t.stride(1), t.stride(0), t.stride(2)} {
    char* data = t.as<char>();
    if (data) data += (token * t.stride(0) + head * t.stride(1)) * size_of(t.dtype);
    view = {data, 4, shape, strides, t.dtype};
  }
};

// Some heads of a tensor [heads] or [1, heads], or [1, heads, queries] of the log-sum-exp.
struct PerHead {
  int64_t shape[3], strides[3];
  TensorView view;

  PerHead(const TensorView& t, int64_t sequence, int64_t head, int64_t heads)
      : shape{1, heads, 1}, strides{0, t.stride(-1), 0} {
    const int64_t row = t.ndim == 2 ? sequence * t.stride(0) : 0;
    view = {t.as<char>() + (row + head * t.stride(-1)) * size_of(t.dtype), 1, shape + 1, strides + 1, t.dtype};
  }
  PerHead(const TensorView& lse, int64_t token, int64_t length, int64_t head, int64_t heads)
      : shape{1, heads, length}, strides{0, lse.stride(0), lse.stride(1)} {
    view = {lse.as<char>() + (head * lse.stride(0) + token * lse.stride(1)) * size_of(lse.dtype), 3, shape, strides,
            lse.dtype};
  }
};

}  // namespace

void attention_varlen(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& cu_seqlens_q,
                      const TensorView& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                      const AttentionOptions& options, const TensorView& out) {
  check_dtype(kOp, "q", q, {DType::float32, DType::bfloat16, DType::float16, DType::float64});
  check_shape(kOp, "q", q, {-1, -1, -1});
  check_shape(kOp, "k", k, {-1, -1, q.size(2)});
  check_shape(kOp, "v", v, {k.size(0), k.size(1), -1});
  const int64_t heads = q.size(1), kv_heads = k.size(1);
  check(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, kOp, "q has ", heads, " heads and k has ", kv_heads,
        ", but the first must be a multiple of the second");
  check(cu_seqlens_q.ndim == 1 && cu_seqlens_q.size(0) > 0, kOp, "cu_seqlens_q is ", describe(cu_seqlens_q),
        ", but must have one dimension of at least one element");
  const int64_t batch = cu_seqlens_q.size(0) - 1;
  check_cumulative("cu_seqlens_q", cu_seqlens_q, batch, q.size(0), max_seqlen_q);
  check_cumulative("cu_seqlens_k", cu_seqlens_k, batch, k.size(0), max_seqlen_k);
  check_shape(kOp, "out", out, {q.size(0), heads, v.size(2)});
  if (options.alibi_slopes) {
    const TensorView& slopes = *options.alibi_slopes;
    if (slopes.ndim == 2) {
      check_shape(kOp, "alibi_slopes", slopes, {batch, heads});
    } else {
      check_shape(kOp, "alibi_slopes", slopes, {heads});
    }
  }
  if (options.sinks) check_shape(kOp, "sinks", *options.sinks, {heads});
  if (options.lse) check_shape(kOp, "lse", *options.lse, {heads, q.size(0)});

  const auto call = [&](int64_t b, int64_t kv_head, int64_t some) {
    const int64_t group = kv_heads ? heads / kv_heads : 1, head = kv_head * group, count = some * group;
    const int64_t q_begin = element(cu_seqlens_q, b), queries = element(cu_seqlens_q, b + 1) - q_begin;
    const int64_t k_begin = element(cu_seqlens_k, b), keys = element(cu_seqlens_k, b + 1) - k_begin;
    AttentionOptions its = options;
    std::optional<PerHead> slopes, sinks, lse;
    if (options.alibi_slopes) its.alibi_slopes = slopes.emplace(*options.alibi_slopes, b, head, count).view;
    if (options.sinks) its.sinks = sinks.emplace(*options.sinks, 0, head, count).view;
    if (options.lse) its.lse = lse.emplace(*options.lse, q_begin, queries, head, count).view;
    attention(Part(q, q_begin, queries, head, count).view, Part(k, k_begin, keys, kv_head, some).view,
              Part(v, k_begin, keys, kv_head, some).view, std::nullopt, its,
              Part(out, q_begin, queries, head, count).view);
  };

  // Every sequence's heads are tasks of their own, the longest first, so that none is left alone at the end. Few of
  // them are split further, by attention itself.
  const int64_t tasks = batch * kv_heads;
  double work = 0;
  for (int64_t b = 0; b < batch; ++b) {
    work += double(element(cu_seqlens_q, b + 1) - element(cu_seqlens_q, b)) *
            double(element(cu_seqlens_k, b + 1) - element(cu_seqlens_k, b));
  }
  work *= double(heads) * double(q.size(2) + v.size(2));
  if (max_threads() == 1 || tasks < tuning::kAttentionSharesPerThread * max_threads() ||
      work < 2 * double(tuning::kAttentionWorkPerThread)) {
    for (int64_t b = 0; b < batch; ++b) call(b, 0, kv_heads);
    return;
  }
  WorkspaceFrame frame;
  int64_t* order = frame.take<int64_t>(size_t(batch));
  for (int64_t b = 0; b < batch; ++b) order[b] = b;
  std::sort(order, order + batch, [&](int64_t a, int64_t b) {
    const int64_t la = element(cu_seqlens_k, a + 1) - element(cu_seqlens_k, a);
    const int64_t lb = element(cu_seqlens_k, b + 1) - element(cu_seqlens_k, b);
    return la != lb ? la > lb : a < b;
  });
  parallel_tasks(tasks, [&](int64_t task) { call(order[task / kv_heads], task % kv_heads, 1); });
}

}  // namespace lamina
