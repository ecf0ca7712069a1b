// Plain recurrent network (relu) over whole sequences: all layers, directions and steps in one call. See ops/rnn.h for
// the layouts and cpu/kernels/rnn_step.h for the equations.
#pragma once

#include <optional>

#include "ops/tensor.h"

namespace lamina {

void rnn_relu(const TensorView& input, const std::optional<TensorView>& batch_sizes,
              const std::optional<TensorView>& h_0, const TensorView& panels, const TensorView& floats, int64_t layers,
              bool bidirectional, const TensorView& output, const TensorView& h_n);

}  // namespace lamina
