// Contract of rnn_cell_backward: the gradient of one step's cells (rnn_step.h), for some of their units.
//
// With dh the gradient of the step's h, what the steps after it and the output give:
//
//   lstm   dc += dh o (1 - tanh(c)^2);  d_i = dc g i (1 - i),  d_f = dc c_before f (1 - f),  d_g = dc i (1 - g^2),
//          d_o = dh tanh(c) o (1 - o);  then dc = dc f
//   gru    d_n = dh (1 - z) (1 - n^2),  d_z = dh (h_before - n) z (1 - z),  d_r = d_n s_n r (1 - r), and d_n r of s_n;
//          direct = dh z, what h_before gets beside the product with the weights
//   rnn    dh (1 - h^2), or dh where h > 0
#pragma once

#include "cpu/kernels/rnn_step.h"

namespace lamina {

struct RnnCellBackwardArgs {
  RnnCell cell;
  int64_t rows, units;    // from a multiple of 16 units on
  const float* d_output;  // [rows, units], row stride ld_output, or null
  int64_t ld_output;
  const float* d_h;  // [rows, units rounded up to 16], row stride ld_state: what the steps after it give
  float* direct;     // gru, the same layout: read, added to d_h, and written for the step before
  float* d_c;        // lstm, the same layout: read and written
  int64_t ld_state;
  const float* saved;  // as rnn_step left it, strides saved_panel and saved_of(cell) * 16
  int64_t saved_panel;
  const float* c_before;  // lstm: [units / 16 up][rows][16], strides c_panel and c_row; null for zeros
  int64_t c_panel, c_row;
  const float* h_before;  // gru: [rows, units], row stride ld_before; null for zeros
  int64_t ld_before;
  const float* h;  // plain cells: [rows, units], row stride ldh
  int64_t ldh;
  float* d_x;         // [rows, gates, hidden], row stride gates * hidden: gradient of the gates' sums
  float* d_of_state;  // gru: the same for the part of the state; else null
  int64_t hidden;
};

extern const KernelTable<void(const RnnCellBackwardArgs&)> rnn_cell_backward_table;

}  // namespace lamina
