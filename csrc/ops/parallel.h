// Work sharing on torch's own OpenMP pool.
//
// libgomp is loaded once per process, under torch's SONAME, so these regions use torch's threads and obey
// torch.set_num_threads. Results never depend on the number of threads: it decides who computes an element, never how.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <exception>

namespace lamina {

// How many threads a region started here would get.
inline int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// Calls body(index) for every index in [0, count), each index on whichever thread is free first.
// For tasks of unequal length; a task should be worth at least a few microseconds.
template <class Body>
void parallel_tasks(int64_t count, const Body& body) {
  const int threads = static_cast<int>(count < max_threads() ? count : max_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
#pragma omp parallel num_threads(threads)
  {
    try {
      for (int64_t i = next++; i < count; i = next++) body(i);
    } catch (...) {
#pragma omp critical
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// Calls body(begin, end) on contiguous shares of [0, count), one per thread, none smaller than `grain`.
template <class Body>
void parallel_ranges(int64_t count, int64_t grain, const Body& body) {
  int64_t shares = grain > 0 ? (count + grain - 1) / grain : count;
  if (shares > max_threads()) shares = max_threads();
  if (count <= 0) return;
  if (shares <= 1) {
    body(int64_t{0}, count);
    return;
  }
  parallel_tasks(shares, [&](int64_t i) { body(count * i / shares, count * (i + 1) / shares); });
}

}  // namespace lamina
