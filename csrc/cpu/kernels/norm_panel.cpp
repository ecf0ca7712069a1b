// Layer norm of a panel: the arithmetic of norm_rows (variance by distances from about the mean, corrected for what
// that is off by) with a token in every lane, so that its sums need no reduction and its maximum, which quantization
// asks for next, comes with the last pass.
#include "cpu/kernels/norm_panel.h"

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
// Registers of tokens at once: independent chains, which hide the latency of an addition.
constexpr int kTogether = kPanelTokens / kLanes < 4 ? kPanelTokens / kLanes : 4;
constexpr int kChains = 4 / kTogether < 2 ? 2 : 4 / kTogether;
// Every so many features say about where the mean is. Distances from it serve as well as those from the mean itself: if
// the sample's is off by D, the sampled features alone make the variance at least D^2 / 8, so that taking D^2 out of
// the second moment costs three bits at worst, and usually nothing.
constexpr int64_t kSample = 8;
// Features that are summed by themselves before they join the total: chains stay short in tokens of any size.
constexpr int64_t kBlock = 128;

using Registers = F32[kTogether];

// Calls each(feature, chain) for all of them, and join() behind every block.
template <class Each, class Join>
LAMINA_INLINE void over_blocks(int64_t features, const Each& each, const Join& join) {
  for (int64_t begin = 0; begin < features; begin += kBlock) {
    const int64_t end = begin + kBlock < features ? begin + kBlock : features;
    int64_t k = begin;
    for (; k + kChains <= end; k += kChains) {
      LAMINA_UNROLL
      for (int c = 0; c < kChains; ++c) each(k + c, c);
    }
    for (; k < end; ++k) each(k, 0);
    join();
  }
}

// total += the chains, which begin anew.
LAMINA_INLINE void join_chains(Registers (&chains)[kChains], Registers& total) {
  LAMINA_UNROLL
  for (int v = 0; v < kTogether; ++v) {
    LAMINA_UNROLL
    for (int c = 0; c < kChains; ++c) {
      total[v] = total[v] + chains[c][v];
      chains[c][v] = zero();
    }
  }
}

LAMINA_INLINE void clear(Registers (&chains)[kChains], Registers& total) {
  LAMINA_UNROLL
  for (int v = 0; v < kTogether; ++v) {
    total[v] = zero();
    LAMINA_UNROLL
    for (int c = 0; c < kChains; ++c) chains[c][v] = zero();
  }
}

template <bool kWeight, bool kBias>
LAMINA_INLINE void scale_tokens(const NormPanelArgs& a, int t, const Registers& mean, const Registers& scale,
                                const Registers& shift) {
  I32 largest[kTogether];
  LAMINA_UNROLL
  for (int v = 0; v < kTogether; ++v) largest[v] = set1_i32(0);
  for (int64_t k = 0; k < a.features; ++k) {
    const F32 weight = kWeight ? set1(a.weight[k]) : zero(), bias = kBias ? set1(a.bias[k]) : zero();
    LAMINA_UNROLL
    for (int v = 0; v < kTogether; ++v) {
      const int64_t at = k * kPanelTokens + t + v * kLanes;
      F32 y = fmadd(load(a.x + at) - mean[v], scale[v], shift[v]);
      if constexpr (kWeight && kBias) {
        y = fmadd(y, weight, bias);
      } else if constexpr (kWeight) {
        y = y * weight;
      } else if constexpr (kBias) {
        y = y + bias;
      }
      largest[v] = max(largest[v], abs_bits(y));
      store(a.out + at, y);
    }
  }
  LAMINA_UNROLL
  for (int v = 0; v < kTogether; ++v) store_i32(a.largest + t + v * kLanes, largest[v]);
}

void norm_panel(const NormPanelArgs& a) {
  const double one_of_n = 1.0 / double(a.features);
  for (int t = 0; t < kPanelTokens; t += kTogether * kLanes) {
    const float* x = a.x + t;
    const auto load_at = [&](int64_t k, int v)
                             __attribute__((always_inline)) { return load(x + k * kPanelTokens + v * kLanes); };
    Registers sums[kChains], squares[kChains], total, mean, first, second;
    clear(sums, total);
    const int64_t step = a.features < kSample * kChains ? 1 : kSample, sampled = (a.features + step - 1) / step;
    over_blocks(
        sampled,
        [&](int64_t k, int c) __attribute__((always_inline)) {
          LAMINA_UNROLL
          for (int v = 0; v < kTogether; ++v) sums[c][v] = sums[c][v] + load_at(k * step, v);
        },
        [&]() __attribute__((always_inline)) { join_chains(sums, total); });
    LAMINA_UNROLL
    for (int v = 0; v < kTogether; ++v) mean[v] = total[v] * set1(1.0f / float(sampled));
    clear(sums, first);
    clear(squares, second);
    over_blocks(
        a.features,
        [&](int64_t k, int c) __attribute__((always_inline)) {
          LAMINA_UNROLL
          for (int v = 0; v < kTogether; ++v) {
            const F32 d = load_at(k, v) - mean[v];
            sums[c][v] = sums[c][v] + d;
            squares[c][v] = fmadd(d, d, squares[c][v]);
          }
        },
        [&]() __attribute__((always_inline)) {
          join_chains(sums, first);
          join_chains(squares, second);
        });
    // What is once a token is done one by one, as norm_rows does it.
    alignas(64) float off[kTogether * kLanes], factor[kTogether * kLanes], shifted[kTogether * kLanes];
    LAMINA_UNROLL
    for (int v = 0; v < kTogether; ++v) {
      store(off + v * kLanes, first[v]);
      store(factor + v * kLanes, second[v]);
    }
    for (int i = 0; i < kTogether * kLanes; ++i) {
      const double d = double(off[i]) * one_of_n, variance = double(factor[i]) * one_of_n - d * d;
      // max(0, .) by a comparison that a NaN fails, so that it stays.
      factor[i] = 1.0f / __builtin_sqrtf(float(variance < 0 ? 0 : variance) + a.eps);
      shifted[i] = float(-d) * factor[i];
    }
    Registers scale, shift;
    LAMINA_UNROLL
    for (int v = 0; v < kTogether; ++v) {
      scale[v] = load(factor + v * kLanes);
      shift[v] = load(shifted + v * kLanes);
    }
    if (a.weight && a.bias) {
      scale_tokens<true, true>(a, t, mean, scale, shift);
    } else if (a.weight) {
      scale_tokens<true, false>(a, t, mean, scale, shift);
    } else if (a.bias) {
      scale_tokens<false, true>(a, t, mean, scale, shift);
    } else {
      scale_tokens<false, false>(a, t, mean, scale, shift);
    }
  }
}

REGISTER_KERNEL(norm_panel_table, norm_panel);

}  // namespace
}  // namespace lamina::LAMINA_ISA
