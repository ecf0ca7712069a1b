// Dropout by a counter-based generator: which weights are kept is a function of the seed and the weight's place alone,
// so that forward and backward, any number of threads and any register width see the same.
//
// Philox4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3,
// SC 2011). One call gives 128 bits: 16 for each of the 8 keys of an aligned block.
//   counter = (query, key / 8, head, batch), key = seed; weight (query, key) is kept where half-word key % 8 of the
//   result (the lower half of a word first) is below keep_below, so that the probability is a multiple of 2^-16.
#pragma once

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kPhiloxRounds = 7;
constexpr int kPhiloxKeys = 8;

// c becomes Philox(seed, c), lane by lane.
LAMINA_INLINE void philox(I32 (&c)[4], const uint32_t (&seed)[2]) {
  uint32_t k0 = seed[0], k1 = seed[1];
  LAMINA_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    I32 low0, high0, low2, high2;
    multiply_wide(c[0], 0xD2511F53u, low0, high0);
    multiply_wide(c[2], 0xCD9E8D57u, low2, high2);
    c[0] = high2 ^ c[1] ^ set1_i32(int32_t(k0));
    c[1] = low2;
    c[2] = high0 ^ c[3] ^ set1_i32(int32_t(k1));
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Bit r of kept[j]: whether the weight of row r, which is query[r] of head[r], and key first + j is kept. Rows in
// `vectors` registers, 64 at most; keep_below < 65536.
inline void kept_by_dropout(uint32_t keep_below, const uint32_t (&seed)[2], uint32_t batch, const int32_t* query,
                            const int32_t* head, int vectors, int64_t first, int n, uint64_t* kept) {
  for (int64_t block = first / kPhiloxKeys; block * kPhiloxKeys < first + n; ++block) {
    uint64_t bits[kPhiloxKeys] = {0};
    for (int v = 0; v < vectors; ++v) {
      const int lane = v * F32::lanes;
      I32 c[4] = {load_i32(query + lane), set1_i32(int32_t(block)), load_i32(head + lane), set1_i32(int32_t(batch))};
      philox(c, seed);
      LAMINA_UNROLL
      for (int i = 0; i < 4; ++i) {
        bits[2 * i] |= uint64_t(bits_below(shift_left(c[i], 16), keep_below << 16)) << lane;
        bits[2 * i + 1] |= uint64_t(bits_below(c[i], keep_below << 16)) << lane;
      }
    }
    for (int i = 0; i < kPhiloxKeys; ++i) {
      const int64_t j = block * kPhiloxKeys + i - first;
      if (j >= 0 && j < n) kept[j] = bits[i];
    }
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
