// The windows of a pooling along one dimension, as torch defines them.
#pragma once

#include "cpu/kernels/pool_window.h"

namespace lamina {

// to: `count` windows of an input of `size`.
void find_windows(PoolWindow* to, int64_t count, int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                  int64_t dilation, bool include_padding);
// Those of adaptive pooling, which share the input out.
void find_adaptive_windows(PoolWindow* to, int64_t count, int64_t size);

}  // namespace lamina
