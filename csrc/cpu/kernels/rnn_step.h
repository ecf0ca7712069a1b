// Contract of rnn_step: one step of a recurrent layer for some of its units: the product of the states with their
// weights (panel_gemm.h), and the cells.
//
// A unit's gates are x (of the input: W_i x + b) and s (of the state: W_h h + b).
//
//   lstm, gates i f g o:  c = sigmoid(f) c + sigmoid(i) tanh(g),  h = sigmoid(o) tanh(c),  each gate = x + s
//   gru, gates r z n:     n = tanh(x_n + sigmoid(r) s_n),  h = (1 - sigmoid(z)) n + sigmoid(z) h_before
//   rnn, one gate:        h = tanh(x + s), or its positive part
//
// Each gate is within 3e-7 of the exact function of its sum, and a NaN sum gives NaN states.
//
// For a gradient, a step also leaves what its backward needs: sigmoid(i), sigmoid(f), tanh(g), sigmoid(o) and the new c
// of an lstm, sigmoid(r), sigmoid(z), n and s_n of a gru, nothing of a plain cell.
#pragma once

#include <stdint.h>

#include "cpu/kernels/panel_gemm.h"

namespace lamina {

enum class RnnCell { lstm, gru, tanh, relu };

constexpr int gates_of(RnnCell cell) { return cell == RnnCell::lstm ? 4 : cell == RnnCell::gru ? 3 : 1; }

// How many values of a unit a step leaves for its backward.
constexpr int saved_of(RnnCell cell) { return cell == RnnCell::lstm ? 5 : cell == RnnCell::gru ? 4 : 0; }

template <class Weight>
struct RnnStepArgs {
  RnnCell cell;
  PanelGemmArgs<Weight> product;  // of the states before with the panels of these units; its out is not used
  int64_t units;                  // any number that takes so many panels of 16
  const float* x_gates;           // [panels][rows][gates][16], strides x_panel and x_row
  int64_t x_panel, x_row;
  const float* h_before;  // gru: [rows, units], row stride ld_before
  int64_t ld_before;
  float* c;  // lstm: [rows, units rounded up to 16], row stride ldc
  int64_t ldc;
  float* h;  // [rows, units], row stride ldh
  int64_t ldh;
  float* saved;  // [panels][rows][saved_of(cell)][16], stride saved_panel, or null
  int64_t saved_panel;
};

extern const KernelTable<void(const RnnStepArgs<float>&)> rnn_step_f32_table;
extern const KernelTable<void(const RnnStepArgs<bf16>&)> rnn_step_bf16_table;
extern const KernelTable<void(const RnnStepArgs<int8_t>&)> rnn_step_int8_table;

}  // namespace lamina
