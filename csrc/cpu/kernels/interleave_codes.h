// Contract of interleave_codes: three planes of codes become pixels, the first layer's input in NHWC.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"

namespace lamina {

struct InterleaveCodesArgs {
  const int8_t* planes[3];
  int64_t pixels;
  int8_t* to;  // [pixels][3]
};

extern const KernelTable<void(const InterleaveCodesArgs&)> interleave_codes_table;

}  // namespace lamina
