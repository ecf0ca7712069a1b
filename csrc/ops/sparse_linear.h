// A linear layer whose weight is mostly zeros: only the blocks that hold other values are stored and multiplied.
// ops/sparse_format.h has the packed form; patterns are "unstructured", "2x1" and "4x1".
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/tensor.h"

namespace lamina {

// Bytes of the packed form of weight [n, k], float32 or bfloat16, any strides.
int64_t sparse_linear_packed_size(const TensorView& weight, const std::string& pattern);

// weight -> data uint8 [sparse_linear_packed_size].
void sparse_linear_pack(const TensorView& weight, const std::string& pattern, const TensorView& data);

// The inverse: data -> weight [n, k] of the packed dtype, contiguous.
void sparse_linear_unpack(const TensorView& data, const TensorView& weight);

// What a packed weight says of itself, after a check of every index in it: the pattern, the values' dtype, and n, k,
// the number of blocks and of nonzero values.
struct SparseLinearInfo {
  std::string pattern, dtype;
  int64_t n, k, blocks, nonzeros;
};
SparseLinearInfo sparse_linear_info(const TensorView& data);

// x [m, k] float32 or bfloat16, any strides; data as packed (its sections are trusted, see sparse_linear_info); bias
// [n] float32 or bfloat16; out [m, n] of x's dtype, rows contiguous; activation as in int8_linear.
void sparse_linear(const TensorView& x, const TensorView& data, const std::optional<TensorView>& bias,
                   const std::string& activation, const TensorView& out);

}  // namespace lamina
