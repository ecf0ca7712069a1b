#include "ops/pool_windows.h"

#include <algorithm>

namespace lamina {

void find_windows(PoolWindow* to, int64_t count, int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                  int64_t dilation, bool include_padding) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = i * stride - padding;
    const int64_t skipped = start < 0 ? (-start + dilation - 1) / dilation : 0;
    const int64_t first = start + skipped * dilation;
    const int64_t inside = first < size ? (size - first + dilation - 1) / dilation : 0;
    const int64_t taps = std::max<int64_t>(0, std::min(kernel - skipped, inside));
    // Padding counts, but not what a window of ceil_mode has beyond it.
    const int64_t padded = std::min(start + kernel, size + padding) - start;
    to[i] = {first, int(taps), int(std::max<int64_t>(1, include_padding ? padded : taps))};
  }
}

void find_adaptive_windows(PoolWindow* to, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i * size / count, end = ((i + 1) * size + count - 1) / count;
    to[i] = {first, int(end - first), int(std::max<int64_t>(1, end - first))};
  }
}

}  // namespace lamina
