// What masks and ALiBi do to one chunk of keys, brought into the layout of the scores: [key][query lanes], bits of rows
// for a boolean mask and numbers for what is added. A chunk is narrowed to the keys between the first and the last that
// any row keeps, and left out where there is none.
#pragma once

#include "cpu/kernels/attention_rows.h"

namespace lamina::LAMINA_ISA {
namespace {

LAMINA_INLINE bool is_bool(AttentionMask type) { return type == AttentionMask::boolean; }
LAMINA_INLINE bool is_added(AttentionMask type) { return type != AttentionMask::none && !is_bool(type); }
LAMINA_INLINE int mask_bytes(AttentionMask type) {
  return type == AttentionMask::boolean   ? 1
         : type == AttentionMask::float64 ? 8
         : type == AttentionMask::float32 ? 4
                                          : 2;
}

// n <= 64 elements of a boolean mask as bits, the first lowest.
LAMINA_INLINE uint64_t load_kept_bits(const char* p, int64_t stride, int n) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(p);
  if (stride == 1) return bool_bits(bytes, n);
  uint64_t bits = 0;
  for (int i = 0; i < n; ++i) bits |= uint64_t(bytes[i * stride] != 0) << i;
  return bits;
}

LAMINA_INLINE Mask excludes(F32 added) { return less(added, set1(-kLargest)); }

LAMINA_INLINE float added_at(AttentionMask type, const char* p, int64_t i) {
  if (type == AttentionMask::float32) return reinterpret_cast<const float*>(p)[i];
  return type == AttentionMask::bfloat16 ? bf16_to_float(reinterpret_cast<const bf16*>(p)[i])
                                         : f16_to_float(reinterpret_cast<const f16*>(p)[i]);
}

// Finite values that log2(e) would push to -inf stay finite (finfo.min is in use for "almost masked").
LAMINA_INLINE F32 bounded_added(F32 x, Mask excluded) { return select(excluded, x, max(set1(-2.2e38f), x)); }

// n <= lanes elements of an additive mask as they are; 0 behind them.
LAMINA_INLINE F32 load_mask(AttentionMask type, const char* p, int64_t stride, int n) {
  F32 x;
  if (stride == 1) {
    x = type == AttentionMask::float32    ? load_up_to(reinterpret_cast<const float*>(p), n)
        : type == AttentionMask::bfloat16 ? load_up_to(reinterpret_cast<const bf16*>(p), n)
                                          : load_up_to(reinterpret_cast<const f16*>(p), n);
  } else {
    float t[kLanes] = {0};
    for (int i = 0; i < n; ++i) t[i] = added_at(type, p, i * stride);
    x = load(t);
  }
  return x;
}

// The same, bounded.
LAMINA_INLINE F32 load_added(AttentionMask type, const char* p, int64_t stride, int n) {
  const F32 x = load_mask(type, p, stride, n);
  return bounded_added(x, excludes(x));
}

// A score in log2 units and what the mask adds to it. `careful`: see [NOTE] Excluded keys.
LAMINA_INLINE F32 add_mask(F32 score, F32 added, bool careful) {
  const F32 sum = fmadd(added, set1(kLog2E), score);
  return careful ? select(excludes(added), set1(-kInfinity), sum) : sum;
}

// -slope * |position - key|, lane by lane.
LAMINA_INLINE F32 alibi_of(F32 slope, F32 distance) { return zero() - slope * and_bits(distance, 0x7fffffffu); }

// The 64 x 64 matrix of bits becomes its transpose: bit c of row r moves to bit r of row c.
inline void transpose_bits(uint64_t (&m)[64]) {
  uint64_t low = 0x00000000ffffffff;
  for (int width = 32; width > 0; width /= 2, low ^= low << width) {
    for (int block = 0; block < 64; block += 2 * width) {
      for (int r = block; r < block + width; ++r) {
        const uint64_t swapped = ((m[r] >> width) ^ m[r + width]) & low;
        m[r] ^= swapped << width;
        m[r + width] ^= swapped;
      }
    }
  }
}

// The keys of a chunk that any row keeps, counted from its first.
struct KeptKeys {
  int begin = tuning::kAttentionMaxChunk, end = 0;
  bool plain = true;  // no key in between is excluded, nothing is added

