// What a pooling kernel reads for one output coordinate.
#pragma once

#include <stdint.h>

namespace lamina {

// The window of one output coordinate, outside of which nothing is read: input coordinates first, first + step, ...,
// and over how many the mean is taken.
struct PoolWindow {
  int64_t first;
  int count;
  int divisor;
};

}  // namespace lamina
