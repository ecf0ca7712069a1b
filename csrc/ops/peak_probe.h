// Measures this machine's peaks, for "percent of peak" in benchmarks.
#pragma once

#include <cstdint>
#include <string>

namespace lamina {

// GFLOP/s (2 per multiply-add) of kind "float32", "int8" or "bf16" on `threads` threads; 0 if the active ISA lacks the
// instruction.
double probe_peak(const std::string& kind, int threads, double seconds);

// GB/s of plain reads of a buffer of `bytes`, split over `threads`, each reading its share again and again.
double probe_read_bandwidth(int64_t bytes, int threads, double seconds);

}  // namespace lamina
