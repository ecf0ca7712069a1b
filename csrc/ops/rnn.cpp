#include "ops/rnn.h"

#include <algorithm>
#include <cstring>
#include <variant>
#include <vector>

#include "cpu/kernels/panel_gemm.h"
#include "cpu/kernels/quantize_rows.h"
#include "cpu/kernels/rnn_step.h"
#include "cpu/tuning/int8_gemm.h"
#include "cpu/tuning/rnn.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const PanelGemmArgs<float>&)> panel_gemm_f32_table;
constinit const KernelTable<void(const PanelGemmArgs<bf16>&)> panel_gemm_bf16_table;
constinit const KernelTable<void(const PanelGemmArgs<int8_t>&)> panel_gemm_int8_table;
constinit const KernelTable<void(const RnnStepArgs<float>&)> rnn_step_f32_table;
constinit const KernelTable<void(const RnnStepArgs<bf16>&)> rnn_step_bf16_table;
constinit const KernelTable<void(const RnnStepArgs<int8_t>&)> rnn_step_int8_table;

namespace {

constexpr int64_t kLanes = kPanelLanes;
constexpr int64_t kProjectionColumns = 4 * kLanes;

int64_t panels_of(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A matrix in panels of weights of any format, the bias of its columns, and their scales and compensation if int8.
struct Matrix {
  const void* panels = nullptr;
  const float* scales = nullptr;
  const int32_t* compensation = nullptr;
  const float* bias = nullptr;
  int64_t k = 0;
  int groups = 4;
};

// What a matrix is multiplied with: rows of floats, or what they were quantized
// to.
struct Rows {
  const float* x = nullptr;
  int64_t ldx = 0;
  const uint8_t* codes = nullptr;
  int64_t ld_codes = 0;
  const float* scales = nullptr;
  int64_t count = 0;
};

// The product of `x` with `count` panels of w from `first` on, plus their bias.
template <class Weight>
PanelGemmArgs<Weight> product(const Matrix& w, int64_t first, int64_t count, const Rows& x) {
  constexpr bool is_int8 = PanelGemmArgs<Weight>::is_int8;
  const int64_t column = first * w.groups * kLanes;
  PanelGemmArgs<Weight> args{};
  if constexpr (is_int8) {
    args.x = x.codes;
    args.ldx = x.ld_codes;
    args.x_scales = x.scales;
    args.w_scales = w.scales + column;
    args.compensation = w.compensation + column;
  } else {
    args.x = x.x;
    args.ldx = x.ldx;
  }
  args.rows = x.count;
  args.k = is_int8 ? round_up(w.k, 4) : w.k;
  args.panels = static_cast<const Weight*>(w.panels) + column * args.k;
  args.groups = w.groups;
  args.count = count;
  args.bias = w.bias ? w.bias + column : nullptr;
  return args;
}

// The kernels for one format of weights, looked up once a call.
template <class Weight>
struct Kernels {
  void (*gemm)(const PanelGemmArgs<Weight>&);
  void (*step)(const RnnStepArgs<Weight>&);
};

template <class Weight>
Kernels<Weight> find_kernels() {
  if constexpr (std::is_same_v<Weight, float>) return {panel_gemm_f32_table.get(), rnn_step_f32_table.get()};
  if constexpr (std::is_same_v<Weight, bf16>) return {panel_gemm_bf16_table.get(), rnn_step_bf16_table.get()};
  if constexpr (std::is_same_v<Weight, int8_t>) return {panel_gemm_int8_table.get(), rnn_step_int8_table.get()};
}

struct Direction {
  Matrix input, state, projection;
};

// Rows of floats by step and sequence: [T, B, *] with any strides, or packed.
struct Sequence {
  float* data;
  int64_t step, row;
  bool packed;

  float* at(const Steps& steps, int64_t t) const { return data + (packed ? steps.start(t) * row : t * step); }
  // Whether the rows of consecutive steps are one run, and their distance in
  // it.
  bool is_one_run(int64_t batch) const { return packed || batch == 1 || step == batch * row; }
  int64_t distance(int64_t batch) const { return !packed && batch == 1 ? step : row; }
};

Sequence sequence_of(const TensorView& t) {
  if (t.ndim == 2) return {t.as<float>(), 0, t.stride(0), true};
  return {t.as<float>(), t.stride(0), t.stride(1), false};
}

class Runner {
 public:
  explicit Runner(const RnnArgs& args) : args_(args), op_(args.op) {
    check_arguments();
    find_weights();
  }

  void run();

 private:
  // Directions that advance together; with one thread they run one after the
  // other, so that the weights of only one have to stay in the cache.
  struct Phase {
    int64_t first, count;
  };

  void check_arguments();
  void check_state(const char* name, const TensorView& state, int64_t width) const;
  void find_weights();
  void run_phase(Team& team, int64_t layer, const Phase& phase);
  void start_cells(int64_t layer, int64_t d, int64_t unit_begin, int64_t unit_end) const;
  void input_gates(int64_t layer, int64_t d, int64_t low, int64_t high, int64_t panel_begin, int64_t panel_end) const;
  void gather_rows(Team& team, int64_t layer, int64_t d, int64_t low, int64_t high) const;
  Rows quantized(const float* x, int64_t ldx, int64_t rows, int64_t k, uint8_t* codes, float* scales) const;
  template <class Body>
  void with_format(const Body& body) const;
  void multiply(const Matrix& w, const Rows& x, int64_t panel_begin, int64_t panels, float* out, int64_t out_panel,
                int64_t out_row) const;
  void step(Team& team, int64_t layer, int64_t d, int64_t s, int64_t low, int64_t panel_begin, int64_t panel_end) const;
  void cells(Team& team, int64_t layer, int64_t d, int64_t s, const float* h, int64_t ldh, int64_t row, int64_t rows,
             const float* x_gates, float* out, int64_t panel_begin, int64_t panel_end) const;
  void project(Team& team, int64_t layer, int64_t d, int64_t s) const;
  void finish_cells(int64_t layer, int64_t d, int64_t unit_begin, int64_t unit_end) const;
  void finish_states(int64_t layer, const Phase& phase) const;

  int64_t time(int64_t d, int64_t s) const { return d ? steps_.count - 1 - s : s; }
  const Direction& weights(int64_t layer, int64_t d) const { return parts_[size_t(layer * directions_ + d)]; }
  // The sequence a layer reads or writes.
  Sequence input_of(int64_t layer) const { return layer ? between_[(layer - 1) % 2] : input_; }
  Sequence output_of(int64_t layer) const { return layer + 1 == layers_ ? output_ : between_[layer % 2]; }
  bool is_int8() const { return args_.weights.panels.dtype == DType::int8; }
  // Whether input gates are computed from a copy of the rows: they do not lie
  // as one run, or are quantized.
  bool gathers(int64_t layer) const { return is_int8() || !input_of(layer).is_one_run(steps_.batch); }
  int64_t ld_codes(int64_t k) const { return round_up(k, 64) + tuning::kInt8RowPadding; }
  int64_t width_of(int64_t layer) const { return layer ? directions_ * state_ : input_size_; }

  const RnnArgs& args_;
  const char* op_;
  Steps steps_{};
  int64_t layers_ = 0, directions_ = 1, input_size_ = 0, hidden_ = 0, state_ = 0;
  int64_t panels_ = 0;  // of units
  int groups_ = 4;
  Sequence input_{}, output_{}, between_[2] = {};
  std::vector<Direction> parts_;

  // Scratch of a run.
  int64_t chunk_rows_ = 0;
  float* zeros_ = nullptr;                      // one row of a state
  float* x_gates_[2] = {nullptr, nullptr};      // [direction][panel][row of the chunk][groups][16]
  float* x_rows_[2] = {nullptr, nullptr};       // [direction][row of the chunk][features],
                                                // where the input is no run
  float* c_[2] = {nullptr, nullptr};            // [direction][B][units rounded up]
  float* unprojected_[2] = {nullptr, nullptr};  // [direction][B][units rounded up]
  uint8_t* x_codes_[2] = {nullptr, nullptr};    // [direction][row of the chunk], int8
  float* x_scales_[2] = {nullptr, nullptr};     // [direction][row of the chunk], int8
  uint8_t* h_codes_ = nullptr;                  // [thread][B], int8
  float* h_scales_ = nullptr;                   // [thread][B], int8
  float* projected_ = nullptr;                  // [thread][B][64]
  int64_t projected_size_ = 0;

  decltype(quantize_rows_f32_table.get()) quantize_ = nullptr;
  std::variant<Kernels<float>, Kernels<bf16>, Kernels<int8_t>> kernels_;
};

void Runner::check_state(const char* name, const TensorView& state, int64_t width) const {
  check_dtype(op_, name, state, {DType::float32});
  check_shape(op_, name, state, {layers_ * directions_, steps_.batch, width});
  check_contiguous(op_, name, state);
}

void Runner::check_arguments() {
  const TensorView& x = args_.input;
  layers_ = args_.layers;
  directions_ = args_.bidirectional ? 2 : 1;
  groups_ = gates_of(args_.cell);
  check_dtype(op_, "input", x, {DType::float32});
  check_dtype(op_, "output", args_.output, {DType::float32});
  steps_ = steps_of(op_, x, args_.batch_sizes);
  check(steps_.count > 0, op_, "input is ", describe(x), ", but a sequence must have at least one step");
  input_size_ = x.size(-1);
  check(input_size_ <= 1 || x.stride(-1) == 1, op_, "input must be contiguous in its last dimension");

  check_shape(op_, "h_n", args_.h_n, {layers_ * directions_, steps_.batch, -1});
  state_ = args_.h_n.size(2);
  hidden_ = args_.cell == RnnCell::lstm ? args_.c_n->size(-1) : state_;
  panels_ = panels_of(hidden_, kLanes);
  check(hidden_ >= 1 && state_ >= 1 && state_ <= hidden_, op_, "the state is ", state_, " of ", hidden_, " units wide");
  check_state("h_n", args_.h_n, state_);
  if (args_.h_0) check_state("h_0", *args_.h_0, state_);
  if (args_.c_n) check_state("c_n", *args_.c_n, hidden_);
  if (args_.c_0) check_state("c_0", *args_.c_0, hidden_);
  if (args_.saved) {
    check(layers_ == 1, op_, "saved is for one layer, not ", layers_);
    check_dtype(op_, "saved", *args_.saved, {DType::float32});
    check_contiguous(op_, "saved", *args_.saved);
    check_shape(op_, "saved", *args_.saved, {directions_, panels_, steps_.all_rows(), saved_of(args_.cell), kLanes});
  }
  if (args_.batch_sizes) {
    check_shape(op_, "output", args_.output, {x.size(0), directions_ * state_});
  } else {
    check_shape(op_, "output", args_.output, {steps_.count, steps_.batch, directions_ * state_});
  }
  check(args_.output.stride(-1) == 1 || args_.output.size(-1) == 1, op_,
        "output must be contiguous in its last dimension");
  input_ = sequence_of(x);
  output_ = sequence_of(args_.output);
}

void Runner::find_weights() {
  const RnnWeights& w = args_.weights;
  check_dtype(op_, "panels", w.panels, {DType::float32, DType::bfloat16, DType::int8});
  check_contiguous(op_, "panels", w.panels);
  check_dtype(op_, "floats", w.floats, {DType::float32});
  check_contiguous(op_, "floats", w.floats);
  const int64_t size = w.panels.dtype == DType::float32 ? 4 : w.panels.dtype == DType::bfloat16 ? 2 : 1;
  const int32_t* compensation = nullptr;
  if (is_int8()) {
    check(w.compensation.has_value(), op_, "int8 weights need their compensation");
    check_dtype(op_, "compensation", *w.compensation, {DType::int32});
    check_contiguous(op_, "compensation", *w.compensation);
    compensation = w.compensation->as<int32_t>();
  }
  const float* const floats = w.floats.as<float>();
  int64_t panels_at = 0, floats_at = 0, columns_at = 0;
  const auto take = [&](int64_t k, int64_t columns, int groups, bool has_bias) {
    Matrix matrix{.panels = w.panels.as<char>() + panels_at * size, .k = k, .groups = groups};
    panels_at += columns * (is_int8() ? round_up(k, 4) : k);
    if (is_int8()) {
      matrix.compensation = compensation + columns_at;
      columns_at += columns;
      matrix.scales = floats + floats_at;
      floats_at += columns;
    }
    if (has_bias) {
      matrix.bias = floats + floats_at;
      floats_at += columns;
    }
    return matrix;
  };
  const int64_t columns = panels_ * groups_ * kLanes;
  for (int64_t layer = 0; layer < layers_; ++layer) {
    for (int64_t d = 0; d < directions_; ++d) {
      Direction part;
      part.input = take(width_of(layer), columns, groups_, true);
      part.state = take(state_, columns, groups_, true);
      if (args_.cell != RnnCell::gru) part.state.bias = nullptr;
      if (state_ < hidden_) {
        part.projection = take(hidden_, round_up(state_, kProjectionColumns), 4, false);
      }
      parts_.push_back(part);
    }
  }
  check(w.panels.numel() == panels_at && w.floats.numel() == floats_at &&
            (!is_int8() || w.compensation->numel() == columns_at),
        op_, "the packed weights are ", describe(w.panels), " and ", describe(w.floats), ", but ", layers_,
        " layers of ", hidden_, " units over ", input_size_, " features take ", panels_at, " and ", floats_at);
}

void Runner::run() {
  if (steps_.batch == 0) return;
  if (is_int8()) quantize_ = quantize_rows_f32_table.get();
  with_format([&](auto weight) { kernels_ = find_kernels<decltype(weight)>(); });
  const int64_t step_work = directions_ * steps_.batch * groups_ * hidden_ * state_;
  const int threads = int(std::clamp<int64_t>(step_work / tuning::kRnnWorkPerThread, 1,
                                              std::min<int64_t>(max_threads(), directions_ * panels_)));
  WorkspaceFrame frame;
  const int64_t gate_row = groups_ * kLanes, padded = panels_ * kLanes;
  chunk_rows_ = std::min(steps_.all_rows(), std::max(tuning::kRnnChunkRows, steps_.batch));
  zeros_ = frame.take<float>(size_t(hidden_));
  std::memset(zeros_, 0, size_t(hidden_) * sizeof(float));
  for (int64_t d = 0; d < directions_; ++d) {
    x_gates_[d] = frame.take<float>(size_t(panels_ * chunk_rows_ * gate_row));
    if (is_int8()) {
      const int64_t widest = std::max(input_size_, layers_ > 1 ? directions_ * state_ : 0);
      x_codes_[d] = frame.take<uint8_t>(size_t(chunk_rows_ * ld_codes(widest)));
      x_scales_[d] = frame.take<float>(size_t(chunk_rows_));
    } else if (gathers(0)) {
      x_rows_[d] = frame.take<float>(size_t(chunk_rows_ * input_size_));
    }
    if (args_.cell == RnnCell::lstm) c_[d] = frame.take<float>(size_t(steps_.batch * padded));
    if (state_ < hidden_) unprojected_[d] = frame.take<float>(size_t(steps_.batch * padded));
  }
  if (state_ < hidden_) {
    projected_size_ = steps_.batch * kProjectionColumns;
    projected_ = frame.take<float>(size_t(threads * projected_size_));
  }
  if (is_int8()) {
    h_codes_ = frame.take<uint8_t>(size_t(threads * steps_.batch * ld_codes(hidden_)));
    h_scales_ = frame.take<float>(size_t(threads * steps_.batch));
  }
  const int64_t rows = steps_.all_rows();
  for (int64_t layer = 0; layer + 1 < layers_ && layer < 2; ++layer) {
    const int64_t width = directions_ * state_;
    between_[layer] = {frame.take<float>(size_t(rows * width)), steps_.batch * width, width, steps_.sizes != nullptr};
  }

  parallel_team(threads, [&](Team& team) {
    for (int64_t layer = 0; layer < layers_; ++layer) {
      if (team.count == 1) {
        for (int64_t d = 0; d < directions_; ++d) run_phase(team, layer, {d, 1});
      } else {
        run_phase(team, layer, {0, directions_});
      }
    }
  });
}

void Runner::run_phase(Team& team, int64_t layer, const Phase& phase) {
  // This thread's panels of each direction: a share of all, so that two threads
  // take a direction each.
  int64_t begin[2], end[2];
  for (int64_t i = 0; i < phase.count; ++i) {
    begin[i] = std::clamp<int64_t>(team.begin(phase.count * panels_) - i * panels_, 0, panels_);
    end[i] = std::clamp<int64_t>(team.end(phase.count * panels_) - i * panels_, 0, panels_);
    if (args_.cell == RnnCell::lstm) start_cells(layer, phase.first + i, begin[i] * kLanes, end[i] * kLanes);
  }
  for (int64_t first = 0; first < steps_.count;) {
    // As many steps as fit the chunk; with falling batch sizes the last steps
    // of a reverse direction are the widest.
    int64_t last = first + 1;
    const auto rows = [&](int64_t d, int64_t a,
                          int64_t b) {  // of the steps [a, b) of a direction
      const int64_t low = std::min(time(d, a), time(d, b - 1)), high = std::max(time(d, a), time(d, b - 1));
      return steps_.start(high) + steps_.rows(high) - steps_.start(low);
    };
    while (last < steps_.count && rows(0, first, last + 1) <= chunk_rows_ &&
           rows(directions_ - 1, first, last + 1) <= chunk_rows_) {
      ++last;
    }
    int64_t low[2], high[2];
    for (int64_t i = 0; i < phase.count; ++i) {
      const int64_t d = phase.first + i;
      low[i] = std::min(time(d, first), time(d, last - 1));
      high[i] = std::max(time(d, first), time(d, last - 1)) + 1;
      if (gathers(layer)) gather_rows(team, layer, d, low[i], high[i]);
    }
    if (gathers(layer)) team.barrier();
    for (int64_t i = 0; i < phase.count; ++i) {
      if (begin[i] < end[i]) input_gates(layer, phase.first + i, low[i], high[i], begin[i], end[i]);
    }
    for (int64_t s = first; s < last; ++s) {
      for (int64_t i = 0; i < phase.count; ++i) {
        if (begin[i] < end[i]) step(team, layer, phase.first + i, s, low[i], begin[i], end[i]);
      }
      team.barrier();
      if (state_ < hidden_) {
        for (int64_t i = 0; i < phase.count; ++i) project(team, layer, phase.first + i, s);
        team.barrier();
      }
    }
    first = last;
  }
  for (int64_t i = 0; i < phase.count; ++i) {
    if (c_[i]) finish_cells(layer, phase.first + i, begin[i] * kLanes, end[i] * kLanes);
  }
  if (team.index == 0) finish_states(layer, phase);
}

void Runner::start_cells(int64_t layer, int64_t d, int64_t unit_begin, int64_t unit_end) const {
  const int64_t padded = panels_ * kLanes;
  const int64_t given = args_.c_0 ? std::clamp<int64_t>(hidden_ - unit_begin, 0, unit_end - unit_begin) : 0;
  for (int64_t b = 0; b < steps_.batch; ++b) {
    float* c = c_[d] + b * padded + unit_begin;
    if (given) {
      const int64_t row = (layer * directions_ + d) * steps_.batch + b;
      std::memcpy(c, args_.c_0->as<float>() + row * hidden_ + unit_begin, size_t(given) * sizeof(float));
    }
    std::fill(c + given, c + (unit_end - unit_begin), 0.0f);
  }
}

// The input rows of the steps [low, high) as one run, quantized if the weights
// are; each thread does a share of them.
void Runner::gather_rows(Team& team, int64_t layer, int64_t d, int64_t low, int64_t high) const {
  const Sequence from = input_of(layer);
  const int64_t first = steps_.start(low), count = steps_.start(high - 1) + steps_.rows(high - 1) - first;
  const int64_t begin = team.begin(count), end = team.end(count), k = width_of(layer);
  if (from.is_one_run(steps_.batch)) {  // so it is quantized
    const int64_t ldx = from.distance(steps_.batch);
    quantized(from.at(steps_, low) + begin * ldx, ldx, end - begin, k, x_codes_[d] + begin * ld_codes(k),
              x_scales_[d] + begin);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    const int64_t t = low + row / steps_.batch,
                  b = row % steps_.batch;  // only [T, B, *] is not one run
    const float* x = from.at(steps_, t) + b * from.row;
    if (is_int8()) {
      quantized(x, k, 1, k, x_codes_[d] + row * ld_codes(k), x_scales_[d] + row);
    } else {
      std::memcpy(x_rows_[d] + row * k, x, size_t(k) * sizeof(float));
    }
  }
}

Rows Runner::quantized(const float* x, int64_t ldx, int64_t rows, int64_t k, uint8_t* codes, float* scales) const {
  quantize_({.x = x,
             .ldx = ldx,
             .rows = rows,
             .k = k,
             .codes = codes,
             .ld_codes = ld_codes(k),
             .k_padded = round_up(k, 4),
             .zero = 128,
             .scale = 0,
             .scales = scales});
  return {.codes = codes, .ld_codes = ld_codes(k), .scales = scales, .count = rows};
}

// Calls body(a weight of the format that the weights have).
template <class Body>
void Runner::with_format(const Body& body) const {
  switch (args_.weights.panels.dtype) {
    case DType::int8: return body(int8_t{});
    case DType::bfloat16: return body(bf16{});
    default: return body(float{});
  }
}

// out[panel][row][groups][16] = x times the panels [panel_begin, panel_begin + panels) of w, plus their bias.
void Runner::multiply(const Matrix& w, const Rows& x, int64_t panel_begin, int64_t panels, float* out,
                      int64_t out_panel, int64_t out_row) const {
  with_format([&](auto weight) {
    using Weight = decltype(weight);
    PanelGemmArgs<Weight> args = product<Weight>(w, panel_begin, panels, x);
    args.out = out;
    args.out_panel = out_panel;
    args.out_row = out_row;
    std::get<Kernels<Weight>>(kernels_).gemm(args);
  });
}

void Runner::input_gates(int64_t layer, int64_t d, int64_t low, int64_t high, int64_t panel_begin,
                         int64_t panel_end) const {
  const Sequence from = input_of(layer);
  const int64_t k = width_of(layer), row = groups_ * kLanes, panel = chunk_rows_ * row;
  Rows x{.count = steps_.start(high - 1) + steps_.rows(high - 1) - steps_.start(low)};
  if (is_int8()) {
    x.codes = x_codes_[d];
    x.ld_codes = ld_codes(k);
    x.scales = x_scales_[d];
  } else {
    x.x = gathers(layer) ? x_rows_[d] : from.at(steps_, low);
    x.ldx = gathers(layer) ? k : from.distance(steps_.batch);
  }
  multiply(weights(layer, d).input, x, panel_begin, panel_end - panel_begin, x_gates_[d] + panel_begin * panel, panel,
           row);
}

void Runner::step(Team& team, int64_t layer, int64_t d, int64_t s, int64_t low, int64_t panel_begin,
                  int64_t panel_end) const {
  const Sequence y = output_of(layer);
  const int64_t t = time(d, s), rows = steps_.rows(t);
  const float* x_gates = x_gates_[d] + (steps_.start(t) - steps_.start(low)) * groups_ * kLanes;
  const bool projects = state_ < hidden_;
  float* out = projects ? unprojected_[d] : y.at(steps_, t) + d * state_;
  // Sequences that ran before have their state in the output of their previous
  // step, the others start here.
  const int64_t going = s == 0 ? 0 : std::min(rows, steps_.rows(time(d, s - 1)));
  if (going > 0) {
    const float* before = y.at(steps_, time(d, s - 1)) + d * state_;
    cells(team, layer, d, s, before, y.row, 0, going, x_gates, out, panel_begin, panel_end);
  }
  if (going < rows) {
    const int64_t first = (layer * directions_ + d) * steps_.batch + going;
    const float* before = args_.h_0 ? args_.h_0->as<float>() + first * state_ : zeros_;
    cells(team, layer, d, s, before, args_.h_0 ? state_ : 0, going, rows - going, x_gates, out, panel_begin, panel_end);
  }
}

// One step of the sequences [row, row + rows), whose states begin at h.
void Runner::cells(Team& team, int64_t layer, int64_t d, int64_t s, const float* h, int64_t ldh, int64_t row,
                   int64_t rows, const float* x_gates, float* out, int64_t panel_begin, int64_t panel_end) const {
  const Matrix& w = weights(layer, d).state;
  const int64_t gate_row = w.groups * kLanes, padded = panels_ * kLanes, x_panel = chunk_rows_ * gate_row;
  const int64_t ld_out = state_ < hidden_ ? padded : output_of(layer).row;
  // Each thread quantizes the whole state: to share that would take a second
  // meeting a step.
  const Rows x = is_int8() ? quantized(h, ldh, rows, w.k, h_codes_ + team.index * steps_.batch * ld_codes(hidden_),
                                       h_scales_ + team.index * steps_.batch)
                           : Rows{.x = h, .ldx = ldh, .count = rows};
  const int64_t saved_row = saved_of(args_.cell) * kLanes, saved_panel = steps_.all_rows() * saved_row;
  const int64_t unit = panel_begin * kLanes;
  with_format([&](auto weight) {
    using Weight = decltype(weight);
    RnnStepArgs<Weight> args{.cell = args_.cell,
                             .product = product<Weight>(w, panel_begin, panel_end - panel_begin, x),
                             .units = std::min(panel_end * kLanes, hidden_) - unit,
                             .x_gates = x_gates + panel_begin * x_panel + row * gate_row,
                             .x_panel = x_panel,
                             .x_row = gate_row,
                             .h_before = h + unit,
                             .ld_before = ldh,
                             .c = c_[d] ? c_[d] + row * padded + unit : nullptr,
                             .ldc = padded,
                             .h = out + row * ld_out + unit,
                             .ldh = ld_out,
                             .saved = nullptr,
                             .saved_panel = saved_panel};
    // On odd steps the last panels come first: they are what the step before has left in the cache.
    args.product.backwards = s % 2;
    if (args_.saved) {
      args.saved = args_.saved->as<float>() + (d * panels_ + panel_begin) * saved_panel +
                   (steps_.start(time(d, s)) + row) * saved_row;
    }
    std::get<Kernels<Weight>>(kernels_).step(args);
  });
}

// unprojected [B][H] times the projection -> the state in the output; threads
// share its columns.
void Runner::project(Team& team, int64_t layer, int64_t d, int64_t s) const {
  const Matrix& w = weights(layer, d).projection;
  const Sequence y = output_of(layer);
  const int64_t t = time(d, s), rows = steps_.rows(t), panels = panels_of(state_, kProjectionColumns);
  float* scratch = projected_ + team.index * projected_size_;
  const int64_t padded = panels_ * kLanes;
  const Rows x = is_int8() ? quantized(unprojected_[d], padded, rows, w.k,
                                       h_codes_ + team.index * steps_.batch * ld_codes(hidden_),
                                       h_scales_ + team.index * steps_.batch)
                           : Rows{.x = unprojected_[d], .ldx = padded, .count = rows};
  for (int64_t p = team.begin(panels); p < team.end(panels); ++p) {
    multiply(w, x, p, 1, scratch, 0, kProjectionColumns);
    const int64_t column = p * kProjectionColumns, width = std::min(kProjectionColumns, state_ - column);
    for (int64_t b = 0; b < rows; ++b) {
      std::memcpy(y.at(steps_, t) + b * y.row + d * state_ + column, scratch + b * kProjectionColumns,
                  size_t(width) * sizeof(float));
    }
  }
}

// The last cells of every sequence -> c_n, by the thread they belong to:
// another may have gone on to the next layer.
void Runner::finish_cells(int64_t layer, int64_t d, int64_t unit_begin, int64_t unit_end) const {
  const int64_t count = std::min(unit_end, hidden_) - unit_begin;
  for (int64_t b = 0; count > 0 && b < steps_.batch; ++b) {
    const int64_t row = (layer * directions_ + d) * steps_.batch + b;
    std::memcpy(args_.c_n->as<float>() + row * hidden_ + unit_begin, c_[d] + b * panels_ * kLanes + unit_begin,
                size_t(count) * sizeof(float));
  }
}

// The last states of every sequence -> h_n.
void Runner::finish_states(int64_t layer, const Phase& phase) const {
  const Sequence y = output_of(layer);
  for (int64_t d = phase.first; d < phase.first + phase.count; ++d) {
    int64_t t = d ? 0 : steps_.count - 1;
    for (int64_t b = 0; b < steps_.batch; ++b) {
      while (!d && steps_.rows(t) <= b) --t;  // sorted by length: the next sequence ends here or earlier
      const int64_t row = (layer * directions_ + d) * steps_.batch + b;
      std::memcpy(args_.h_n.as<float>() + row * state_, y.at(steps_, t) + b * y.row + d * state_,
                  size_t(state_) * sizeof(float));
    }
  }
}

}  // namespace

Steps steps_of(const char* op, const TensorView& rows, const std::optional<TensorView>& batch_sizes) {
  if (!batch_sizes) {
    check_shape(op, "input", rows, {-1, -1, -1});
    return {rows.size(0), rows.size(1)};
  }
  check_dtype(op, "batch_sizes", *batch_sizes, {DType::int64});
  check_shape(op, "batch_sizes", *batch_sizes, {-1});
  check_contiguous(op, "batch_sizes", *batch_sizes);
  check_shape(op, "input", rows, {-1, -1});
  Steps steps{batch_sizes->size(0), 0, batch_sizes->as<int64_t>()};
  int64_t sum = 0;
  for (int64_t t = 0; t < steps.count; ++t) {
    const int64_t n = steps.sizes[t];
    check(n >= 1 && (t == 0 || n <= steps.sizes[t - 1]), op, "batch_sizes[", t, "] is ", n,
          ", but they must be at least 1 and never rise");
    steps.starts.push_back(sum);
    sum += n;
  }
  steps.starts.push_back(sum);
  check(sum == rows.size(0), op, "batch_sizes come to ", sum, " rows, but input has ", rows.size(0));
  steps.batch = steps.count ? steps.sizes[0] : 0;
  return steps;
}

void run_rnn(const RnnArgs& args) { Runner(args).run(); }

}  // namespace lamina
