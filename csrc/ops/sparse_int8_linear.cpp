#include "ops/sparse_int8_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/kernels/sparse_int8.h"
#include "cpu/tuning.h"
#include "ops/checks.h"
#include "ops/int8_operands.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const SparsePanelArgs&)> sparse_int8_panel_table;
constinit const KernelTable<void(const SparseInt8Args&)> sparse_int8_table;
constinit const KernelTable<void(const SparseInt8RowsArgs&)> sparse_int8_rows_table;

namespace {

constexpr const char* kOp = "sparse_int8_linear";

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// The first 64 bytes of a packed weight.
struct Header {
  char magic[8];
  uint32_t version;
  uint16_t height, width;  // of a block: output channels, inputs
  int64_t n, k;
  int64_t span_groups;  // groups of four inputs of a span
  int64_t blocks;
  int64_t bytes;  // of the whole
};
static_assert(sizeof(Header) <= 64);

constexpr char kMagic[8] = {'l', 'a', 'm', 's', 'p', 'i', 'n', '8'};
constexpr uint32_t kVersion = 1;

// Where everything lies in a packed weight.
struct Layout {
  int64_t n, k, height, span_groups, blocks;
  int64_t groups = ceil_div(k, 4);
  int64_t units = ceil_div(n, kSparseUnit);
  int64_t spans = std::max<int64_t>(1, ceil_div(groups, span_groups));
  int64_t starts = 64;
  int64_t counts = starts + round_up(spans * (units + 1) * 8, 64);
  int64_t group_indices = counts + round_up(spans * units * (kSparseUnit / height) * 2, 64);
  int64_t weights = group_indices + round_up(blocks * 2, 64);
  int64_t bytes = weights + blocks * 4 * height;

