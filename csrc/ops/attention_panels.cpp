#include "ops/attention_panels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/kernels/attention_panels.h"
#include "cpu/tuning/attention.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/token_panels.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const AttentionPanelsArgs&)> attention_panels_f32_table;
constinit const KernelTable<void(const AttentionPanelsArgs&)> attention_panels_as_bf16_table;

namespace {

constexpr const char* kOp = "attention_panels";
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The mask of one sequence in units of log2, or null where it changes nothing; `to` has room for all keys.
const float* added_of(const std::optional<TensorView>& mask, int64_t sequence, int64_t keys, float* to) {
  if (!mask) return nullptr;
  const int64_t row = mask->size(0) == 1 ? 0 : sequence * mask->stride(0), step = mask->stride(1);
  bool any = false;
  for (int64_t i = 0; i < keys; ++i) {
    const int64_t at = row + i * step;
    to[i] = mask->dtype == DType::boolean ? (mask->as<uint8_t>()[at] ? 0.0f : -kInfinity)
                                          : mask->as<float>()[at] * float(kLog2E);
    any = any || to[i] != 0.0f;
  }
  std::fill(to + keys, to + ceil_div(keys, kPanelTokens) * kPanelTokens, -kInfinity);
  return any ? to : nullptr;
}

}  // namespace

void attention_panels(const TensorView& query, const TensorView& key, const TensorView& value,
                      const std::optional<TensorView>& mask, const AttentionPanelsOptions& options,
                      const std::optional<TensorView>& out, const std::optional<TensorView>& codes,
                      const std::optional<TensorView>& scales) {
  const int64_t length = options.length, heads = options.heads, each = ceil_div(length, kPanelTokens);
  check_panels(kOp, "query", query, -1, -1);
  const int64_t panels = query.size(0), features = query.size(1);
  check_panels(kOp, "key", key, panels, features);
  check_panels(kOp, "value", value, panels, -1);
  const int64_t value_features = value.size(1);
  check(heads >= 1 && features % heads == 0 && value_features % heads == 0, kOp, heads, " heads do not divide ",
        features, " features of the query and ", value_features, " of the value");
  const int64_t head_size = features / heads, value_size = value_features / heads;
  check(std::max(head_size, value_size) <= tuning::kAttentionMaxHeadSize, kOp, "heads have ",
        std::max(head_size, value_size), " features, but at most ", tuning::kAttentionMaxHeadSize, " are supported");
  check(length >= 1 && panels % each == 0, kOp, "query has ", panels, " panels, but a sequence of ", length,
        " tokens has ", each);
  const int64_t sequences = panels / each;
  if (mask) {
    check_dtype(kOp, "mask", *mask, {DType::boolean, DType::float32});
    check_shape(kOp, "mask", *mask, {-1, length});
    check(mask->size(0) == 1 || mask->size(0) == sequences, kOp, "mask has ", mask->size(0), " rows, but there are ",
          sequences, " sequences");
  }
  check(out || codes, kOp, "neither an output nor its codes are asked for");
  if (out) {
    check_panels(kOp, "out", *out, panels, value_features);
    check_contiguous(kOp, "out", *out);
  }
  const auto to = panel_codes(kOp, codes, scales, panels, value_features);
  if (panels == 0) return;

  const auto kernel = (options.bfloat16_products ? attention_panels_as_bf16_table : attention_panels_f32_table).get();
  const int64_t out_panel = value_features * kPanelTokens;
  const double work = double(panels) * kPanelTokens * double(length) * double(features + value_features);
  const int64_t threads =
      std::clamp<int64_t>(int64_t(work / double(tuning::kAttentionWorkPerThread)), 1, max_threads());
  // Shares of panels first: then what a thread computes is quantized while it is in its cache. Where there are fewer
  // panels than threads, heads are shared out as well.
  const int64_t by_panels = std::min(threads, panels), by_heads = std::min(threads / by_panels, heads);
  WorkspaceFrame frame;
  float* whole = out ? out->as<float>() : by_heads > 1 ? frame.take<float>(size_t(panels * out_panel)) : nullptr;

  parallel_tasks(by_panels * by_heads, [&](int64_t task) {
    const int64_t share = task / by_heads, part = task % by_heads;
    const int64_t begin = panels * share / by_panels, end = panels * (share + 1) / by_panels;
    const int64_t first_head = heads * part / by_heads, last_head = heads * (part + 1) / by_heads;
    WorkspaceFrame own;
    float* scratch = own.take<float>(size_t(attention_panels_scratch_floats(length, int(head_size), int(value_size))));
    float* added = own.take<float>(size_t(each * kPanelTokens));
    int32_t* largest = own.take<int32_t>(size_t(each * kPanelTokens));
    float* some = whole ? nullptr : own.take<float>(size_t(std::min(each, end - begin) * out_panel));
    for (int64_t sequence = begin / each; sequence * each < end; ++sequence) {
      const int64_t first = sequence * each;
      const int64_t from = std::max(begin, first) - first, until = std::min(end, first + each) - first;
      float* result = whole ? whole + (first + from) * out_panel : some;
      const float* masked = added_of(mask, sequence, length, added);
      std::memset(largest, 0, size_t(each * kPanelTokens) * sizeof *largest);
      for (int64_t head = first_head; head < last_head; ++head) {
        const auto at = [&](const TensorView& t, int64_t panel, int64_t size) {
          return t.as<float>() + panel * t.stride(0) + head * size * kPanelTokens;
        };
        kernel({.q = at(query, first + from, head_size),
                .q_panel = query.stride(0),
                .panels = until - from,
                .k = at(key, first, head_size),
                .v = at(value, first, value_size),
                .k_panel = key.stride(0),
                .v_panel = value.stride(0),
                .keys = length,
                .out = result + head * value_size * kPanelTokens,
                .out_panel = out_panel,
                .largest = largest,
                .added = masked,
                .head_size = int(head_size),
                .value_size = int(value_size),
                .factor = float(options.scale * kLog2E),
                .scratch = scratch});
      }
      if (!to || by_heads > 1) continue;
      for (int64_t i = 0; i < until - from; ++i) {
        to->quantize(result + i * out_panel, first + from + i, largest + i * kPanelTokens);
      }
    }
  });
  if (to && by_heads > 1) {
    parallel_tasks(panels, [&](int64_t panel) { to->quantize(whole + panel * out_panel, panel, nullptr); });
  }
}

}  // namespace lamina