  bool none() const { return end == 0; }
  void keep(int key) {
    if (key < begin) begin = key;
    if (key >= end) end = key + 1;
  }
};

class ChunkMask {
 public:
  // added: [kAttentionMaxChunk + 32][kRows]
  ChunkMask(const AttentionArgs& args, const RowBlock& rows, float* added)
      : a_(args), rows_(rows), added_(added), per_key_(rows.same_mask && !args.alibi_slopes) {
    if (!a_.alibi_slopes) return;
    for (int r = 0; r < rows_.vectors * kLanes; ++r) {
      slopes_[r] = static_cast<const float*>(a_.alibi_slopes)[rows_.head_of[r] * a_.alibi_head];
    }
  }

  bool exists() const { return a_.mask_type != AttentionMask::none || a_.alibi_slopes; }

  // Keys [first, first + n). For short blocks (which read the mask as it lies) only finds out which are kept.
  template <bool kShort>
  KeptKeys prepare(int64_t first, int n) {
    KeptKeys kept;
    if (is_bool(a_.mask_type)) {
      kept = prepare_boolean<kShort>(first, n);
    } else if (is_added(a_.mask_type)) {
      kept = prepare_added<kShort>(first, n);
    } else {
      kept = {0, n, true};
    }
    if (a_.alibi_slopes && !kept.none()) {
      kept.plain = false;
      if constexpr (!kShort) add_alibi(first, n);
    }
    return kept;
  }

  // From key `key` of the chunk on: for each key the rows that keep it, as bits; null without a boolean mask.
  const uint64_t* kept(int key) const { return is_bool(a_.mask_type) ? kept_ + key : nullptr; }
  // What is added to the scores: [key] if per_key(), else [key][kRows]; null if nothing is.
  const float* added(int key) const {
    return is_added(a_.mask_type) || a_.alibi_slopes ? added_ + key * (per_key_ ? 1 : kRows) : nullptr;
  }
  bool per_key() const { return per_key_; }
  float slope(int row) const { return slopes_[row]; }

  const char* row(int r, int64_t key) const {
    return static_cast<const char*>(a_.mask) + (rows_.mask_offset[r] + key * a_.mask_col) * mask_bytes(a_.mask_type);
  }

 private:
  template <bool kShort>
  KeptKeys prepare_boolean(int64_t first, int n) {
    KeptKeys chunk;
    const int rows = rows_.same_mask ? 1 : rows_.rows;
    for (int j = 0; j < n; j += 64) {
      const int count = smaller(64, n - j);
      uint64_t bits[64];
      uint64_t any = 0, all = ~uint64_t{0};
      for (int r = 0; r < rows; ++r) {
        bits[r] = load_kept_bits(row(r, first + j), a_.mask_col, count);
        any |= bits[r];
        all &= bits[r];
      }
      if (any) {
        chunk.keep(j + __builtin_ctzll(any));
        chunk.keep(j + 63 - __builtin_clzll(any));
      }
      const bool whole = all == (count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1);
      chunk.plain = chunk.plain && whole;
      if constexpr (!kShort) {
        if (rows == 1 || whole) {
          for (int i = 0; i < count; ++i) kept_[j + i] = all >> i & 1 ? ~uint64_t{0} : 0;
        } else {
          for (int r = rows; r < 64; ++r) bits[r] = 0;
          transpose_bits(bits);
          for (int i = 0; i < count; ++i) kept_[j + i] = bits[i];
        }
      }
    }
    return chunk;
  }

  // Of some elements of an additive mask, lane by lane: whether all exclude, and whether all are 0.
  struct Seen {
    Mask excluded;
    F32 squares;

    LAMINA_INLINE F32 bounded(F32 x) {
      const Mask e = excludes(x);
      excluded = excluded & e;
      squares = fmadd(x, x, squares);
      return bounded_added(x, e);
    }
  };

