#include "ops/int8_gru.h"

#include "ops/rnn.h"

namespace lamina {

void int8_gru(const TensorView& input, const std::optional<TensorView>& batch_sizes,
              const std::optional<TensorView>& h_0, const TensorView& panels, const TensorView& floats,
              const TensorView& compensation, int64_t layers, bool bidirectional, const TensorView& output,
              const TensorView& h_n) {
  run_rnn({.op = "int8_gru",
           .cell = RnnCell::gru,
           .input = input,
           .batch_sizes = batch_sizes,
           .h_0 = h_0,
           .c_0 = std::nullopt,
           .weights = {panels, floats, compensation},
           .layers = layers,
           .bidirectional = bidirectional,
           .output = output,
           .h_n = h_n});
}

}  // namespace lamina
