#include "ops/lstm.h"

#include "ops/rnn.h"

namespace lamina {

void lstm(const TensorView& input, const std::optional<TensorView>& batch_sizes, const std::optional<TensorView>& h_0,
          const std::optional<TensorView>& c_0, const TensorView& panels, const TensorView& floats, int64_t layers,
          bool bidirectional, const TensorView& output, const TensorView& h_n, const TensorView& c_n,
          const std::optional<TensorView>& saved) {
  run_rnn({.op = "lstm",
           .cell = RnnCell::lstm,
           .input = input,
           .batch_sizes = batch_sizes,
           .h_0 = h_0,
           .c_0 = c_0,
           .weights = {panels, floats, std::nullopt},
           .layers = layers,
           .bidirectional = bidirectional,
           .output = output,
           .h_n = h_n,
           .c_n = c_n,
           .saved = saved});
}

}  // namespace lamina
