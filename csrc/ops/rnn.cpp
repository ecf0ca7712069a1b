#include "ops/rnn.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/kernels/panel_gemm.h"
#include "cpu/kernels/rnn_cell.h"
#include "cpu/tuning.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const PanelGemmArgs&)> panel_gemm_table;
constinit const KernelTable<void(const RnnCellArgs&)> lstm_cell_table;
constinit const KernelTable<void(const RnnCellArgs&)> gru_cell_table;

namespace {

constexpr int64_t kLanes = kPanelLanes;
constexpr int64_t kProjectionColumns = 4 * kLanes;

int64_t panels_of(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

// A matrix in panels, and the bias of its columns.
struct Matrix {
  const float* panels = nullptr;
  const float* bias = nullptr;
  int64_t k = 0;
  int groups = 4;
};

struct Direction {
  Matrix input, state, projection;
};

// Which sequences run at a step, and where the rows of the steps begin.
struct Steps {
  int64_t count, batch;
  const int64_t* sizes = nullptr;  // null: all sequences run all steps
  std::vector<int64_t> starts;     // of `sizes`

  int64_t rows(int64_t t) const { return sizes ? sizes[t] : batch; }
  int64_t start(int64_t t) const { return sizes ? starts[size_t(t)] : t * batch; }
};

// Rows of floats by step and sequence: [T, B, *] with any strides, or packed.
struct Sequence {
  float* data;
  int64_t step, row;
  bool packed;

  float* at(const Steps& steps, int64_t t) const { return data + (packed ? steps.start(t) * row : t * step); }
  // Whether the rows of consecutive steps are one run, and their distance in it.
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
  // Directions that advance together; with one thread they run one after the other, so that the weights of only one
  // have to stay in the cache.
  struct Phase {
    int64_t first, count;
  };

  void check_arguments();
  void check_state(const char* name, const TensorView& state, int64_t width) const;
  void find_weights();
  void run_phase(Team& team, int64_t layer, const Phase& phase);
  void start_cells(int64_t layer, int64_t d, int64_t unit_begin, int64_t unit_end) const;
  void input_gates(int64_t layer, int64_t d, int64_t low, int64_t high, int64_t panel_begin, int64_t panel_end) const;
  void copy_rows(Team& team, const Sequence& from, int64_t low, int64_t high, float* to) const;
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
  float* x_rows_[2] = {nullptr, nullptr};       // [direction][row of the chunk][features], where the input is no run
  float* c_[2] = {nullptr, nullptr};            // [direction][B][units rounded up]
  float* unprojected_[2] = {nullptr, nullptr};  // [direction][B][units rounded up]
  float* h_gates_ = nullptr;                    // [thread]
  float* projected_ = nullptr;                  // [thread][B][64]
  int64_t h_gates_size_ = 0, projected_size_ = 0;

  decltype(panel_gemm_table.get()) gemm_ = nullptr;
  decltype(lstm_cell_table.get()) cell_ = nullptr;
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
  groups_ = args_.cell == RnnCell::lstm ? 4 : 3;
  check_dtype(op_, "input", x, {DType::float32});
  check_dtype(op_, "output", args_.output, {DType::float32});
  if (args_.batch_sizes) {
    const TensorView& sizes = *args_.batch_sizes;
    check_dtype(op_, "batch_sizes", sizes, {DType::int64});
    check_shape(op_, "batch_sizes", sizes, {-1});
    check_contiguous(op_, "batch_sizes", sizes);
    check_shape(op_, "input", x, {-1, -1});
    steps_.count = sizes.size(0);
    steps_.sizes = sizes.as<int64_t>();
    int64_t sum = 0;
    for (int64_t t = 0; t < steps_.count; ++t) {
      const int64_t n = steps_.sizes[t];
      check(n >= 1 && (t == 0 || n <= steps_.sizes[t - 1]), op_, "batch_sizes[", t, "] is ", n,
            ", but they must be at least 1 and never rise");
      steps_.starts.push_back(sum);
      sum += n;
    }
    steps_.starts.push_back(sum);
    check(sum == x.size(0), op_, "batch_sizes come to ", sum, " rows, but input has ", x.size(0));
    steps_.batch = steps_.count ? steps_.sizes[0] : 0;
  } else {
    check_shape(op_, "input", x, {-1, -1, -1});
    steps_.count = x.size(0);
    steps_.batch = x.size(1);
  }
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
  check_dtype(op_, "weights", args_.weights, {DType::float32});
  check_contiguous(op_, "weights", args_.weights);
  const float* const begin = args_.weights.as<float>();
  const float* at = begin;
  const int64_t width = panels_ * groups_ * kLanes;
  const auto take = [&](int64_t k) {
    const Matrix matrix{at, at + k * width, k, groups_};
    at += (k + 1) * width;
    return matrix;
  };
  for (int64_t layer = 0; layer < layers_; ++layer) {
    for (int64_t d = 0; d < directions_; ++d) {
      Direction part;
      part.input = take(width_of(layer));
      part.state = take(state_);
      if (args_.cell == RnnCell::lstm) part.state.bias = nullptr;
      if (state_ < hidden_) {
        part.projection = {at, nullptr, hidden_, 4};
        at += panels_of(state_, kProjectionColumns) * hidden_ * kProjectionColumns;
      }
      parts_.push_back(part);
    }
  }
  check(args_.weights.numel() == at - begin, op_, "weights hold ", args_.weights.numel(), " numbers, but ", layers_,
        " layers of ", hidden_, " units over ", input_size_, " features take ", at - begin);
}

void Runner::run() {
  if (steps_.batch == 0) return;
  gemm_ = panel_gemm_table.get();
  cell_ = args_.cell == RnnCell::lstm ? lstm_cell_table.get() : gru_cell_table.get();

  const int64_t step_work = directions_ * steps_.batch * groups_ * hidden_ * state_;
  const int threads = int(std::clamp<int64_t>(step_work / tuning::kRnnWorkPerThread, 1,
                                              std::min<int64_t>(max_threads(), directions_ * panels_)));
  WorkspaceFrame frame;
  const int64_t gate_row = groups_ * kLanes, padded = panels_ * kLanes;
  chunk_rows_ = std::min(steps_.start(steps_.count - 1) + steps_.rows(steps_.count - 1),
                         std::max(tuning::kRnnChunkRows, steps_.batch));
  zeros_ = frame.take<float>(size_t(hidden_));
  std::memset(zeros_, 0, size_t(hidden_) * sizeof(float));
  for (int64_t d = 0; d < directions_; ++d) {
    x_gates_[d] = frame.take<float>(size_t(panels_ * chunk_rows_ * gate_row));
    if (!input_.is_one_run(steps_.batch)) x_rows_[d] = frame.take<float>(size_t(chunk_rows_ * input_size_));
    if (args_.cell == RnnCell::lstm) c_[d] = frame.take<float>(size_t(steps_.batch * padded));
    if (state_ < hidden_) unprojected_[d] = frame.take<float>(size_t(steps_.batch * padded));
  }
  // At least one panel of gates for all sequences, and whole cache lines, so that threads share none.
  h_gates_size_ = std::max<int64_t>(steps_.batch * gate_row, tuning::kRnnGateBytes / int64_t(sizeof(float)));
  h_gates_ = frame.take<float>(size_t(threads * h_gates_size_));
  if (state_ < hidden_) {
    projected_size_ = steps_.batch * kProjectionColumns;
    projected_ = frame.take<float>(size_t(threads * projected_size_));
  }
  const int64_t rows = steps_.sizes ? steps_.starts.back() : steps_.count * steps_.batch;
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
  // This thread's panels of each direction: a share of all, so that two threads take a direction each.
  int64_t begin[2], end[2];
  for (int64_t i = 0; i < phase.count; ++i) {
    begin[i] = std::clamp<int64_t>(team.begin(phase.count * panels_) - i * panels_, 0, panels_);
    end[i] = std::clamp<int64_t>(team.end(phase.count * panels_) - i * panels_, 0, panels_);
    if (args_.cell == RnnCell::lstm) start_cells(layer, phase.first + i, begin[i] * kLanes, end[i] * kLanes);
  }
  const Sequence x = input_of(layer);
  for (int64_t first = 0; first < steps_.count;) {
    // As many steps as fit the chunk; with falling batch sizes the last steps of a reverse direction are the widest.
    int64_t last = first + 1;
    const auto rows = [&](int64_t d, int64_t a, int64_t b) {  // of the steps [a, b) of a direction
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
      if (!x.is_one_run(steps_.batch)) copy_rows(team, x, low[i], high[i], x_rows_[d]);
    }
    if (!x.is_one_run(steps_.batch)) team.barrier();
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

// The rows of the steps [low, high) as one run; each thread copies a share of them.
void Runner::copy_rows(Team& team, const Sequence& from, int64_t low, int64_t high, float* to) const {
  const int64_t first = steps_.start(low), count = steps_.start(high - 1) + steps_.rows(high - 1) - first;
  for (int64_t row = team.begin(count); row < team.end(count); ++row) {
    const int64_t t = low + row / steps_.batch, b = row % steps_.batch;  // only [T, B, *] is not one run
    std::memcpy(to + row * input_size_, from.at(steps_, t) + b * from.row, size_t(input_size_) * sizeof(float));
  }
}

void Runner::input_gates(int64_t layer, int64_t d, int64_t low, int64_t high, int64_t panel_begin,
                         int64_t panel_end) const {
  const Sequence x = input_of(layer);
  const bool run = x.is_one_run(steps_.batch);
  const Matrix& w = weights(layer, d).input;
  const int64_t rows = steps_.start(high - 1) + steps_.rows(high - 1) - steps_.start(low);
  const int64_t row = w.groups * kLanes, panel = chunk_rows_ * row;
  gemm_({.x = run ? x.at(steps_, low) : x_rows_[d],
         .ldx = run ? x.distance(steps_.batch) : input_size_,
         .rows = rows,
         .k = w.k,
         .panels = w.panels + panel_begin * w.k * row,
         .groups = w.groups,
         .count = panel_end - panel_begin,
         .backwards = false,
         .bias = w.bias + panel_begin * row,
         .out = x_gates_[d] + panel_begin * panel,
         .out_panel = panel,
         .out_row = row});
}

void Runner::step(Team& team, int64_t layer, int64_t d, int64_t s, int64_t low, int64_t panel_begin,
                  int64_t panel_end) const {
  const Sequence y = output_of(layer);
  const int64_t t = time(d, s), rows = steps_.rows(t);
  const float* x_gates = x_gates_[d] + (steps_.start(t) - steps_.start(low)) * groups_ * kLanes;
  const bool projects = state_ < hidden_;
  float* out = projects ? unprojected_[d] : y.at(steps_, t) + d * state_;
  // Sequences that ran before have their state in the output of their previous step, the others start here.
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
  float* h_gates = h_gates_ + team.index * h_gates_size_;
  const int64_t together = std::max<int64_t>(1, h_gates_size_ / (rows * gate_row));
  // On odd steps the last panels come first: they are what the step before has left in the cache.
  const bool backwards = s % 2;
  for (int64_t done = 0; done < panel_end - panel_begin; done += together) {
    const int64_t count = std::min(together, panel_end - panel_begin - done);
    const int64_t p = backwards ? panel_end - done - count : panel_begin + done;
    gemm_({.x = h,
           .ldx = ldh,
           .rows = rows,
           .k = w.k,
           .panels = w.panels + p * w.k * gate_row,
           .groups = w.groups,
           .count = count,
           .backwards = backwards,
           .bias = w.bias ? w.bias + p * gate_row : nullptr,
           .out = h_gates,
           .out_panel = rows * gate_row,
           .out_row = gate_row});
    const int64_t unit = p * kLanes;
    cell_({.rows = rows,
           .units = std::min(count * kLanes, hidden_ - unit),
           .x_gates = x_gates + p * x_panel + row * gate_row,
           .x_panel = x_panel,
           .x_row = gate_row,
           .h_gates = h_gates,
           .h_panel = rows * gate_row,
           .h_row = gate_row,
           .h_before = h + unit,
           .ld_before = ldh,
           .c = c_[d] ? c_[d] + row * padded + unit : nullptr,
           .ldc = padded,
           .h = out + row * ld_out + unit,
           .ldh = ld_out});
  }
}

// unprojected [B][H] times the projection -> the state in the output; threads share its columns.
void Runner::project(Team& team, int64_t layer, int64_t d, int64_t s) const {
  const Matrix& w = weights(layer, d).projection;
  const Sequence y = output_of(layer);
  const int64_t t = time(d, s), rows = steps_.rows(t), panels = panels_of(state_, kProjectionColumns);
  float* scratch = projected_ + team.index * projected_size_;
  for (int64_t p = team.begin(panels); p < team.end(panels); ++p) {
    gemm_({.x = unprojected_[d],
           .ldx = panels_ * kLanes,
           .rows = rows,
           .k = w.k,
           .panels = w.panels + p * w.k * kProjectionColumns,
           .groups = w.groups,
           .count = 1,
           .backwards = false,
           .bias = nullptr,
           .out = scratch,
           .out_panel = 0,
           .out_row = kProjectionColumns});
    const int64_t column = p * kProjectionColumns, width = std::min(kProjectionColumns, state_ - column);
    for (int64_t b = 0; b < rows; ++b) {
      std::memcpy(y.at(steps_, t) + b * y.row + d * state_ + column, scratch + b * kProjectionColumns,
                  size_t(width) * sizeof(float));
    }
  }
}

// The last cells of every sequence -> c_n, by the thread they belong to: another may have gone on to the next layer.
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

void run_rnn(const RnnArgs& args) { Runner(args).run(); }

uint64_t rnn_fingerprint(const std::vector<TensorView>& weights) {
  constexpr int64_t kSamples = 64, kSmall = 4096;
  uint64_t hash = 14695981039346656037u;
  const auto mix = [&](const char* element, int64_t bytes) {
    uint64_t bits = 0;
    std::memcpy(&bits, element, size_t(bytes));
    hash = (hash ^ bits) * 1099511628211u;
    hash ^= hash >> 32;
  };
  for (const TensorView& w : weights) {
    check_dtype("rnn_fingerprint", "weight", w, {DType::float32, DType::bfloat16});
    const int64_t size = w.dtype == DType::float32 ? 4 : 2, count = w.numel();
    if (count <= kSmall && w.is_contiguous()) {
      const char* data = w.as<char>();
      int64_t left = count * size;
      for (; left >= 8; left -= 8, data += 8) mix(data, 8);
      if (left) mix(data, left);
      continue;
    }
    const int64_t columns = w.ndim ? w.size(-1) : 1, column_stride = w.ndim ? w.stride(-1) : 0;
    const int64_t row_stride = w.ndim == 2 ? w.stride(0) : 0;
    // Odd, so that the samples wander over the columns.
    const int64_t distance = (count / kSamples) | 1;
    for (int64_t i = 0; i < count; i += distance) {
      mix(w.as<char>() + (i / columns * row_stride + i % columns * column_stride) * size, size);
    }
  }
  return hash;
}

}  // namespace lamina
