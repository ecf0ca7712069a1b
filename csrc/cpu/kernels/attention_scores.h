// Scores of a chunk of keys, transposed: register tiles of keys x query vectors, masked and capped before they are
// stored.
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

inline __attribute__((noinline)) void cap_scores(float* s, int keys, int vectors, float softcap) {
  for (int k = 0; k < keys; ++k) {
    for (int v = 0; v < vectors; ++v) {
      store(s + k * kRows + v * kLanes, capped(load(s + k * kRows + v * kLanes), softcap));
    }
  }
}

// What the S tiles of one chunk share.
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
  float* s;                  // [key][kRows]
  F32* maximum;              // [kRowVectors]
};

// KT keys from `key` on times NV query vectors from `v0` on. `limited`: some row does not take all of the keys.
template <class Math, int NV, int KT>
__attribute__((noinline)) void score_tile(const ScoreTiles& t, int key, int v0, bool limited) {
  F32 acc[KT][NV];
  LAMINA_UNROLL
  for (int k = 0; k < KT; ++k) {
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) acc[k][v] = zero();
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
      for (int v = 0; v < NV; ++v) acc[k][v] = Math::multiply_add(x[v], b, acc[k][v]);
    }
  }
  if constexpr (!Math::scales_query) {
    const F32 factor = set1(t.factor);
    LAMINA_UNROLL
    for (int k = 0; k < KT; ++k) {
      LAMINA_UNROLL
      for (int v = 0; v < NV; ++v) acc[k][v] = acc[k][v] * factor;
    }
  }
  float* s = t.s + key * kRows + v0 * kLanes;
  if (t.softcap != 0.0f) {
    // By way of memory: tanh inlined for every accumulator would be most of the kernel's code.
    LAMINA_UNROLL
    for (int k = 0; k < KT; ++k) {
      LAMINA_UNROLL
      for (int v = 0; v < NV; ++v) store(s + k * kRows + v * kLanes, acc[k][v]);
    }
    cap_scores(s, KT, NV, t.softcap);
    LAMINA_UNROLL
    for (int k = 0; k < KT; ++k) {
      LAMINA_UNROLL
      for (int v = 0; v < NV; ++v) acc[k][v] = load(s + k * kRows + v * kLanes);
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
  LAMINA_UNROLL
  for (int v = 0; v < NV; ++v) {
    F32 m = t.maximum[v0 + v];
    LAMINA_UNROLL
    for (int k = 0; k < KT; ++k) {
      m = max(m, acc[k][v]);
      store(s + k * kRows + v * kLanes, acc[k][v]);
    }
    t.maximum[v0 + v] = m;
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
