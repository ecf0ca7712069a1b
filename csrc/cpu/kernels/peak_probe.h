// Loops that do nothing but one instruction as fast as the machine can: the roof of every roofline.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"

namespace lamina {

// Runs `iterations` rounds in registers and returns how many operations they were (2 per multiply-add).
using PeakLoop = double(int64_t iterations);

extern const KernelTable<PeakLoop> peak_float32_table;  // fused multiply-add
extern const KernelTable<PeakLoop> peak_int8_table;     // vpdpbusd; no variant below avx512vnni
extern const KernelTable<PeakLoop> peak_bf16_table;     // vdpbf16ps; no variant below avx512bf16

// Reads n floats once; the sum keeps the compiler from dropping the loads.
extern const KernelTable<float(const float* data, int64_t n)> read_probe_table;

}  // namespace lamina
