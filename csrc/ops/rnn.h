// What the recurrent ops share: layers, directions and steps around the kernels panel_gemm and rnn_step.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels/rnn_step.h"
#include "ops/tensor.h"

namespace lamina {

// Weights of all layers, packed: per layer and direction first the panels and then the floats of each matrix, in the
// order W_ih, W_hh, W_hr. With G gates (4 of an lstm, 3 of a gru, else 1) and U = H / 16 rounded up:
//
//   panels: W_ih [U][I of the layer][G][16], W_hh [U][R][G][16], and for R < H W_hr [R / 64 rounded up][H][4][16],
//           float32 or bfloat16; int8 codes have k in groups of four, [..][K / 4 rounded up][G][16][4]
//   floats: int8 only, the scales of the columns of a matrix; then their bias (none of W_hr), all float32. The biases
//           of W_ih and W_hh are joined in the first, but for a gru's n gate, which keeps both
//   compensation: int8 only, 128 * sum_k code of each column ([NOTE] s8s8 compensation in cpu/kernels/int8_gemm.h)
//
// Units that do not exist are zero.
struct RnnWeights {
  TensorView panels, floats;
  std::optional<TensorView> compensation;
};

// input: float32 [T, B, I] with last stride 1, or packed sequences [N, I] with batch_sizes [T] int64: the rows of step
// t are the first batch_sizes[t] sequences, longest first. h_0, c_0: [layers * directions, B, R] and [.., B, H],
// contiguous, zeros when absent. output: [T, B, directions * R] with last stride 1, or [N, directions * R]. h_n, c_n as
// h_0, c_0, contiguous. R, the width of the state, is H, or less with a projection (lstm).
//
// With int8 weights the rows of the input and of the state are quantized at every step, each with its own scale; sums
// are exact. Gates and states are float32 whatever the weights are.
struct RnnArgs {
  const char* op;
  RnnCell cell;
  TensorView input;
  std::optional<TensorView> batch_sizes, h_0, c_0;
  RnnWeights weights;
  int64_t layers;
  bool bidirectional;
  TensorView output, h_n;
  std::optional<TensorView> c_n = {};    // lstm
  std::optional<TensorView> saved = {};  // what a gradient needs, of one layer: rnn_step.h, [directions][U][N][..][16]
};

// Which sequences run at a step, and where the rows of the steps begin.
struct Steps {
  int64_t count, batch;
  const int64_t* sizes = nullptr;    // null: all sequences run all steps
  std::vector<int64_t> starts = {};  // of `sizes`, and where the last ends

  int64_t rows(int64_t t) const { return sizes ? sizes[t] : batch; }
  int64_t start(int64_t t) const { return sizes ? starts[size_t(t)] : t * batch; }
  int64_t all_rows() const { return start(count); }
};

// Of rows [T, B, *], or packed [N, *].
Steps steps_of(const char* op, const TensorView& rows, const std::optional<TensorView>& batch_sizes);

void run_rnn(const RnnArgs& args);

// The gradient of one layer of "lstm", "gru", "rnn_tanh" or "rnn_relu" up to the sums of its gates; what is left are
// products of whole matrices.
//
// output: of the layer, [T, B, directions * H] or packed [N, directions * H], contiguous. saved: what the forward left
// (lstm and gru). h_0, c_0: [directions, B, H], zeros when absent. d_output: as output, or absent. panels: W_hh
// transposed, [directions][U][G * H][16]. d_h: [directions, B, 16 U], the gradient of h_n, becomes that of h_0; d_c of
// an lstm likewise; direct: scratch of a gru, the same shape. d_x: [directions, N, G * H]; d_of_state: of a gru, the
// gradient of what W_hh gives, which in other cells is d_x too.
void rnn_backward(const std::string& cell, const std::optional<TensorView>& batch_sizes, const TensorView& output,
                  const std::optional<TensorView>& saved, const std::optional<TensorView>& h_0,
                  const std::optional<TensorView>& c_0, const std::optional<TensorView>& d_output,
                  const TensorView& panels, const TensorView& d_h, const std::optional<TensorView>& direct,
                  const std::optional<TensorView>& d_c, const TensorView& d_x,
                  const std::optional<TensorView>& d_of_state);

}  // namespace lamina
