#include "ops/peak_probe.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/kernels/peak_probe.h"
#include "ops/checks.h"

namespace lamina {

constinit const KernelTable<PeakLoop> peak_float32_table;
constinit const KernelTable<PeakLoop> peak_int8_table;
constinit const KernelTable<PeakLoop> peak_bf16_table;
constinit const KernelTable<float(const float*, int64_t)> read_probe_table;

namespace {

using Clock = std::chrono::steady_clock;

// The best rate of many short rounds: a peak is what the machine can do, not what its neighbours leave.
// body(thread) does one round and returns its amount of work; all threads start a round together.
template <class Body>
double best_rate(int threads, double seconds, const Body& body) {
  check(threads >= 1, "probe", "threads is ", threads, ", but must be at least 1");
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  double best = 0;
  do {
    double work = 0;
    const auto start = Clock::now();
#pragma omp parallel num_threads(threads) reduction(+ : work)
    work += body(omp_get_thread_num());
    best = std::max(best, work / std::chrono::duration<double>(Clock::now() - start).count());
  } while (Clock::now() < end);
  return best * 1e-9;
}

}  // namespace

double probe_peak(const std::string& kind, int threads, double seconds) {
  constexpr int64_t kRound = 50'000;  // about 0.2 ms
  const auto loop = kind == "float32" ? peak_float32_table.find()
                    : kind == "int8"  ? peak_int8_table.find()
                    : kind == "bf16"
                        ? peak_bf16_table.find()
                        : (fail("probe_peak", "kind '", kind, "' is unknown; use float32, int8 or bf16"), nullptr);
  if (!loop) return 0;
  return best_rate(threads, seconds, [&](int) { return loop(kRound); });
}

double probe_read_bandwidth(int64_t bytes, int threads, double seconds) {
  check(bytes >= 1024 * int64_t{threads}, "probe_read_bandwidth", "bytes is ", bytes,
        ", but must be at least 1024 a thread");
  const int64_t share = bytes / threads / 4;
  std::vector<std::vector<float>> data(std::max(threads, 0));
  // Each thread touches its own share first, so that it lies near that thread.
#pragma omp parallel num_threads(threads)
  data[omp_get_thread_num()].assign(share, 1.0f);
  const auto read = read_probe_table.get();
  const int64_t repeats = std::max<int64_t>(1, (int64_t{1} << 20) / share);
  volatile float sink = 0;
  const double rate = best_rate(threads, seconds, [&](int thread) {
    for (int64_t i = 0; i < repeats; ++i) sink = read(data[thread].data(), share);
    return 4.0 * double(share * repeats);
  });
  return rate;
}

}  // namespace lamina
