#include "ops/token_panels.h"

#include <algorithm>
#include <type_traits>

#include "cpu/tuning/quantize_rows.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const PanelOfRowsArgs<float>&)> panel_of_rows_f32_table;
constinit const KernelTable<void(const PanelOfRowsArgs<bf16>&)> panel_of_rows_bf16_table;
constinit const KernelTable<void(const RowsOfPanelArgs&)> rows_of_panel_table;
constinit const KernelTable<void(const QuantizePanelArgs&)> quantize_panel_table;

namespace {

constexpr const char* kOp = "token_panels";

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Calls body(panel) for all of them, so many elements each, on the thread that has its neighbours.
template <class Body>
void each_panel(int64_t panels, int64_t elements, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, tuning::kQuantizeWorkPerThread / std::max<int64_t>(elements, 1));
  parallel_ranges(panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) body(panel);
  });
}

template <class T>
void make_panels(const TensorView& x, float* panels, void (*kernel)(const PanelOfRowsArgs<T>&)) {
  const int64_t length = x.size(1), k = x.size(2), each = ceil_div(length, kPanelTokens), column = x.stride(2);
  each_panel(x.size(0) * each, k * kPanelTokens, [&](int64_t panel) {
    const int64_t first = panel % each * kPanelTokens;
    PanelOfRowsArgs<T> args{.x = x.as<T>() + panel / each * x.stride(0) + first * x.stride(1),
                            .ldx = x.stride(1),
                            .rows = int(std::min<int64_t>(kPanelTokens, length - first)),
                            .features = k,
                            .panel = panels + panel * k * kPanelTokens};
    if (column == 1 || k <= 1) return kernel(args);
    // Strided columns: gather the rows first.
    WorkspaceFrame frame;
    T* rows = frame.take<T>(size_t(args.rows) * size_t(k));
    for (int64_t i = 0; i < args.rows; ++i) {
      for (int64_t j = 0; j < k; ++j) rows[i * k + j] = args.x[i * args.ldx + j * column];
    }
    args.x = rows;
    args.ldx = k;
    kernel(args);
  });
}

}  // namespace

void check_panels(const char* op, const char* what, const TensorView& t, int64_t panels, int64_t features) {
  check_dtype(op, what, t, {DType::float32});
  check_shape(op, what, t, {panels, features, kPanelTokens});
  const bool dense = t.stride(2) == 1 && (t.size(1) <= 1 || t.stride(1) == kPanelTokens);
  check(dense || t.numel() == 0, op, "the features of ", what, " must lie one behind the other, ", kPanelTokens,
        " tokens each");
}

void PanelCodes::quantize(const float* panel, int64_t index, const int32_t* largest) const {
  quantize_panel_table.get()({.panel = panel,
                              .features = features,
                              .largest = largest,
                              .codes = codes + index * ceil_div(features, 4) * 4 * kPanelTokens,
                              .scales = scales + index * kPanelTokens});
}

std::optional<PanelCodes> panel_codes(const char* op, const std::optional<TensorView>& codes,
                                      const std::optional<TensorView>& scales, int64_t panels, int64_t features) {
  check(codes.has_value() == scales.has_value(), op, "codes and scales go together, but one of them is missing");
  if (!codes) return std::nullopt;
  check_dtype(op, "codes", *codes, {DType::uint8});
  check_shape(op, "codes", *codes, {panels, ceil_div(features, 4), kPanelTokens, 4});
  check_contiguous(op, "codes", *codes);
  check_dtype(op, "scales", *scales, {DType::float32});
  check_shape(op, "scales", *scales, {panels, kPanelTokens});
  check_contiguous(op, "scales", *scales);
  return PanelCodes{codes->as<uint8_t>(), scales->as<float>(), features};
}

void token_panels(const TensorView& x, const TensorView& panels) {
  check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  check_shape(kOp, "x", x, {-1, -1, -1});
  check_dtype(kOp, "panels", panels, {DType::float32});
  check_shape(kOp, "panels", panels, {x.size(0) * ceil_div(x.size(1), kPanelTokens), x.size(2), kPanelTokens});
  check_contiguous(kOp, "panels", panels);
  if (panels.numel() == 0) return;
  if (x.dtype == DType::float32) {
    make_panels<float>(x, panels.as<float>(), panel_of_rows_f32_table.get());
  } else {
    make_panels<bf16>(x, panels.as<float>(), panel_of_rows_bf16_table.get());
  }
}

void token_rows(const TensorView& panels, const TensorView& rows) {
  constexpr const char* op = "token_rows";
  check_panels(op, "panels", panels, -1, -1);
  check_dtype(op, "rows", rows, {DType::float32});
  const int64_t k = panels.size(1);
  check_shape(op, "rows", rows, {-1, -1, k});
  check_contiguous(op, "rows", rows);
  const int64_t length = rows.size(1), each = ceil_div(length, kPanelTokens);
  check(rows.size(0) * each == panels.size(0), op, "panels has ", panels.size(0), " panels, but ", rows.size(0),
        " sequences of ", length, " tokens have ", rows.size(0) * each);
  if (rows.numel() == 0) return;
  const auto kernel = rows_of_panel_table.get();
  each_panel(panels.size(0), k * kPanelTokens, [&](int64_t panel) {
    const int64_t first = panel % each * kPanelTokens;
    kernel({.panel = panels.as<float>() + panel * panels.stride(0),
            .rows = int(std::min<int64_t>(kPanelTokens, length - first)),
            .features = k,
            .out = rows.as<float>() + (panel / each * length + first) * k,
            .ld = k});
  });
}

void quantize_panels(const TensorView& panels, const TensorView& codes, const TensorView& scales) {
  constexpr const char* op = "quantize_panels";
  check_panels(op, "panels", panels, -1, -1);
  const auto to = panel_codes(op, codes, scales, panels.size(0), panels.size(1));
  if (panels.size(0) == 0) return;
  quantize_panel_table.get();
  each_panel(panels.size(0), panels.size(1) * kPanelTokens,
             [&](int64_t panel) { to->quantize(panels.as<float>() + panel * panels.stride(0), panel, nullptr); });
}

}  // namespace lamina
