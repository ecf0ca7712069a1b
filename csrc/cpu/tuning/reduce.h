// The tuned numbers of reduce, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Fewer elements than this are not worth waking a second thread for (about 3 us from L2).
inline constexpr long kReduceWorkPerThread = 1L << 15;

// Neighbouring columns that one thread takes at a time: whole groups of registers that are read together, on any ISA.
inline constexpr long kReduceColumns = 96;

}  // namespace lamina::tuning
