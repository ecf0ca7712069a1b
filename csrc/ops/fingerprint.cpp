#include "ops/fingerprint.h"

#include <cstring>

#include "ops/checks.h"

namespace lamina {

uint64_t weight_fingerprint(const std::vector<TensorView>& weights) {
  constexpr int64_t kSamples = 24, kSmall = 128;
  uint64_t hash = 14695981039346656037u;
  const auto mix = [&](const char* element, int64_t bytes) {
    uint64_t bits = 0;
    std::memcpy(&bits, element, size_t(bytes));
    hash = (hash ^ bits) * 1099511628211u;
    hash ^= hash >> 32;
  };
  for (const TensorView& w : weights) {
    check_dtype("weight_fingerprint", "weight", w, {DType::float32, DType::bfloat16, DType::int8});
    const int64_t size = w.dtype == DType::float32 ? 4 : w.dtype == DType::bfloat16 ? 2 : 1, count = w.numel();
    if (count <= kSmall && w.is_contiguous()) {
      const char* data = w.as<char>();
      int64_t left = count * size;
      for (; left >= 8; left -= 8, data += 8) mix(data, 8);
      if (left) mix(data, left);
      continue;
    }
    // Odd, so that the samples wander over the last dimensions.
    const int64_t distance = (count / kSamples) | 1;
    for (int64_t i = 0; i < count; i += distance) {
      int64_t rest = i, offset = 0;
      for (int d = w.ndim - 1; d >= 0; rest /= w.size(d), --d) offset += rest % w.size(d) * w.stride(d);
      mix(w.as<char>() + offset * size, size);
    }
  }
  return hash;
}

}  // namespace lamina