  int64_t span_of(int64_t group) const { return group / span_groups; }
  SparseInt8Weight at(char* data) const {
    return {.height = int(height),
            .spans = spans,
            .units = units,
            .starts = reinterpret_cast<const int64_t*>(data + starts),
            .counts = reinterpret_cast<const uint16_t*>(data + counts),
            .groups = reinterpret_cast<const uint16_t*>(data + group_indices),
            .weights = reinterpret_cast<const int8_t*>(data + weights)};
  }
};

// Calls body(block row, group) for every block [height, 4] of weight [n, k] that holds a nonzero.
template <class Body>
void for_each_block(const TensorView& weight, int64_t height, int64_t row, int64_t group_begin, int64_t group_end,
                    const Body& body) {
  const int64_t n = weight.size(0), k = weight.size(1);
  const int8_t* w = weight.as<int8_t>();
  for (int64_t group = group_begin; group < group_end; ++group) {
    const int64_t width = std::min<int64_t>(4, k - 4 * group);
    int8_t any = 0;
    for (int64_t i = row * height; i < std::min((row + 1) * height, n); ++i) {
      for (int64_t j = 0; j < width; ++j) any |= w[i * k + 4 * group + j];
    }
    if (any) body(group);
  }
}

void check_weight(const char* op, const TensorView& weight, int64_t height) {
  check(height == 1 || height == 2 || height == 4, op, "the height of a block is ", height, ", but must be 1, 2 or 4");
  check_dtype(op, "weight", weight, {DType::int8});
  check_shape(op, "weight", weight, {-1, -1});
  check_contiguous(op, "weight", weight);
  const int64_t k = weight.size(1);
  check(k <= kInt8MaxK, op, "in_features is ", k, ", but int32 sums are exact only up to ", kInt8MaxK);
}

int64_t span_groups_of(int64_t height) { return height == 4 ? kInt8MaxK : tuning::kSparseInt8SpanGroups; }

Layout layout_of(const TensorView& weight, int64_t height) {
  const int64_t n = weight.size(0), groups = ceil_div(weight.size(1), 4);
  int64_t blocks = 0;
  for (int64_t row = 0; row < ceil_div(n, height); ++row) {
    for_each_block(weight, height, row, 0, groups, [&](int64_t) { ++blocks; });
  }
  return Layout{n, weight.size(1), height, span_groups_of(height), blocks};
}

// The layout that a packed weight says it has. `op` names who asks.
Layout checked_layout(const char* op, const TensorView& data) {
  check_dtype(op, "packed_weight.data", data, {DType::uint8});
  check_shape(op, "packed_weight.data", data, {-1});
  check_contiguous(op, "packed_weight.data", data);
  Header header{};
  if (data.size(0) >= 64) std::memcpy(&header, data.data, sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) {
    fail_format(op, "packed_weight.data is no weight that pack_sparse_int8_weight made");
  }
  if (header.version != kVersion) {
    fail_format(op, "packed_weight.data has version ", header.version, ", but this lamina reads ", kVersion,
                "; pack the weight again");
  }
  const bool known = (header.height == 1 || header.height == 2 || header.height == 4) && header.width == 4;
  const bool sizes = header.n >= 0 && header.k >= 0 && header.k <= kInt8MaxK && header.blocks >= 0 &&
                     header.span_groups > 0 && header.bytes == data.size(0);
  if (known && sizes) {
    const Layout layout{header.n, header.k, header.height, header.span_groups, header.blocks};
    if (layout.bytes == header.bytes) return layout;
  }
  fail_format(op, "packed_weight.data is damaged: its header says ", header.height, "x", header.width, " blocks of [",
              header.n, ", ", header.k, "] in ", header.bytes, " bytes, but it has ", data.size(0));
}

// The first unit of share `i` of `shares` with about the same number of blocks in each; a unit without any counts too,
// for its outputs.
int64_t unit_share(const SparseInt8Weight& w, int64_t i, int64_t shares) {
  if (i == 0) return 0;
  if (i == shares) return w.units;
  constexpr int64_t kOutputs = 16;  // blocks that the outputs of a unit cost as much as
  const auto before = [&](int64_t unit) {
    int64_t blocks = unit * kOutputs;
    for (int64_t span = 0; span < w.spans; ++span) {
      const int64_t* starts = w.starts + span * (w.units + 1);
      blocks += starts[unit] - starts[0];
    }
    return blocks;
  };
  const int64_t target = before(w.units) * i / shares;
  int64_t low = 0, high = w.units;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (before(middle) < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Call {
  const Int8Operands& operands;
  SparseInt8Weight weight;
  int64_t n, k_padded, groups;
  const int32_t* compensation;

  Int8GemmArgs epilogue(int64_t row, int64_t rows, const OffsetCodes& codes, int64_t unit) const {
    const int64_t first = unit * kSparseUnit;
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
  const OffsetCodes codes = take_codes(rows, call.k_padded, frame);
  call.operands.rows.prepare(0, rows, codes);
  sparse_int8_rows_table.get();
  parallel_tasks(threads, [&](int64_t task) {
    const int64_t begin = unit_share(call.weight, task, threads), end = unit_share(call.weight, task + 1, threads);
    if (begin == end) return;
    sparse_int8_rows_table.get()({.weight = call.weight,
                                  .unit_begin = begin,
                                  .unit_end = end,
                                  .epilogue = call.epilogue(0, rows, codes, begin)});
  });
}

// Rows [begin, end) of a panel.
struct Tokens {
  int64_t begin, end;
  int width() const { return end - begin <= kSparsePanel / 2 ? kSparsePanel / 2 : kSparsePanel; }
};

void fill_panel(const Call& call, const Tokens& tokens, const OffsetCodes& codes, int32_t* panel) {
  call.operands.rows.prepare(tokens.begin, tokens.end, codes);
  sparse_int8_panel_table.get()({.codes = codes.codes,
                                 .ld = codes.ld,
                                 .rows = tokens.end - tokens.begin,
                                 .groups = call.groups,
                                 .panel = panel,
                                 .width = tokens.width()});
}

void multiply_panel(const Call& call, const Tokens& tokens, const OffsetCodes& codes, const int32_t* panel,
                    int64_t unit_begin, int64_t unit_end) {
  if (unit_begin == unit_end) return;
  WorkspaceFrame frame;
  sparse_int8_table.get()({.weight = call.weight,
                           .unit_begin = unit_begin,
                           .unit_end = unit_end,
                           .panel = panel,
                           .width = tokens.width(),
                           .sums = frame.take<int32_t>(kSparseChunkUnits * kSparseUnit * kSparsePanel),
                           .epilogue = call.epilogue(tokens.begin, tokens.end - tokens.begin, codes, unit_begin)});
}

// Shares of rows first: each makes its own panels and waits for nobody. With fewer rows than threads times a panel, the
// panels are made by all, then the channels are split, by blocks.
void multiply_panels(const Call& call, int64_t rows, int64_t threads, WorkspaceFrame& frame) {
  const int64_t by_rows = std::clamp<int64_t>(rows / kSparsePanel, 1, threads);
  const int64_t by_units = std::min(threads / by_rows, call.weight.units);
  const int64_t share_panels = ceil_div(ceil_div(rows, by_rows), kSparsePanel);
  const int64_t panels = by_rows * share_panels;
  const auto tokens = [&](int64_t panel) { return Tokens{rows * panel / panels, rows * (panel + 1) / panels}; };
  sparse_int8_table.get();
  if (by_units <= 1) {
    parallel_tasks(by_rows, [&](int64_t share) {
      WorkspaceFrame own;
      const OffsetCodes codes = take_codes(kSparsePanel, call.k_padded, own);
      int32_t* panel = own.take<int32_t>(call.groups * kSparsePanel);
      for (int64_t i = share * share_panels; i < (share + 1) * share_panels; ++i) {
        fill_panel(call, tokens(i), codes, panel);
        multiply_panel(call, tokens(i), codes, panel, 0, call.weight.units);
      }
    });
    return;
  }
  const OffsetCodes codes = take_codes(rows, call.k_padded, frame);
  const int64_t panel_size = call.groups * kSparsePanel;
  int32_t* all = frame.take<int32_t>(panels * panel_size);
  const auto panel_codes = [&](int64_t panel) { return codes.from(tokens(panel).begin); };
  parallel_tasks(panels, [&](int64_t i) { fill_panel(call, tokens(i), panel_codes(i), all + i * panel_size); });
  sparse_int8_table.get();
  parallel_tasks(panels * by_units, [&](int64_t task) {
    const int64_t i = task / by_units, share = task % by_units;
    multiply_panel(call, tokens(i), panel_codes(i), all + i * panel_size, unit_share(call.weight, share, by_units),
                   unit_share(call.weight, share + 1, by_units));
  });
}

}  // namespace

int64_t sparse_int8_linear_packed_size(const TensorView& weight, int64_t height) {
  check_weight("sparse_int8_linear_packed_size", weight, height);
  return layout_of(weight, height).bytes;
}

void sparse_int8_linear_pack(const TensorView& weight, const TensorView& scale, int64_t height, const TensorView& data,
                             const TensorView& compensation) {
  constexpr const char* op = "sparse_int8_linear_pack";
  check_weight(op, weight, height);
  const Layout layout = layout_of(weight, height);
  const int64_t n = layout.n, k = layout.k;
  check_dtype(op, "scale", scale, {DType::float32});
  check_shape(op, "scale", scale, {n});
  check_contiguous(op, "scale", scale);
  check_dtype(op, "data", data, {DType::uint8});
  check_shape(op, "data", data, {layout.bytes});
  check_contiguous(op, "data", data);
  check_dtype(op, "compensation", compensation, {DType::int32});
  check_shape(op, "compensation", compensation, {layout.units * kSparseUnit});
  check_contiguous(op, "compensation", compensation);
  for (int64_t i = 0; i < n; ++i) {
    const float s = scale.as<float>()[i];
    check(std::isfinite(s) && s >= 0, op, "scale[", i, "] is ", s, ", but must be finite and not negative");
  }
  const int8_t* w = weight.as<int8_t>();
  for (int64_t i = 0; i < n * k; ++i) {
    check(w[i] != -128, op, "weight[", i / k, ", ", i % k, "] is -128, but codes must lie in [-127, 127]");
  }
  char* base = data.as<char>();
  std::memset(base, 0, size_t(layout.bytes));
  Header header{.magic = {},
                .version = kVersion,
                .height = uint16_t(height),
                .width = 4,
                .n = n,
                .k = k,
                .span_groups = layout.span_groups,
                .blocks = layout.blocks,
                .bytes = layout.bytes};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  std::memcpy(base, &header, sizeof header);

  auto* starts = reinterpret_cast<int64_t*>(base + layout.starts);
  auto* counts = reinterpret_cast<uint16_t*>(base + layout.counts);
  auto* groups = reinterpret_cast<uint16_t*>(base + layout.group_indices);
  auto* weights = reinterpret_cast<int8_t*>(base + layout.weights);
  int64_t block = 0;
  for (int64_t span = 0; span < layout.spans; ++span) {
    const int64_t begin = span * layout.span_groups, end = std::min(layout.groups, begin + layout.span_groups);
    for (int64_t unit = 0; unit < layout.units; ++unit) {
      *starts++ = block;
      for (int64_t row = unit * kSparseUnit / height; row < (unit + 1) * kSparseUnit / height; ++row) {
        const int64_t first = block;
        for_each_block(weight, height, row, begin, end, [&](int64_t group) {
          groups[block] = uint16_t(group);
          for (int64_t i = 0; i < height && row * height + i < n; ++i) {
            const int64_t channel = row * height + i;
            std::memcpy(weights + (block * height + i) * 4, w + channel * k + 4 * group,
                        size_t(std::min<int64_t>(4, k - 4 * group)));
          }
          ++block;
        });
        *counts++ = uint16_t(block - first);
      }
    }
    *starts++ = block;
  }
  for (int64_t i = 0; i < layout.units * kSparseUnit; ++i) {
    int32_t sum = 0;
    for (int64_t j = 0; i < n && j < k; ++j) sum += w[i * k + j];
    compensation.as<int32_t>()[i] = int32_t(128u * uint32_t(sum));  // wraps around like the sums it corrects
  }
}

void sparse_int8_linear_unpack(const TensorView& data, const TensorView& weight) {
  constexpr const char* op = "sparse_int8_linear_unpack";
  const Layout layout = checked_layout(op, data);
  check_dtype(op, "weight", weight, {DType::int8});
  check_shape(op, "weight", weight, {layout.n, layout.k});
  check_contiguous(op, "weight", weight);
  const SparseInt8Weight packed = layout.at(data.as<char>());
  int8_t* w = weight.as<int8_t>();
  std::memset(w, 0, size_t(layout.n * layout.k));
  const int64_t rows = layout.units * kSparseUnit / layout.height;
  int64_t block = 0;
  for (int64_t i = 0; i < layout.spans * rows; ++i) {
    for (int c = 0; c < packed.counts[i] && block < layout.blocks; ++c, ++block) {
      const int64_t group = packed.groups[block];
      if (group >= layout.groups) fail_format(op, "packed_weight.data is damaged: block ", block, " is behind the end");
      for (int64_t h = 0; h < layout.height; ++h) {
        const int64_t channel = i % rows * layout.height + h;
        if (channel >= layout.n) break;
        std::memcpy(w + channel * layout.k + 4 * group, packed.weights + (block * layout.height + h) * 4,
                    size_t(std::min<int64_t>(4, layout.k - 4 * group)));
      }
    }
  }
}

void sparse_int8_linear(const TensorView& x, const TensorView& data, const TensorView& scale,
                        const TensorView& compensation, const std::optional<TensorView>& bias,
                        const std::string& activation, const std::optional<TensorView>& residual,
                        const std::optional<TensorView>& x_scale, const std::optional<TensorView>& out_scale,
                        const TensorView& out) {
  check_int8_x(kOp, x, x_scale.has_value());
  const int64_t n = check_w_scale(kOp, scale), rows = x.size(0);
  const Layout layout = checked_layout(kOp, data);
  check(x.size(1) == layout.k, kOp, "x has ", x.size(1), " features, but packed_weight was packed for ", layout.k);
  check(n == layout.n, kOp, "packed_weight.scale has ", n, " channels, but packed_weight.data has ", layout.n);
  check_dtype(kOp, "packed_weight.compensation", compensation, {DType::int32});
  check_shape(kOp, "packed_weight.compensation", compensation, {layout.units * kSparseUnit});
  check_contiguous(kOp, "packed_weight.compensation", compensation);

  WorkspaceFrame frame;
  const Int8Operands operands =
      int8_operands(kOp, x, scale, bias, activation, residual, x_scale, out_scale, out, frame);
  if (rows == 0 || n == 0) return;
  const Call call{.operands = operands,
                  .weight = layout.at(data.as<char>()),
                  .n = n,
                  .k_padded = layout.groups * 4,
                  .groups = layout.groups,
                  .compensation = compensation.as<int32_t>()};
  const int64_t work = rows * (layout.blocks * 4 * layout.height + 2 * layout.k + 2 * n);
  const int64_t threads = std::clamp<int64_t>(work / tuning::kSparseInt8WorkPerThread, 1, max_threads());
  if (rows <= kSparseFewRows) return multiply_few(call, rows, std::min(threads, layout.units), frame);
  multiply_panels(call, rows, threads, frame);
}

}  // namespace lamina
