#include "ops/rms_norm.h"

namespace lamina {

void rms_norm(const TensorView& input, const std::vector<int64_t>& normalized_shape,
              const std::optional<TensorView>& weight, double eps, const std::optional<TensorView>& residual,
              const TensorView& out, const std::optional<TensorView>& sum) {
  norm_rows({"rms_norm", false, input, normalized_shape, weight, std::nullopt, eps, residual, out, sum});
}

}  // namespace lamina
