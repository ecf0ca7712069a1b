#include "ops/sparse_int8_linear.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels/sparse_int8.h"
#include "cpu/tuning/sparse_int8.h"
#include "ops/checks.h"
#include "ops/epilogue.h"
#include "ops/int8_operands.h"
#include "ops/layer_norm_panels.h"
#include "ops/parallel.h"
#include "ops/sparse_format.h"
#include "ops/token_panels.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const SparsePanelArgs&)> sparse_int8_panel_table;
constinit const KernelTable<void(const SparseInt8Args&)> sparse_int8_table;
constinit const KernelTable<void(const SparseInt8RowsArgs&)> sparse_int8_rows_table;
constinit const KernelTable<void(const SparseInt8ToPanelArgs&)> sparse_int8_to_panel_table;

namespace {

constexpr const char* kOp = "sparse_int8_linear";

constexpr std::initializer_list<const char*> kPatterns = {"1x4", "2x4", "4x4"};

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// How a weight is cut: spans where a load of codes serves one product only, whole rows of inputs elsewhere.
SparseCut cut_of(const char* op, const std::string& pattern) {
  const SparsePattern shape = parse_sparse_pattern(op, pattern, kPatterns);
  const int64_t groups = shape.rows == 1 ? tuning::kSparseInt8SpanGroups : kInt8MaxK / 4;
  return {pattern, shape, 4 * groups, kSparseInt8Slab, sparse_int8_step(shape.rows)};
}

void check_weight(const char* op, const TensorView& weight) {
  check_dtype(op, "weight", weight, {DType::int8});
  check_shape(op, "weight", weight, {-1, -1});
  const int64_t k = weight.size(1);
  check(k <= kInt8MaxK, op, "in_features is ", k, ", but int32 sums are exact only up to ", kInt8MaxK);
}

// A packed weight for this op, whose kernels take slabs of 16 channels and whole steps of blocks.
SparseForm open_packed(const char* op, const TensorView& data) {
  const SparseForm form = open_sparse(op, data, kPatterns, {DType::int8});
  if (form.header.slab != kSparseInt8Slab || int(form.header.step) != sparse_int8_step(form.pattern.rows)) {
    fail_format(op, "packed_weight.data is damaged: its header has slabs of ", form.header.slab,
                " channels and steps of ", form.header.step, " blocks");
  }
  return form;
}

// The packed weight of a call, with scales and compensation that fit it.
SparseForm open_operands(const char* op, const TensorView& data, const TensorView& scale,
                         const TensorView& compensation) {
  const int64_t n = check_w_scale(op, scale);
  const SparseForm form = open_packed(op, data);
  check(n == form.n(), op, "packed_weight.scale has ", n, " channels, but packed_weight.data has ", form.n());
  check_dtype(op, "packed_weight.compensation", compensation, {DType::int32});
  check_shape(op, "packed_weight.compensation", compensation, {ceil_div(n, kSparseInt8Slab) * kSparseInt8Slab});
  check_contiguous(op, "packed_weight.compensation", compensation);
  return form;
}

SparseInt8Weight weight_of(const SparseForm& form) {
  return {.height = form.pattern.rows,
          .spans = form.k_blocks,
          .slabs = form.slabs,
          .span_groups = form.header.k_block / 4,
          .chunk_first = form.chunk_first,
          .group_first = form.group_first,
          .groups = form.groups,
          .index = form.index,
          .values = reinterpret_cast<const int8_t*>(form.values)};
}

// Threads that a product of so many rows is worth.
int64_t threads_for(const SparseForm& form, int64_t rows) {
  const int64_t work = rows * (form.header.blocks * 4 * form.pattern.rows + 2 * form.k() + 2 * form.n());
  return std::clamp<int64_t>(work / tuning::kSparseInt8WorkPerThread, 1, max_threads());
}

struct Call {
  const Int8Operands& operands;
  const SparseForm& form;
  SparseInt8Weight weight;
  int64_t n, groups;  // groups of four inputs
  const int32_t* compensation;

  int64_t k_padded() const { return 4 * groups; }

