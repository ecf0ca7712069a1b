// Scratch memory for the duration of a call, kept between calls.
//
// Each thread has one workspace. A WorkspaceFrame marks its level, take() hands out 64-byte aligned pieces above it,
// and the frame's end gives them back. After the first calls nothing is allocated any more. The memory is not cleared:
// set_poison(true) fills every piece with 0xff bytes (NaN as float, -1 as integer), so that tests catch reads of memory
// nobody wrote.
#pragma once

#include <cstddef>

namespace lamina {

class WorkspaceFrame {
 public:
  WorkspaceFrame();
  ~WorkspaceFrame();
  WorkspaceFrame(const WorkspaceFrame&) = delete;
  WorkspaceFrame& operator=(const WorkspaceFrame&) = delete;

  // Room for `count` elements and 64 readable bytes behind them, so that vector loads may run over the end.
  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }

  static void set_poison(bool on);
  static bool poisoned();

 private:
  void* take_bytes(size_t bytes);
  size_t block_, used_;
};

}  // namespace lamina
