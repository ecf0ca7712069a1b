// Rows on their way into L2 while a kernel works on others.
#pragma once

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

// Fetches rows into L2 that will soon be written or read, a few at each step: they may lie a page apart (heads of one
// merged projection), where no hardware prefetcher follows, and stores that miss hold up what comes after them.
class Prefetch {
 public:
  // [rows, row_bytes], `stride` bytes apart; `writes`: they are to be written.
  void add(const void* first, int64_t stride, int64_t row_bytes, int64_t rows, bool writes) {
    if (rows > 0) parts_[count_++] = {static_cast<const char*>(first), stride, row_bytes, rows, writes};
    rows_ += rows;
  }
  void set_steps(int64_t steps) { rows_per_step_ = (rows_ + steps - 1) / steps; }

  LAMINA_INLINE void step() {
    for (int64_t i = 0; i < rows_per_step_ && part_ < count_; ++i) {
      Part& p = parts_[part_];
      for (int64_t byte = 0; byte < p.row_bytes; byte += 64) {
        if (p.writes) {
          __builtin_prefetch(p.row + byte, 1, 2);
        } else {
          __builtin_prefetch(p.row + byte, 0, 2);
        }
      }
      p.row += p.stride;
      if (--p.rows == 0) ++part_;
    }
  }

 private:
  struct Part {
    const char* row;
    int64_t stride, row_bytes, rows;
    bool writes;
  };
  Part parts_[4];
  int count_ = 0, part_ = 0;
  int64_t rows_ = 0, rows_per_step_ = 0;
};

}  // namespace
}  // namespace lamina::LAMINA_ISA