  Int8GemmArgs epilogue(int64_t row, int64_t rows, const OffsetCodes& codes, int64_t slab) const {
    const int64_t first = slab * kSparseInt8Slab;
    Int8GemmArgs args = operands.epilogue(row, first);
    args.rows = rows;
    args.codes = codes.codes;
    args.ld_codes = codes.ld;
    args.x_scales = codes.scales;
    args.channels = n - first;
    args.compensation = compensation + first;
    return args;
  }
};

void multiply_few(const Call& call, int64_t rows, int64_t threads, WorkspaceFrame& frame) {
  const OffsetCodes codes = take_codes(rows, call.k_padded(), frame);
  call.operands.rows.prepare(0, rows, codes);
  sparse_int8_rows_table.get();
  parallel_tasks(threads, [&](int64_t task) {
    const int64_t begin = call.form.slab_at(task, threads), end = call.form.slab_at(task + 1, threads);
    if (begin == end) return;
    sparse_int8_rows_table.get()({.weight = call.weight,
                                  .slab_begin = begin,
                                  .slab_end = end,
                                  .epilogue = call.epilogue(0, rows, codes, begin)});
  });
}

// Rows [begin, end) of a panel.
struct Tokens {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
  int width() const { return count() <= kPanelTokens / 2 ? kPanelTokens / 2 : kPanelTokens; }
};

// Shares of rows first. Where there are fewer panels than threads, the channels of a panel are split by blocks, and
// each thread makes the panel for itself: that takes a tenth of the products, and less than waiting for each other.
void multiply_panels(const Call& call, int64_t rows, int64_t threads) {
  const int64_t by_rows = std::min(threads, ceil_div(rows, kPanelTokens));
  const int64_t by_slabs = std::min(threads / by_rows, call.weight.slabs);
  const int64_t share_panels = ceil_div(ceil_div(rows, by_rows), kPanelTokens);
  const int64_t panels = by_rows * share_panels;
  sparse_int8_table.get();
  // Panels that stay in the second-level cache together, while the weights pass over them some slabs at a time.
  const int64_t panel_words = call.groups * kPanelTokens;
  const int64_t together =
      std::clamp<int64_t>(tuning::kSparseInt8PanelBytes / std::max<int64_t>(4 * panel_words, 1), 1, share_panels);
  parallel_tasks(by_rows * by_slabs, [&](int64_t task) {
    const int64_t share = task / by_slabs, part = task % by_slabs;
    const int64_t slab_begin = call.form.slab_at(part, by_slabs), slab_end = call.form.slab_at(part + 1, by_slabs);
    if (slab_begin == slab_end) return;
    WorkspaceFrame frame;
    const OffsetCodes codes = take_codes(kPanelTokens, call.k_padded(), frame);
    float* scales = frame.take<float>(together * kPanelTokens);
    int32_t* made = frame.take<int32_t>(together * panel_words);
    int32_t* sums = frame.take<int32_t>(kSparseHeldSlabs * kSparseInt8Slab * kPanelTokens);
    for (int64_t first = share * share_panels; first < (share + 1) * share_panels; first += together) {
      const int64_t last = std::min(first + together, (share + 1) * share_panels);
      const auto tokens = [&](int64_t i) { return Tokens{rows * i / panels, rows * (i + 1) / panels}; };
      const auto codes_of = [&](int64_t i) {
        return OffsetCodes{codes.codes, codes.ld, codes.k_padded, scales + (i - first) * kPanelTokens};
      };
      const auto panel_of = [&](int64_t i) { return made + (i - first) * panel_words; };
      for (int64_t i = first; i < last; ++i) {
        call.operands.rows.prepare(tokens(i).begin, tokens(i).end, codes_of(i));
        sparse_int8_panel_table.get()({.codes = codes.codes,
                                       .ld = codes.ld,
                                       .rows = tokens(i).count(),
                                       .groups = call.groups,
                                       .panel = panel_of(i),
                                       .width = tokens(i).width()});
      }
      for (int64_t slab = slab_begin; slab < slab_end; slab += kSparseHeldSlabs) {
        for (int64_t i = first; i < last; ++i) {
          sparse_int8_table.get()({.weight = call.weight,
                                   .slab_begin = slab,
                                   .slab_end = std::min<int64_t>(slab + kSparseHeldSlabs, slab_end),
                                   .panel = panel_of(i),
                                   .width = tokens(i).width(),
                                   .sums = sums,
                                   .epilogue = call.epilogue(tokens(i).begin, tokens(i).count(), codes_of(i), slab)});
        }
      }
    }
  });
}

}  // namespace

