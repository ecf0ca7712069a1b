// What the int8 products have in common: rows of activations as codes on the way in, and the operands of the epilogue
// on the way out.
#pragma once

#include <optional>
#include <string>

#include "cpu/kernels/int8_gemm.h"
#include "ops/quantize_rows.h"
#include "ops/tensor.h"
#include "ops/workspace.h"

namespace lamina {

// 127 * 127 * k must stay below 2^31, or an int32 sum of extreme codes would wrap.
inline constexpr int64_t kInt8MaxK = ((int64_t{1} << 31) - 1) / (127 * 127);

// The same for codes that somebody else made, which may be -128.
inline constexpr int64_t kInt8MaxKOfCodes = ((int64_t{1} << 31) - 1) / (128 * 127);

// x [m, k], and what its scales are.
struct Int8Rows {
  const TensorView* x;
  const TensorView* row_scales;  // of int8 x with a scale for each row, or null
  float scale;                   // else: the one scale, or 0 for one that is found for each row

  // Makes the codes, with an offset, and the scales of rows [begin, end).
  void prepare(int64_t begin, int64_t end, const OffsetCodes& to) const;
};

struct Int8Operands {
  Int8Rows rows;
  const float* w_scales;  // [n]
  const float* bias;      // [n] or null
  EpilogueMatrix residual;
  Activation activation;
  EpilogueMatrix out;
  float out_inverse;

  // The operands of the kernel's epilogue for the block from (row, column) on; what concerns codes and weights is not
  // set.
  Int8GemmArgs epilogue(int64_t row, int64_t column) const;
};

// x [m, k]: float32, bfloat16, or int8 with its scale.
void check_int8_x(const char* op, const TensorView& x, bool has_scale);

// Room for the codes of `rows` rows, with bytes behind each that keep rows out of each other's cache lines.
OffsetCodes take_codes(int64_t rows, int64_t k_padded, WorkspaceFrame& frame);

// The others, checked; a converted bias lives in `frame`. w_scale [n] is checked, x too. See ops/int8_linear.h.
Int8Operands int8_operands(const char* op, const TensorView& x, const TensorView& w_scale,
                           const std::optional<TensorView>& bias, const std::string& activation,
                           const std::optional<TensorView>& residual, const std::optional<TensorView>& x_scale,
                           const std::optional<TensorView>& out_scale, const TensorView& out, WorkspaceFrame& frame);

// A contiguous float32 [n]; returns n.
int64_t check_w_scale(const char* op, const TensorView& scale);

}  // namespace lamina
