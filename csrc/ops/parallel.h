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

// Calls body(index) for every index in [0, count): the first ones on the thread of that index, so that call after call
// a thread finds in its caches what it read and wrote before, the others on whichever thread is free first.
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
      const int64_t team = omp_get_num_threads();
      for (int64_t i = omp_get_thread_num(); i < count; i = team + next++) body(i);
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

// The threads of one parallel_team call, as one of them sees it.
class Team {
 public:
  // How often a thread has come to the barrier, each on a cache line that only its own writes.
  struct alignas(64) Arrivals {
    std::atomic<uint32_t> count{0};
  };
  static constexpr int kMost = 64;

  Team(Arrivals* arrivals, int index, int count) : index(index), count(count), arrivals_(arrivals) {}

  const int index, count;

  // Returns when all threads have come here; what any wrote before is visible to all. Spins for some 50 us, since the
  // threads of a recurrent layer meet every few microseconds, then sleeps: the thread waited for may not be running at
  // all. A thread writes one line and reads those of the others: one way between two cores.
  void barrier() {
    if (count == 1) return;
    const uint32_t round = ++round_;
    // Sequentially consistent, or a thread that goes to sleep now might be overlooked.
    arrivals_[index].count.store(round);
    arrivals_[index].count.notify_all();
    for (int other = 0, spins = 0; other < count; ++other) {
      const std::atomic<uint32_t>& arrived = arrivals_[other].count;
      for (uint32_t seen; int32_t((seen = arrived.load()) - round) < 0;) {
        if (++spins < 4000) {
          __builtin_ia32_pause();
        } else {
          arrived.wait(seen);
        }
      }
    }
  }

  // The share [begin, end) of [0, total) of this thread.
  int64_t begin(int64_t total) const { return total * index / count; }
  int64_t end(int64_t total) const { return total * (index + 1) / count; }

 private:
  Arrivals* arrivals_;
  uint32_t round_ = 0;
};

// Calls body(team) once on each of at most `threads` threads at the same time. The body must not throw: the others
// would wait for ever.
template <class Body>
void parallel_team(int threads, const Body& body) {
  Team::Arrivals arrivals[Team::kMost];
  if (threads <= 1) {
    Team team(arrivals, 0, 1);
    body(team);
    return;
  }
#pragma omp parallel num_threads(threads < Team::kMost ? threads : Team::kMost)
  {
    Team team(arrivals, omp_get_thread_num(), omp_get_num_threads());
    body(team);
  }
}

}  // namespace lamina
