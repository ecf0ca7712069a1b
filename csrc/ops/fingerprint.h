// A hash of some elements of each tensor (all, of small ones). Packed weights are kept between calls; this tells when
// somebody has written new values into the originals past torch's version counter, as `parameter.data.copy_()` does.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/tensor.h"

namespace lamina {

uint64_t weight_fingerprint(const std::vector<TensorView>& weights);

}  // namespace lamina
