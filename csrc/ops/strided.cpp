#include "ops/strided.h"

namespace lamina {

int collapse_dims(int ndim, const int64_t* shape, int operands, const int64_t (*strides)[kMostDims], int64_t* sizes,
                  int64_t (*walked)[kMostDims]) {
  // By insertion, from the last dimension on: tensors come nearly sorted.
  int order[kMostDims];
  int count = 0;
  for (int dim = ndim - 1; dim >= 0; --dim) {
    if (shape[dim] == 1) continue;
    int at = count++;
    for (; at > 0 && strides[0][order[at - 1]] > strides[0][dim]; --at) order[at] = order[at - 1];
    order[at] = dim;
  }
  int dims = 0;
  for (int i = 0; i < count; ++i) {
    const int dim = order[i];
    bool same = dims > 0;
    for (int o = 0; same && o < operands; ++o) {
      same = strides[o][dim] == walked[o][dims - 1] * sizes[dims - 1];
    }
    if (same) {
      sizes[dims - 1] *= shape[dim];
      continue;
    }
    sizes[dims] = shape[dim];
    for (int o = 0; o < operands; ++o) walked[o][dims] = strides[o][dim];
    ++dims;
  }
  if (dims == 0) {
    sizes[0] = 1;
    for (int o = 0; o < operands; ++o) walked[o][0] = 1;
    dims = 1;
  }
  return dims;
}

bool repeats_memory(const TensorView& t) {
  for (int d = 0; d < t.ndim; ++d) {
    if (t.strides[d] == 0 && t.shape[d] > 1) return true;
  }
  return false;
}

}  // namespace lamina
