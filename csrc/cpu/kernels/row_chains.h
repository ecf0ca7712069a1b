// A row's vectors in chains: what kernels that sum or compare long rows have in common.
#pragma once

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
// Sums of a row run in so many chains, which with two rows hide the latency of an addition, and over so many elements
// at most before they join the total in float64: chains stay short in rows of any length.
constexpr int kChains = 2;
constexpr int64_t kBlock = 2048;

LAMINA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls each(chain, index, count) over the vectors of [begin, end), the chains taking turns.
template <class Each>
LAMINA_INLINE void over_chains(int64_t begin, int64_t end, const Each& each) {
  int64_t i = begin;
  for (; i + kChains * kLanes <= end; i += kChains * kLanes) {
    LAMINA_UNROLL
    for (int c = 0; c < kChains; ++c) each(c, i + c * kLanes, kLanes);
  }
  for (; i < end; i += kLanes) each(0, i, int(smaller(end - i, kLanes)));
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
