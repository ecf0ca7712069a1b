// Element types that C++ has no name for, as they lie in memory.
#pragma once

#include <stdint.h>

namespace lamina {

// bfloat16: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

// IEEE half precision.
struct f16 {
  uint16_t bits;
};

}  // namespace lamina
