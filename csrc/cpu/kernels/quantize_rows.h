// Contract of quantize_rows: symmetric quantization of rows to int8, with a scale found per row or one given for all.
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
  uint8_t* codes;  // [rows, k] with row stride ld_codes: round_half_even(x / scale) in [-127, 127], plus `zero`
  int64_t ld_codes;
  int64_t k_padded;  // codes[k, k_padded) are written as the code of zero
  uint8_t zero;      // the code of zero: 0 for int8, 128 for unsigned codes with an offset
  float scale;       // positive: every row's scale; 0: each row's own, max |x| / 127
  float* scales;     // [rows]; NaN, with codes of zero, for a row that holds NaN or infinity
};

// max |x| of n values; NaN if one is NaN. Exact, so that ranges may be taken apart.
extern const KernelTable<float(const float* x, int64_t n)> abs_max_f32_table;
extern const KernelTable<float(const bf16* x, int64_t n)> abs_max_bf16_table;

extern const KernelTable<void(const QuantizeRowsArgs<float>&)> quantize_rows_f32_table;
extern const KernelTable<void(const QuantizeRowsArgs<bf16>&)> quantize_rows_bf16_table;

}  // namespace lamina
