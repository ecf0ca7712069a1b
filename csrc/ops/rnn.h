// What the recurrent ops share: layers, directions and steps around the kernels
// panel_gemm and rnn_cell.
#pragma once

#include <optional>
#include <vector>

#include "ops/tensor.h"

namespace lamina {

enum class RnnCell { lstm, gru };

// input: float32 [T, B, I] with last stride 1, or packed sequences [N, I] with
// batch_sizes [T] int64: the rows of step t are the first batch_sizes[t]
// sequences, longest first. h_0, c_0: [layers * directions, B, R] and [.., B,
// H], contiguous, zeros when absent. output: [T, B, directions * R] with last
// stride 1, or [N, directions * R]. h_n, c_n as h_0, c_0, contiguous. R, the
// width of the state, is H, or less with a projection (lstm).
//
// weights: float32, one run of pieces, layer by layer, direction by direction.
// With G = 4 (lstm) or 3 (gru) gates and U = H / 16 rounded up:
//   input weights [U][I of the layer][G][16], their bias [U][G][16], state
//   weights [U][R][G][16], their bias [U][G][16], and for R < H the projection
//   [R / 64 rounded up][H][4][16]; units that do not exist are zero.
// The lstm's second bias is part of the first (and zero here); the gru's n gate
// keeps its own.
//
// int8: codes are the same matrices in the same order, k in groups of four:
// [U][K / 4 rounded up][G][16][4]; compensation their 128 * sum_k code by
// column ([NOTE] s8s8 compensation in cpu/kernels/int8_gemm.h); weights hold
// the scales and the bias of the columns of each matrix. The rows of the input
// and of the state are quantized at every step, each with its own scale; sums
// are exact, gates and states float32.
struct RnnArgs {
  const char* op;
  RnnCell cell;
  TensorView input;
  std::optional<TensorView> batch_sizes, h_0, c_0;
  TensorView weights;
  std::optional<TensorView> codes, compensation;  // int8
  int64_t layers;
  bool bidirectional;
  TensorView output, h_n;
  std::optional<TensorView> c_n;  // lstm
};

void run_rnn(const RnnArgs& args);

// A hash of some elements of each tensor (all, of small ones). Packed weights
// are kept between calls; this tells when somebody has written new values into
// the originals past torch's version counter, as `parameter.data.copy_()` does.
uint64_t rnn_fingerprint(const std::vector<TensorView>& weights);

}  // namespace lamina