int64_t sparse_int8_linear_packed_size(const TensorView& weight, const std::string& pattern) {
  constexpr const char* op = "sparse_int8_linear_packed_size";
  check_weight(op, weight);
  return sparse_packed_size(op, weight, cut_of(op, pattern));
}

void sparse_int8_linear_pack(const TensorView& weight, const TensorView& scale, const std::string& pattern,
                             const TensorView& data, const TensorView& compensation) {
  constexpr const char* op = "sparse_int8_linear_pack";
  check_weight(op, weight);
  check_contiguous(op, "weight", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  check_dtype(op, "scale", scale, {DType::float32});
  check_shape(op, "scale", scale, {n});
  check_contiguous(op, "scale", scale);
  check_dtype(op, "compensation", compensation, {DType::int32});
  check_shape(op, "compensation", compensation, {ceil_div(n, kSparseInt8Slab) * kSparseInt8Slab});
  check_contiguous(op, "compensation", compensation);
  for (int64_t i = 0; i < n; ++i) {
    const float s = scale.as<float>()[i];
    check(std::isfinite(s) && s >= 0, op, "scale[", i, "] is ", s, ", but must be finite and not negative");
  }
  const int8_t* w = weight.as<int8_t>();
  for (int64_t i = 0; i < n * k; ++i) {
    check(w[i] != -128, op, "weight[", i / k, ", ", i % k, "] is -128, but codes must lie in [-127, 127]");
  }
  sparse_pack(op, weight, cut_of(op, pattern), data);
  for (int64_t i = 0; i < compensation.size(0); ++i) {
    int32_t sum = 0;
    for (int64_t j = 0; i < n && j < k; ++j) sum += w[i * k + j];
    compensation.as<int32_t>()[i] = int32_t(128u * uint32_t(sum));  // wraps around like the sums it corrects
  }
}

void sparse_int8_linear_unpack(const TensorView& data, const TensorView& weight) {
  constexpr const char* op = "sparse_int8_linear_unpack";
  const SparseForm form = open_packed(op, data);
  check_sparse_sections(op, form);
  sparse_unpack(op, form, weight);
}

void sparse_int8_linear(const TensorView& x, const TensorView& data, const TensorView& scale,
                        const TensorView& compensation, const std::optional<TensorView>& bias,
                        const std::string& activation, const std::optional<TensorView>& residual,
                        const std::optional<TensorView>& x_scale, const std::optional<TensorView>& out_scale,
                        const TensorView& out) {
  check_int8_x(kOp, x, x_scale.has_value());
  const SparseForm form = open_operands(kOp, data, scale, compensation);
  const int64_t n = form.n(), rows = x.size(0);
  check(x.size(1) == form.k(), kOp, "x has ", x.size(1), " features, but packed_weight was packed for ", form.k());

  WorkspaceFrame frame;
  const Int8Operands operands =
      int8_operands(kOp, x, scale, bias, activation, residual, x_scale, out_scale, out, frame);
  if (rows == 0 || n == 0) return;
  const Call call{.operands = operands,
                  .form = form,
                  .weight = weight_of(form),
                  .n = n,
                  .groups = ceil_div(form.k(), 4),
                  .compensation = compensation.as<int32_t>()};
  const int64_t threads = threads_for(form, rows);
  if (rows <= sparse_few_rows(form.pattern.rows)) return multiply_few(call, rows, std::min(threads, form.slabs), frame);
  multiply_panels(call, rows, threads);
}

void sparse_int8_linear_panels(const TensorView& x_codes, const TensorView& x_scales, const TensorView& data,
                               const TensorView& scale, const TensorView& compensation,
                               const std::optional<TensorView>& bias, const std::string& activation,
                               const std::optional<TensorView>& residual, const std::optional<TensorView>& norm_weight,
                               const std::optional<TensorView>& norm_bias, std::optional<double> norm_eps,
                               const std::optional<TensorView>& out, const std::optional<TensorView>& codes,
                               const std::optional<TensorView>& scales) {
  constexpr const char* op = "sparse_int8_linear_panels";
  check_dtype(op, "x_codes", x_codes, {DType::uint8});
  check_shape(op, "x_codes", x_codes, {-1, -1, kPanelTokens, 4});
  check_contiguous(op, "x_codes", x_codes);
  const int64_t panels = x_codes.size(0), groups = x_codes.size(1);
  check_dtype(op, "x_scales", x_scales, {DType::float32});
  check_shape(op, "x_scales", x_scales, {panels, kPanelTokens});
  check_contiguous(op, "x_scales", x_scales);
  const SparseForm form = open_operands(op, data, scale, compensation);
  const int64_t n = form.n();
  check(groups == ceil_div(form.k(), 4), op, "x_codes has ", groups,
        " groups of four features, but packed_weight was packed for ", form.k(), " features");
  WorkspaceFrame frame;
  const float* biases = bias ? float_bias(op, *bias, n, frame) : nullptr;
  const Activation activate = parse_activation(op, activation);
  if (residual) check_panels(op, "residual", *residual, panels, n);
  check(out || codes, op, "neither an output nor its codes are asked for");
  if (out) {
    check_panels(op, "out", *out, panels, n);
    check_contiguous(op, "out", *out);
  }
  const auto to = panel_codes(op, codes, scales, panels, n);
  std::optional<PanelNorm> norm;
  if (norm_eps) {
    check(out.has_value(), op, "the norm of the result is asked for, but out, which it goes to, is missing");
    norm = panel_norm(op, norm_weight, norm_bias, *norm_eps, n, frame);
  }
  if (panels == 0) return;

  const auto finish = [&](float* result, int64_t panel, int32_t* largest) {
    if (norm) norm->apply(result, result, largest);
    if (to) to->quantize(result, panel, largest);
  };
  const auto kernel = sparse_int8_to_panel_table.get();
  const int64_t threads = threads_for(form, panels * kPanelTokens), out_panel = n * kPanelTokens;
  // Shares of panels first: then what a thread computes is quantized while it is in its cache. Where there are fewer
  // panels than threads, the channels of a panel are split by blocks.
  const int64_t by_panels = std::min(threads, panels);
  const int64_t by_slabs = std::clamp<int64_t>(form.slabs, 1, threads / by_panels);
  float* whole = out ? out->as<float>() : by_slabs > 1 ? frame.take<float>(size_t(panels * out_panel)) : nullptr;
  parallel_tasks(by_panels * by_slabs, [&](int64_t task) {
    const int64_t share = task / by_slabs, part = task % by_slabs;
    const int64_t slab_begin = form.slab_at(part, by_slabs), slab_end = form.slab_at(part + 1, by_slabs);
    const int64_t first = slab_begin * kSparseInt8Slab;
    WorkspaceFrame own;
    int32_t* sums = own.take<int32_t>(kSparseHeldSlabs * kSparseInt8Slab * kPanelTokens);
    float* some = whole ? nullptr : own.take<float>(size_t(out_panel));
    for (int64_t panel = panels * share / by_panels; panel < panels * (share + 1) / by_panels; ++panel) {
      int32_t largest[kPanelTokens] = {};
      float* result = whole ? whole + panel * out_panel : some;
      kernel(
          {.weight = weight_of(form),
           .slab_begin = slab_begin,
           .slab_end = slab_end,
           .panel = x_codes.as<int32_t>() + panel * groups * kPanelTokens,
           .sums = sums,
           .x_scales = x_scales.as<float>() + panel * kPanelTokens,
           .channels = n - first,
           .compensation = compensation.as<int32_t>() + first,
           .w_scales = scale.as<float>() + first,
           .bias = biases ? biases + first : nullptr,
           .residual = residual ? residual->as<float>() + panel * residual->stride(0) + first * kPanelTokens : nullptr,
           .activation = activate,
           .out = result + first * kPanelTokens,
           .largest = largest});
      if (by_slabs == 1) finish(result, panel, largest);
    }
  });
  if (by_slabs == 1 || !(norm || to)) return;
  parallel_tasks(panels, [&](int64_t panel) {
    int32_t largest[kPanelTokens];
    float* result = whole + panel * out_panel;
    if (norm) norm->apply(result, result, largest);
    if (to) to->quantize(result, panel, norm ? largest : nullptr);
  });
}

}  // namespace lamina
