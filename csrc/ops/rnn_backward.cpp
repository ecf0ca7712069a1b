#include <algorithm>

#include "cpu/kernels/rnn_cell_backward.h"
#include "cpu/tuning/rnn.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/rnn.h"

namespace lamina {

constinit const KernelTable<void(const RnnCellBackwardArgs&)> rnn_cell_backward_table;

namespace {

constexpr int64_t kLanes = kPanelLanes;

RnnCell cell_of(const std::string& name) {
  if (name == "lstm") return RnnCell::lstm;
  if (name == "gru") return RnnCell::gru;
  return name == "rnn_relu" ? RnnCell::relu : RnnCell::tanh;
}

const float* floats_of(const std::optional<TensorView>& t) { return t ? t->as<float>() : nullptr; }

}  // namespace

void rnn_backward(const std::string& name, const std::optional<TensorView>& batch_sizes, const TensorView& output,
                  const std::optional<TensorView>& saved, const std::optional<TensorView>& h_0,
                  const std::optional<TensorView>& c_0, const std::optional<TensorView>& d_output,
                  const TensorView& panels, const TensorView& d_h, const std::optional<TensorView>& direct,
                  const std::optional<TensorView>& d_c, const TensorView& d_x,
                  const std::optional<TensorView>& d_of_state) {
  const std::string op_name = name + "_backward";
  const char* op = op_name.c_str();
  const RnnCell cell = cell_of(name);
  const Steps steps = steps_of(op, output, batch_sizes);
  if (steps.all_rows() == 0) return;
  const int64_t directions = d_h.size(0), batch = steps.batch, rows = steps.all_rows();
  const int64_t hidden = output.size(-1) / directions, gates = gates_of(cell), width = gates * hidden;
  const int64_t count = (hidden + kLanes - 1) / kLanes, padded = count * kLanes, kept = saved_of(cell) * kLanes;
  const auto expect = [&](const char* what, const TensorView& t, std::initializer_list<int64_t> shape) {
    check_dtype(op, what, t, {DType::float32});
    check_contiguous(op, what, t);
    check_shape(op, what, t, shape);
  };
  const auto expect_if = [&](const char* what, const std::optional<TensorView>& t, bool needed,
                             std::initializer_list<int64_t> shape) {
    check(t || !needed, op, what, " is missing");
    if (t) expect(what, *t, shape);
  };
  check_contiguous(op, "output", output);
  check_dtype(op, "output", output, {DType::float32});
  expect_if("saved", saved, kept > 0, {directions, count, rows, saved_of(cell), kLanes});
  expect_if("h_0", h_0, false, {directions, batch, hidden});
  expect_if("c_0", c_0, false, {directions, batch, hidden});
  if (d_output) {
    check_dtype(op, "d_output", *d_output, {DType::float32});
    check_contiguous(op, "d_output", *d_output);
    check(d_output->numel() == output.numel(), op, "d_output is ", describe(*d_output), ", but output ",
          describe(output));
  }
  expect("panels", panels, {directions, count, width, kLanes});
  expect("d_h", d_h, {directions, batch, padded});
  expect_if("direct", direct, cell == RnnCell::gru, {directions, batch, padded});
  expect_if("d_c", d_c, cell == RnnCell::lstm, {directions, batch, padded});
  expect("d_x", d_x, {directions, rows, width});
  expect_if("d_of_state", d_of_state, cell == RnnCell::gru, {directions, rows, width});

  const auto gemm = panel_gemm_f32_table.get();
  const auto backward = rnn_cell_backward_table.get();
  const int threads = int(std::clamp<int64_t>(batch * width * hidden / tuning::kRnnWorkPerThread, 1,
                                              std::min<int64_t>(max_threads(), count)));
  const int64_t ld_output = directions * hidden;
  parallel_team(threads, [&](Team& team) {
    const int64_t begin = team.begin(count), panels_here = team.end(count) - begin, unit = begin * kLanes;
    const int64_t units = std::min(hidden - unit, panels_here * kLanes);
    for (int64_t d = 0; d < directions; ++d) {
      const auto time = [&](int64_t s) { return d ? steps.count - 1 - s : s; };
      float* const state = d_h.as<float>() + d * batch * padded + unit;
      float* const sums = d_x.as<float>() + d * rows * width;
      float* const sums_of_state = d_of_state ? d_of_state->as<float>() + d * rows * width : nullptr;
      float* const direct_state = direct ? direct->as<float>() + d * batch * padded + unit : nullptr;
      float* const cells = d_c ? d_c->as<float>() + d * batch * padded + unit : nullptr;
      const float* const kept_here = saved ? saved->as<float>() + (d * count + begin) * rows * kept : nullptr;
      // What step t gives the states before it: of this thread's units, from all gates.
      const auto give_back = [&](int64_t t) {
        PanelGemmArgs<float> args{};
        args.x = (sums_of_state ? sums_of_state : sums) + steps.start(t) * width;
        args.ldx = width;
        args.rows = steps.rows(t);
        args.k = width;
        args.panels = panels.as<float>() + (d * count + begin) * width * kLanes;
        args.groups = 1;
        args.count = panels_here;
        args.out = state;
        args.out_panel = kLanes;
        args.out_row = padded;
        gemm(args);
      };
      for (int64_t s = steps.count - 1; s >= 0; --s) {
        const int64_t t = time(s);
        if (s + 1 < steps.count) give_back(time(s + 1));
        // As in the forward: sequences that ran before, and those that started here.
        const int64_t going = s == 0 ? 0 : std::min(steps.rows(t), steps.rows(time(s - 1)));
        for (const bool started : {false, true}) {
          const int64_t first = started ? going : 0, last = started ? steps.rows(t) : going;
          if (first == last) continue;
          const int64_t row = steps.start(t) + first, start = (d * batch + first) * hidden + unit;
          const int64_t before = started ? 0 : steps.start(time(s - 1));
          RnnCellBackwardArgs args{.cell = cell,
                                   .rows = last - first,
                                   .units = units,
                                   .d_output = nullptr,
                                   .ld_output = ld_output,
                                   .d_h = state + first * padded,
                                   .direct = direct_state ? direct_state + first * padded : nullptr,
                                   .d_c = cells ? cells + first * padded : nullptr,
                                   .ld_state = padded,
                                   .saved = kept_here ? kept_here + row * kept : nullptr,
                                   .saved_panel = rows * kept,
                                   .c_before = nullptr,
                                   .c_panel = started ? kLanes : rows * kept,
                                   .c_row = started ? hidden : kept,
                                   .h_before = nullptr,
                                   .ld_before = started ? hidden : ld_output,
                                   .h = output.as<float>() + row * ld_output + d * hidden + unit,
                                   .ldh = ld_output,
                                   .d_x = sums + row * width + unit,
                                   .d_of_state = sums_of_state ? sums_of_state + row * width + unit : nullptr,
                                   .hidden = hidden};
          if (d_output) args.d_output = d_output->as<float>() + row * ld_output + d * hidden + unit;
          if (started) {
            args.c_before = c_0 ? floats_of(c_0) + start : nullptr;
            args.h_before = h_0 ? floats_of(h_0) + start : nullptr;
          } else {
            // The cell is the last of what an lstm's step leaves.
            if (cell == RnnCell::lstm) args.c_before = kept_here + before * kept + kept - kLanes;
            args.h_before = output.as<float>() + before * ld_output + d * hidden + unit;
          }
          backward(args);
        }
        team.barrier();
      }
      give_back(time(0));
      for (int64_t b = 0; direct_state && b < batch; ++b) {
        for (int64_t u = 0; u < units; ++u) state[b * padded + u] += direct_state[b * padded + u];
      }
    }
  });
}

}  // namespace lamina
