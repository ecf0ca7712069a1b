// Contract of quantize_rows: symmetric dynamic quantization of rows to int8.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

template <class T>
struct QuantizeRowsArgs {
  const T* x;  // [rows, k], row stride ldx, last stride 1
  int64_t ldx;
  int64_t rows, k;
  uint8_t* codes;  // [rows, k] with row stride ld_codes: round(x / scale) + 128
  int64_t ld_codes;
  int64_t k_padded;  // codes[k, k_padded) are written as 128, the code of zero
  float* scales;     // [rows]: max |x| of the row / 127; NaN if the row holds NaN or infinity
};

extern const KernelTable<void(const QuantizeRowsArgs<float>&)> quantize_rows_f32_table;
extern const KernelTable<void(const QuantizeRowsArgs<bf16>&)> quantize_rows_bf16_table;

}  // namespace lamina
