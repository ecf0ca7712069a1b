// Loops over the elements of tensors of one shape that lie differently in memory.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/tensor.h"

namespace lamina {

// Nested loops over N tensors at once, the outermost first. Dimensions of size one are left out, and neighbours that
// every tensor steps through evenly are one loop. Nothing is allocated: a call of one element must not pay for it.
template <int N>
class Loops {
 public:
  static constexpr int kMost = 64;  // of torch as well

  void add(int64_t size, const int64_t (&strides)[N]) {
    if (size == 1) return;
    total_ *= size;
    bool even = count_ > 0;
    for (int t = 0; t < N && even; ++t) even = strides_[count_ - 1][t] == strides[t] * size;
    if (!even) sizes_[count_++] = 1;
    sizes_[count_ - 1] *= size;
    for (int t = 0; t < N; ++t) strides_[count_ - 1][t] = strides[t];
  }

  int count() const { return count_; }
  int64_t size(int loop) const { return sizes_[loop]; }
  int64_t stride(int loop, int tensor) const { return strides_[loop][tensor]; }
  // Elements in all.
  int64_t total() const { return total_; }
  // Of the innermost loop; one element that needs no step if there are no loops.
  int64_t inner() const { return count_ ? sizes_[count_ - 1] : 1; }
  int64_t step(int tensor) const { return count_ ? strides_[count_ - 1][tensor] : 0; }

  void remove(int loop) {
    total_ = 1;
    --count_;
    for (int i = 0; i < count_; ++i) {
      const int from = i < loop ? i : i + 1;
      sizes_[i] = sizes_[from];
      std::copy(strides_[from], strides_[from] + N, strides_[i]);
      total_ *= sizes_[i];
    }
  }

  // Calls body(offsets, count) for the pieces of the elements [begin, end) that lie along the innermost loop.
  template <class Body>
  void pieces(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t i = begin; i < end;) {
      int64_t at[N] = {};
      int64_t rest = i;
      for (int loop = count_ - 1; loop >= 0; --loop) {
        const int64_t index = rest % sizes_[loop];
        rest /= sizes_[loop];
        for (int t = 0; t < N; ++t) at[t] += index * strides_[loop][t];
      }
      const int64_t n = std::min(count_ ? inner() - i % inner() : 1, end - i);
      body(at, n);
      i += n;
    }
  }

 private:
  int count_ = 0;
  int64_t total_ = 1;
  int64_t sizes_[kMost];
  int64_t strides_[kMost][N];
};

inline void check_dimensions(const char* op, const char* what, const TensorView& t) {
  check(t.ndim <= Loops<1>::kMost, op, what, " has ", t.ndim, " dimensions, but must have at most ", Loops<1>::kMost);
}

// [-ndim, ndim) -> [0, ndim); a tensor without dimensions has one of size 1, as in torch.
inline int checked_dim(const char* op, const TensorView& t, int64_t dim) {
  const int64_t dims = std::max(t.ndim, 1);
  check(dim >= -dims && dim < dims, op, "dim is ", dim, ", but must be in [", -dims, ", ", dims - 1, "] for ",
        describe(t));
  return int(dim < 0 ? dim + dims : dim);
}

}  // namespace lamina