  // Fills added_ (not for short blocks whose rows have different masks).
  template <bool kShort>
  KeptKeys prepare_added(int64_t first, int n) {
    Seen seen[(tuning::kAttentionMaxChunk + kLanes - 1) / kLanes];
    const int groups = (n + kLanes - 1) / kLanes;
    for (int g = 0; g < groups; ++g) seen[g] = {all_lanes(), zero()};
    if (rows_.same_mask) {
      for (int j = 0; j < n; j += kLanes) {
        const F32 x =
            seen[j / kLanes].bounded(load_mask(a_.mask_type, row(0, first + j), a_.mask_col, smaller(kLanes, n - j)));
        if (per_key_) {
          store(added_ + j, x);
        } else if constexpr (!kShort) {
          float each[kLanes];
          store(each, x);
          for (int i = 0; i < kLanes; ++i) {
            for (int v = 0; v < rows_.vectors; ++v) store(added_ + (j + i) * kRows + v * kLanes, set1(each[i]));
          }
        }
      }
    } else if constexpr (kShort) {
      for (int j = 0; j < n; j += kLanes) {
        for (int r = 0; r < rows_.rows; ++r) {
          seen[j / kLanes].bounded(load_mask(a_.mask_type, row(r, first + j), a_.mask_col, smaller(kLanes, n - j)));
        }
      }
    } else {
      switch (a_.mask_type) {
        case AttentionMask::float32: transpose_added<float>(first, n, seen); break;
        case AttentionMask::bfloat16: transpose_added<bf16>(first, n, seen); break;
        default: transpose_added<f16>(first, n, seen);
      }
    }
    KeptKeys chunk;
    for (int j = 0; j < n; j += kLanes) {
      const Seen& s = seen[j / kLanes];
      chunk.plain = chunk.plain && all(less(s.squares, set1(1e-30f)));
      if (all(s.excluded)) continue;
      float kept[kLanes];
      store(kept, select(s.excluded, zero(), set1(1.0f)));
      for (int i = 0; i < kLanes && j + i < n; ++i) {
        if (kept[i] != 0.0f) chunk.keep(j + i);
      }
    }
    return chunk;
  }

  // Into [key][kRows]. Few rows at a time, each along its keys: as many streams as the hardware fetches ahead.
  template <class E>
  void transpose_added(int64_t first, int n, Seen* seen) {
    const int64_t col = a_.mask_col;
    for (int v = 0; v < rows_.vectors; ++v) {
      const E* from[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        // Lanes without a row repeat the last one.
        from[i] =
            static_cast<const E*>(a_.mask) + rows_.mask_offset[smaller(v * kLanes + i, rows_.rows - 1)] + first * col;
      }
      for (int j = 0; j < n; j += kLanes) {
        F32 x[kLanes];
        if (col == 1 && j + kLanes <= n) {
          LAMINA_UNROLL
          for (int i = 0; i < kLanes; ++i) x[i] = load(from[i] + j);
        } else {
          for (int i = 0; i < kLanes; ++i) x[i] = row_elements(from[i] + j * col, col, smaller(kLanes, n - j));
        }
        Seen s = seen[j / kLanes];
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) x[i] = s.bounded(x[i]);
        seen[j / kLanes] = s;
        transpose(x);
        float* to = added_ + j * kRows + v * kLanes;
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) store(to + i * kRows, x[i]);
      }
    }
  }

  void add_alibi(int64_t first, int n) {
    const bool alone = !is_added(a_.mask_type);
    for (int v = 0; v < rows_.vectors; ++v) {
      float t[kLanes];
      for (int i = 0; i < kLanes; ++i) t[i] = float(rows_.position[v * kLanes + i] - first);
      const F32 position = load(t), slope = load(slopes_ + v * kLanes);
      for (int j = 0; j < n; ++j) {
        float* to = added_ + j * kRows + v * kLanes;
        const F32 bias = alibi_of(slope, position - set1(float(j)));
        store(to, alone ? bias : load(to) + bias);
      }
    }
  }

  const AttentionArgs& a_;
  const RowBlock& rows_;
  float* added_;
  const bool per_key_;
  float slopes_[kRows];
  uint64_t kept_[tuning::kAttentionMaxChunk];
};

}  // namespace
}  // namespace lamina::LAMINA_ISA
