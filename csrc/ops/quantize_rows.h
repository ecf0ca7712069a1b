// Symmetric int8 quantization of rows, by itself and as the first step of the int8 ops.
#pragma once

#include <optional>

#include "ops/tensor.h"

namespace lamina {

// x [m, k] float32 or bfloat16, any strides -> codes [m, k] int8 in [-127, 127], rows contiguous, and scales [m]
// float32, contiguous: each row's max |x| / 127, or the one `scale` [] given for all. A row that holds NaN or infinity
// gets codes of zero and a scale of NaN.
void quantize_rows(const TensorView& x, const std::optional<TensorView>& scale, const TensorView& codes,
                   const TensorView& scales);

// Unsigned codes with an offset of 128, as the fast x86 instructions want them: rows of k_padded bytes, `ld` apart.
struct OffsetCodes {
  uint8_t* codes;
  int64_t ld;
  int64_t k_padded;
  float* scales;  // [m]

  OffsetCodes from(int64_t row) const { return {codes + row * ld, ld, k_padded, scales + row}; }
};

// The same into offset codes; what lies behind k is the code of zero. `scale` is 0 for a scale per row.
void quantize_rows_with_offset(const TensorView& x, float scale, const OffsetCodes& to);

// The value of a scale [], refused with a sentence of `op` about `what` unless it is float32, finite and at least
// 1e-36: below that its inverse is not finite.
float positive_scale(const char* op, const char* what, const TensorView& scale);

}  // namespace lamina
