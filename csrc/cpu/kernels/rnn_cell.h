// Contract of rnn_cell: the state update of recurrent cells, from the sums of their gates.
//
// A unit's gates are x_gates (of the input: W_i x + b) and h_gates (of the state: W_h h + b).
//
//   lstm, gates i f g o:  c = sigmoid(f) c + sigmoid(i) tanh(g),  h = sigmoid(o) tanh(c),  each gate = x + h gates
//   gru, gates r z n:     n = tanh(x_n + sigmoid(r) h_n),  h = (1 - sigmoid(z)) n + sigmoid(z) h_before
//
// Each gate is within 3e-7 of the exact function of its sum, and a NaN sum gives NaN states.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"

namespace lamina {

struct RnnCellArgs {
  int64_t rows;
  int64_t units;         // any number; gates come in panels of 16 units, [units / 16 up][rows][gates][16]
  const float* x_gates;  // strides x_panel and x_row
  int64_t x_panel, x_row;
  const float* h_gates;  // strides h_panel and h_row
  int64_t h_panel, h_row;
  const float* h_before;  // gru: [rows, units], row stride ld_before
  int64_t ld_before;
  float* c;  // lstm: [rows, units rounded up to 16], row stride ldc
  int64_t ldc;
  float* h;  // [rows, units], row stride ldh
  int64_t ldh;
};

extern const KernelTable<void(const RnnCellArgs&)> lstm_cell_table;
extern const KernelTable<void(const RnnCellArgs&)> gru_cell_table;

}  // namespace lamina
