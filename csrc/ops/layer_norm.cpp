#include "ops/layer_norm.h"

namespace lamina {

void layer_norm(const TensorView& input, const std::vector<int64_t>& normalized_shape,
                const std::optional<TensorView>& weight, const std::optional<TensorView>& bias, double eps,
                const std::optional<TensorView>& residual, const TensorView& out,
                const std::optional<TensorView>& sum) {
  norm_rows({"layer_norm", true, input, normalized_shape, weight, bias, eps, residual, out, sum});
}

}  // namespace lamina
