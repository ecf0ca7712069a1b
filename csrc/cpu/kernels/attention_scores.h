// Scores of a chunk of keys, transposed: register tiles of keys x query vectors, which leave the registers as weights.
#pragma once

#include "cpu/kernels/attention_masks.h"

namespace lamina::LAMINA_ISA {
namespace {

// Accumulators of a register tile, and the most vectors on its wide side; the rest holds operands.
constexpr int kTileSums = F32::registers >= 32 ? 24 : 12;
constexpr int kTileVectors = F32::registers >= 32 ? 4 : 2;

// The word at a byte address, on every lane. Words may hold anything (a pair of bfloat16 is no float), they are only
// moved.
LAMINA_INLINE F32 broadcast_word(const char* p) {
  float word;
  memcpy(&word, p, 4);
  return set1(word);
}

LAMINA_INLINE F32 capped(F32 score, float softcap) {
  return set1(softcap) * tanh_precise(score * set1(1.0f / softcap));
}

inline __attribute__((noinline)) void cap_scores(float* s, int vectors, float softcap) {
  for (int i = 0; i < vectors; ++i) store(s + i * kLanes, capped(load(s + i * kLanes), softcap));
}

// What the tiles of one chunk share. Weights are exp2(score - base): base is 0 or what an earlier chunk has shown to be
// near the row's maximum, so that a tile need not wait for the maximum of its chunk. Floats have the range for it: how
// far the scores have come from base is only looked at when the chunk is through.
struct ScoreTiles {
  const float* q;  // [words][kRows]
  const char* k;   // keys, k_stride bytes apart
  int64_t k_stride;
  int words;
  float factor;          // of the scores; 1 where the query carries the scale
  float softcap;         // in log2 units; 0 where there is none
  const uint64_t* kept;  // null, or for each key the rows that keep it, as bits
  const float* added;    // null, or [key] (per_key) or [key][kRows]
  bool per_key;
  bool careful;              // see [NOTE] Excluded keys
  const float *begin, *end;  // keys of each row, counted from the chunk's first
  const F32* base;           // [kRowVectors]
  F32 *highest, *total;      // [kRowVectors]: the largest score - base, the sum of weights
  F32* rounded;              // where weights are rounded, the sum of what they have become
  float* weights;            // words, [key / keys_per_word][kRows]
  // Where scores are sums of codes: (sum - what it started from) * row_scale * key_scale + row_shift.
  const float *row_scale, *row_shift, *key_scale;
  const int32_t* key_start;
};

// KT keys from `key` on times NV query vectors from `v0` on; the first `known` keys are in the total already.
// `limited`: some row does not take all of the keys.
template <class Math, int NV, int KT>
__attribute__((noinline)) void score_tile(const ScoreTiles& t, int key, int known, int v0, bool limited) {
  F32 acc[KT][NV];
  LAMINA_UNROLL
  for (int k = 0; k < KT; ++k) {
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) {
      acc[k][v] = Math::int8_scores ? broadcast_word(reinterpret_cast<const char*>(t.key_start + key + k)) : zero();
    }
  }
  const int64_t ks = t.k_stride;
  // Every third row has a pointer of its own; the two between are reached by the addressing modes base + ks, base + 2
  // ks.
  const char* row[(KT + 2) / 3];
  LAMINA_UNROLL
  for (int g = 0; g < (KT + 2) / 3; ++g) row[g] = t.k + (key + 3 * g) * ks;
  const float* q = t.q + v0 * kLanes;
#pragma GCC unroll 4
  for (int64_t w = 0; w < t.words; ++w) {
    F32 x[NV];
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) x[v] = load(q + w * kRows + v * kLanes);
    LAMINA_UNROLL
    for (int k = 0; k < KT; ++k) {
      const F32 b = broadcast_word(row[k / 3] + (k % 3) * ks + 4 * w);
      LAMINA_UNROLL
      for (int v = 0; v < NV; ++v) acc[k][v] = Math::score_multiply_add(x[v], b, acc[k][v]);
    }
  }
  float factor = t.factor;
  if constexpr (Math::int8_scores) {
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const F32 scale = load(t.row_scale + (v0 + v) * kLanes), shift = load(t.row_shift + (v0 + v) * kLanes);
      LAMINA_UNROLL
      for (int k = 0; k < KT; ++k) {
        acc[k][v] = fmadd(to_float(bits_of(acc[k][v])), scale * set1(t.key_scale[key + k]), shift);
      }
    }
    factor = 1.0f;
  }
  const bool plain = !t.added && !t.kept && !limited && t.softcap == 0.0f;
  if (!plain) {
    if constexpr (!Math::scales_query && !Math::int8_scores) {
      LAMINA_UNROLL
      for (int k = 0; k < KT; ++k) {
        LAMINA_UNROLL
        for (int v = 0; v < NV; ++v) acc[k][v] = acc[k][v] * set1(factor);
      }
      factor = 1.0f;
    }
    if (t.softcap != 0.0f) {
      // By way of memory: tanh inlined for every accumulator would be most of the kernel's code.
      float s[KT * NV * kLanes];
      LAMINA_UNROLL
      for (int k = 0; k < KT; ++k) {
        LAMINA_UNROLL
        for (int v = 0; v < NV; ++v) store(s + (k * NV + v) * kLanes, acc[k][v]);
      }
      cap_scores(s, KT * NV, t.softcap);
      LAMINA_UNROLL
      for (int k = 0; k < KT; ++k) {
        LAMINA_UNROLL
        for (int v = 0; v < NV; ++v) acc[k][v] = load(s + (k * NV + v) * kLanes);
      }
    }
    if (t.added) {
      LAMINA_UNROLL
      for (int k = 0; k < KT; ++k) {
        LAMINA_UNROLL
        for (int v = 0; v < NV; ++v) {
          const F32 added = t.per_key ? set1(t.added[key + k]) : load(t.added + (key + k) * kRows + (v0 + v) * kLanes);
          acc[k][v] = add_mask(acc[k][v], added, t.careful);
        }
      }
    }
    if (t.kept) {
      LAMINA_UNROLL
      for (int k = 0; k < KT; ++k) {
        LAMINA_UNROLL
        for (int v = 0; v < NV; ++v) {
          const Mask kept = lanes_of_bits(uint32_t(t.kept[key + k] >> ((v0 + v) * kLanes)));
          acc[k][v] = select(kept, acc[k][v], set1(-kInfinity));
        }
      }
    }
    if (limited) {
      LAMINA_UNROLL
      for (int v = 0; v < NV; ++v) {
        const F32 begin = load(t.begin + (v0 + v) * kLanes), end = load(t.end + (v0 + v) * kLanes);
        LAMINA_UNROLL
        for (int k = 0; k < KT; ++k) {
          const F32 j = set1(float(key + k));
          acc[k][v] = select(less(j, end), select(less(j, begin), set1(-kInfinity), acc[k][v]), set1(-kInfinity));
        }
      }
    }
  }
  constexpr int kPerWord = Math::keys_per_word;
  float* to = t.weights + key / kPerWord * kRows + v0 * kLanes;
  LAMINA_UNROLL
  for (int v = 0; v < NV; ++v) {
    const F32 base = t.base[v0 + v];
    F32 highest = t.highest[v0 + v], total = t.total[v0 + v];
    LAMINA_UNROLL
    for (int k = 0; k < KT; ++k) {
      const F32 x =
          Math::scales_query || Math::int8_scores ? acc[k][v] - base : fmadd(acc[k][v], set1(factor), zero() - base);
      highest = max(x, highest);  // in this order a NaN is left out; its weight is NaN and so becomes the total
      acc[k][v] = Math::exp2(x);
    }
    LAMINA_UNROLL
    for (int k = 0; k < KT; k += kPerWord) {
      F32 w[kPerWord];
      LAMINA_UNROLL
      for (int i = 0; i < kPerWord; ++i) w[i] = k + i < KT ? acc[k + i][v] : zero();
      const F32 word = Math::join(w);
      store(to + k / kPerWord * kRows + v * kLanes, word);
      if (kPerWord > 1 && k >= known) t.rounded[v0 + v] = Math::add_weights(word, t.rounded[v0 + v]);
    }
    // A tile is summed by itself before it joins the chunk, and a chunk before it joins the row: a sum of hundreds of
    // terms one by one would be a large part of the error.
    F32 sum = zero();
    if (known == 0) {
      LAMINA_UNROLL
      for (int k = 0; k + 1 < KT; k += 2) sum = sum + (acc[k][v] + acc[k + 1][v]);
      if constexpr (KT % 2 == 1) sum = sum + acc[KT - 1][v];
    } else {
      LAMINA_UNROLL
      for (int k = 0; k < KT; ++k) {
        if (k >= known) sum = sum + acc[k][v];
      }
    }
    t.highest[v0 + v] = highest;
    t.total[v0 + v] = total + sum;
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
