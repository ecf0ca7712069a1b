// The body of the attention kernels, written once over the arithmetic that a variant brings.
//
// The idea: hold the scores transposed. A block of query rows lies in the vector lanes and keys are broadcast,
//
//   S[key][query lanes] = sum_d Q^T[d][query lanes] * K[key][d]        Q^T packed once per block, K read as it lies
//
// so the maximum and the sum of softmax are vertical operations, and exp(S) is already in the layout that the second
// product wants to broadcast from:
//
//   O[query][value lanes] += P[key][query] * V[key][value lanes]       V read as it lies
//
// Both products are register tiles of kTileSums accumulators (keys x query vectors, queries x value vectors), and keys
// go by in chunks with online softmax. log2(e) is folded into the scale, so that exp is exp2. What causality empties is
// left out by whole query vectors.
//
// With very few rows most lanes of a query vector would be idle. Then the head size lies in the lanes instead: dot
// products of one row with as many keys as a register has lanes, reduced together into one register of scores.
//
// [NOTE] Excluded keys. Their score is -inf and their weight exactly 0. But 0 * v is NaN where v is NaN or infinite,
// and so is a NaN score to which a mask adds -inf. The output is watched for that at its end, where it costs nothing,
// and a block that shows it is computed again, carefully: scores of excluded keys are set, not added to, and sums leave
// out weights of 0.
//
// Math, the arithmetic of a variant, offers:
//   Storage                           element type of q, k, v and out
//   per_word                          elements in a 32-bit word, the unit that is broadcast and multiplied
//   scales_query                      whether packed Q carries the scale; otherwise scores are multiplied by it
//   reads_in_place                    whether words are the storage itself, so that K needs no conversion
//   multiply_add(a, b, c)             c + a * b, word by word
//   load_words(p, n)                  n <= lanes * per_word adjacent elements as words, zero behind them
//   gather_words(p, stride, n)        the same, elements apart
//   exp2(x)                           as exact as the weights need, for x <= 0; 0 for -inf, NaN stays NaN
//   join(w)                           weights of per_word keys, a register each -> one register of words
//   join_adjacent(w, to)              per_word registers of adjacent keys' weights -> words in memory
//   nonzero_bits(word)                all ones in the elements of a word that are not 0
//   pack_pairs(v, ..., to, stride)    where per_word is 2: V as pairs of keys
#pragma once

#include "cpu/kernels/attention.h"
#include "cpu/vec/math.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
constexpr int kRowVectors = 4;
constexpr int kRows = kRowVectors * kLanes;  // query rows of a block
static_assert(kRows <= tuning::kAttentionTaskRows);
// Accumulators of a register tile, and the most vectors on its wide side; the rest holds operands.
constexpr int kTileSums = F32::registers >= 32 ? 24 : 12;
constexpr int kTileVectors = F32::registers >= 32 ? 4 : 2;
// Keys whose weights are summed before they join the total.
constexpr int kTogether = 4;
// Up to this many rows the head size goes into the lanes.
constexpr int kShortRows = kLanes / 2;
// Distance of the score rows of a short block: room for a chunk and the tail of its last vector.
constexpr int kShortStride = tuning::kAttentionMaxChunk + 16;

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 3.402823466e38f;
// Below every score that is not -inf; the maximum of a row that has seen no key.
constexpr float kLowest = -3.4e38f;

LAMINA_INLINE int smaller(int a, int b) { return a < b ? a : b; }
LAMINA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LAMINA_INLINE int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// The word at a byte address, on every lane. Words may hold anything (a pair of bfloat16 is no float), they are only
// moved.
LAMINA_INLINE F32 broadcast_word(const char* p) {
  float word;
  memcpy(&word, p, 4);
  return set1(word);
}

LAMINA_INLINE bool is_bool(AttentionMask type) { return type == AttentionMask::boolean; }
LAMINA_INLINE int mask_bytes(AttentionMask type) {
  return type == AttentionMask::boolean ? 1 : type == AttentionMask::float32 ? 4 : 2;
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

// n <= lanes elements of an additive mask; 0 behind them. Finite values that log2(e) would push to -inf stay finite
// (finfo.min is in use for "almost masked").
LAMINA_INLINE F32 load_added(AttentionMask type, const char* p, int64_t stride, int n) {
  const float* floats = reinterpret_cast<const float*>(p);
  const bf16* halves = reinterpret_cast<const bf16*>(p);
  F32 x;
  if (stride == 1) {
    x = type == AttentionMask::float32 ? load_up_to(floats, n) : load_up_to(halves, n);
  } else {
    float t[kLanes] = {0};
    for (int i = 0; i < n; ++i) {
      t[i] = type == AttentionMask::float32 ? floats[i * stride] : bf16_to_float(halves[i * stride]);
    }
    x = load(t);
  }
  return select(excludes(x), x, max(set1(-2.2e38f), x));
}

// A score in log2 units and what the mask adds to it.
LAMINA_INLINE F32 add_mask(F32 score, F32 added, bool careful) {
  const F32 sum = fmadd(added, set1(kLog2E), score);
  return careful ? select(excludes(added), set1(-kInfinity), sum) : sum;
}

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

// Scores in log2 units less the row's maximum -> weights.
template <class Math>
LAMINA_INLINE F32 weight_of(F32 score, F32 maximum) {
  return Math::exp2(score - maximum);
}

// What the S tiles of one chunk share.
struct ScoreTiles {
  const float* q;  // [words][kRows]
  const char* k;   // keys, k_stride bytes apart
  int64_t k_stride;
  int words;
  float factor;          // of the scores; 1 where the query carries the scale
  const uint64_t* kept;  // null, or for each key the rows that keep it, as bits
  const float* added;    // null, or [key] (per_key) or [key][kRows]
  bool per_key;
  bool careful;       // see [NOTE] Excluded keys
  const float* last;  // last key of each row, counted from the chunk's first
  float* s;           // [key][kRows]
  F32* maximum;       // [kRowVectors]
};

// KT keys from `key` on times NV query vectors from `v0` on. `limited`: some row's last key comes before the tile's
// end.
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
      const F32 last = load(t.last + (v0 + v) * kLanes);
      LAMINA_UNROLL
      for (int k = 0; k < KT; ++k) {
        acc[k][v] = select(less(last, set1(float(key + k))), set1(-kInfinity), acc[k][v]);
      }
    }
  }
  float* s = t.s + key * kRows + v0 * kLanes;
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

// What the O tiles of one chunk share.
template <class T>
struct ValueTiles {
  const float* weights;  // words, strides given by the tile
  const float* v;        // words, [key / per_word][v_stride]
  int64_t v_stride;
  const float* rescale;  // [row]: factor of the sums so far; null when there are none
  const float* inverse;  // [row]: factor of the finished sums; null when keys follow
  float* sums;           // [row][sum_stride]
  int sum_stride;
  T* out;  // finished rows go to out + out_offset[row]
  const int64_t* out_offset;
  int columns;
  F32* watch;  // becomes NaN when a finished sum is not finite
};

// R rows from `row` on times C vectors of value columns from `column` on, over `steps` words of keys.
// kCareful: the same sums bit for bit, but values of weight 0 count as 0 (for a single row).
template <class Math, int R, int C, int kRowStride, int kKeyStride, bool kCareful = false>
__attribute__((noinline)) void value_tile(const ValueTiles<typename Math::Storage>& t, int row, int column, int steps) {
  F32 acc[R][C];
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) {
    LAMINA_UNROLL
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  }
  const float* p = t.weights + row * kRowStride;
  const float* v = t.v + column;
  const int64_t v_stride = t.v_stride;
#pragma GCC unroll 2
  for (int j = 0; j < steps; ++j) {
    F32 x[C];
    LAMINA_UNROLL
    for (int c = 0; c < C; ++c) x[c] = load(v + c * kLanes);
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (kCareful) {
        static_assert(R == 1);
        LAMINA_UNROLL
        for (int c = 0; c < C; ++c) x[c] = and_bits(x[c], Math::nonzero_bits(p[0]));
      }
      const F32 b = set1(p[r * kRowStride]);
      LAMINA_UNROLL
      for (int c = 0; c < C; ++c) acc[r][c] = Math::multiply_add(x[c], b, acc[r][c]);
    }
    p += kKeyStride;
    v += v_stride;
  }
  // The chunk is summed by itself before it joins the sums so far: shorter chains, half the rounding error.
  float* sums = t.sums + row * t.sum_stride + column;
  if (t.rescale) {
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      const F32 f = set1(t.rescale[row + r]);
      LAMINA_UNROLL
      for (int c = 0; c < C; ++c) acc[r][c] = fmadd(f, load(sums + r * t.sum_stride + c * kLanes), acc[r][c]);
    }
  }
  if (!t.inverse) {
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      LAMINA_UNROLL
      for (int c = 0; c < C; ++c) store(sums + r * t.sum_stride + c * kLanes, acc[r][c]);
    }
    return;
  }
  F32 watch = *t.watch;
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) {
    const F32 f = set1(t.inverse[row + r]);
    auto* out = t.out + t.out_offset[row + r] + column;
    LAMINA_UNROLL
    for (int c = 0; c < C; ++c) {
      const F32 x = f * acc[r][c];
      watch = fmadd(x, zero(), watch);
      if (column + (c + 1) * kLanes <= t.columns) {
        store(out + c * kLanes, x);
      } else {
        store_n(out + c * kLanes, x, t.columns - column - c * kLanes);
      }
    }
  }
  *t.watch = watch;
}

// Fetches rows into L2 that will soon be written or read, a few at each step: they may lie a page apart (heads of one
// merged projection), where no hardware prefetcher follows, and stores that miss hold up what comes after them.
class Prefetch {
 public:
  // [rows, row_bytes], `stride` bytes apart; `writes`: they are to be written.
  void add(const void* first, int64_t stride, int64_t row_bytes, int64_t rows, bool writes) {
    if (rows > 0) parts_[count_++] = {static_cast<const char*>(first), stride, row_bytes, rows, writes};
    rows_ += rows;
  }
  void set_steps(int64_t steps) { rows_per_step_ = (rows_ + steps - 1) / steps; }

  LAMINA_INLINE void step() {
    for (int64_t i = 0; i < rows_per_step_ && part_ < count_; ++i) {
      Part& p = parts_[part_];
      for (int64_t byte = 0; byte < p.row_bytes; byte += 64) {
        if (p.writes) {
          __builtin_prefetch(p.row + byte, 1, 2);
        } else {
          __builtin_prefetch(p.row + byte, 0, 2);
        }
      }
      p.row += p.stride;
      if (--p.rows == 0) ++part_;
    }
  }

 private:
  struct Part {
    const char* row;
    int64_t stride, row_bytes, rows;
    bool writes;
  };
  Part parts_[4];
  int count_ = 0, part_ = 0;
  int64_t rows_ = 0, rows_per_step_ = 0;
};

template <class Math>
class Block {
  using T = typename Math::Storage;
  static constexpr int kPerWord = Math::per_word;

 public:
  // `careful`: see [NOTE] Excluded keys.
  Block(const AttentionArgs& args, int64_t first_row, int rows, bool careful)
      : a_(args),
        first_row_(first_row),
        rows_(rows),
        vectors_((rows + kLanes - 1) / kLanes),
        words_((args.head_size + kPerWord - 1) / kPerWord),
        columns_(round_up(args.value_size, kLanes)),
        careful_(careful) {
    q_ = args.scratch;
    s_ = q_ + tuning::kAttentionTaskRows * round_up(args.head_size, 16);
    added_ = s_ + tuning::kAttentionTaskRows * (tuning::kAttentionMaxChunk + 32);
    sums_ = added_ + tuning::kAttentionTaskRows * (tuning::kAttentionMaxChunk + 32);
    k_ = sums_ + tuning::kAttentionTaskRows * round_up(args.value_size, 16);
    v_ = k_ + (tuning::kAttentionMaxChunk + 32) * round_up(args.head_size, 16);

    int64_t head = first_row / args.queries, query = first_row % args.queries;
    end_ = 0;
    for (int r = 0; r < rows; ++r) {
      q_offset_[r] = head * args.q_head + query * args.q_row;
      out_offset_[r] = head * args.out_head + query * args.out_row;
      mask_offset_[r] = head * args.mask_head + query * args.mask_row;
      last_key_[r] = args.causal ? smaller(query, args.keys - 1) : args.keys - 1;
      if (last_key_[r] >= end_) end_ = last_key_[r] + 1;
      if (++query == args.queries) {
        query = 0;
        ++head;
      }
    }
    // Lanes without a row behave like the last one; nothing reads what they give.
    for (int r = rows; r < vectors_ * kLanes; ++r) last_key_[r] = last_key_[rows - 1];
    for (int v = 0; v < vectors_; ++v) {
      vector_last_[v] = first_limit_[v] = last_key_[v * kLanes];
      for (int i = 1; i < kLanes; ++i) {
        const int64_t last = last_key_[v * kLanes + i];
        if (last > vector_last_[v]) vector_last_[v] = last;
        if (last < first_limit_[v]) first_limit_[v] = last;
      }
    }
    for (int v = vectors_ - 2; v >= 0; --v) first_limit_[v] = smaller(first_limit_[v], first_limit_[v + 1]);
    same_mask_ = true;
    for (int r = 1; r < rows; ++r) same_mask_ = same_mask_ && mask_offset_[r] == mask_offset_[0];
  }

  // While the last chunk is multiplied: the rows to be written after it, and what the next call reads.
  void look_ahead(int keys) {
    constexpr int64_t kSize = sizeof(T);
    ahead_ = Prefetch();
    ahead_.add(static_cast<const T*>(a_.out) + out_offset_[0], a_.out_row * kSize, a_.value_size * kSize,
               first_row_ / a_.queries == (first_row_ + rows_ - 1) / a_.queries ? rows_ : 0, true);
    if (a_.next_k && first_row_ + rows_ == a_.first_row + a_.rows) {
      const int64_t chunk = smaller(a_.keys, int64_t{tuning::kAttentionChunk});
      const int64_t queries = smaller(a_.queries, int64_t{tuning::kAttentionTaskRows});
      ahead_.add(a_.next_k, a_.k_row * kSize, a_.head_size * kSize, chunk, false);
      ahead_.add(a_.next_q, a_.q_row * kSize, a_.head_size * kSize, queries, false);
      ahead_.add(a_.next_v, a_.v_row * kSize, a_.value_size * kSize, chunk, false);
    }
    ahead_.set_steps(keys * vectors_ / kTileSums + 1);
  }

  // False when something not finite came out although keys were excluded: to be done again, carefully.
  bool run() {
    if (rows_ <= kShortRows) {
      pack_short_query();
      each_chunk<true>();
    } else {
      pack_query();
      each_chunk<false>();
    }
    const bool excludes = a_.causal || a_.mask_type != AttentionMask::none;
    const float watched = reduce_add(watch_);
    return careful_ || !excludes || watched == watched;
  }

 private:
  const T* query_row(int r) const { return static_cast<const T*>(a_.q) + q_offset_[r]; }

  // Words [w, w + lanes) of a row of n elements, zero behind its end.
  static LAMINA_INLINE F32 row_words(const T* row, int64_t col, int n, int w) {
    const int rest = smaller(n - w * kPerWord, kLanes * kPerWord);
    return col == 1 ? Math::load_words(row + w * kPerWord, rest)
                    : Math::gather_words(row + w * kPerWord * col, col, rest);
  }

  // log2(e) turns exp into exp2.
  float factor() const { return a_.scale * kLog2E; }
  F32 query_factor() const { return set1(Math::scales_query ? factor() : 1.0f); }

  void pack_query() {
    const F32 factor = query_factor();
    for (int v = 0; v < vectors_; ++v) {
      for (int w = 0; w < words_; w += kLanes) {
        F32 x[kLanes];
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) {
          const int r = v * kLanes + i;
          x[i] = r < rows_ ? row_words(query_row(r), a_.q_col, a_.head_size, w) : zero();
          if constexpr (Math::scales_query) x[i] = x[i] * factor;
        }
        transpose(x);
        float* to = q_ + w * kRows + v * kLanes;
        const int count = smaller(kLanes, words_ - w);
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) {
          if (i < count) store(to + i * kRows, x[i]);
        }
      }
    }
  }

  // [row][words, rounded up to lanes]
  void pack_short_query() {
    const int stride = round_up(words_, kLanes);
    for (int r = 0; r < rows_; ++r) {
      for (int w = 0; w < words_; w += kLanes) {
        F32 x = row_words(query_row(r), a_.q_col, a_.head_size, w);
        if constexpr (Math::scales_query) x = x * query_factor();
        store(q_ + r * stride + w, x);
      }
    }
  }

  // Keys of the chunk as words: in place where that is possible, else packed with rows of whole registers.
  void load_keys(int64_t first, int n, bool whole_registers) {
    const T* k = static_cast<const T*>(a_.k) + first * a_.k_row;
    if (Math::reads_in_place && a_.k_col == 1 && a_.head_size % (whole_registers ? kLanes * kPerWord : kPerWord) == 0) {
      keys_ = reinterpret_cast<const char*>(k);
      key_stride_ = a_.k_row * int64_t(sizeof(T));
      return;
    }
    const int stride = round_up(words_, kLanes);
    for (int j = 0; j < n; ++j) {
      for (int w = 0; w < words_; w += kLanes) {
        store(k_ + j * stride + w, row_words(k + j * a_.k_row, a_.k_col, a_.head_size, w));
      }
    }
    keys_ = reinterpret_cast<const char*>(k_);
    key_stride_ = stride * int64_t(sizeof(float));
  }

  void load_values(int64_t first, int n) {
    const T* v = static_cast<const T*>(a_.v) + first * a_.v_row;
    if constexpr (kPerWord == 1) {
      if (Math::reads_in_place && a_.v_col == 1 && a_.value_size % kLanes == 0) {
        values_ = reinterpret_cast<const float*>(v);
        value_stride_ = a_.v_row;
        return;
      }
      for (int j = 0; j < n; ++j) {
        for (int c = 0; c < a_.value_size; c += kLanes) {
          store(v_ + j * columns_ + c, row_words(v + j * a_.v_row, a_.v_col, a_.value_size, c));
        }
      }
    } else {
      Math::pack_pairs(v, a_.v_row, a_.v_col, n, a_.value_size, v_, columns_);
    }
    values_ = v_;
    value_stride_ = columns_;
  }

  // What the mask does to a chunk of keys, narrowed to those between the first and the last that any row keeps.
  struct MaskedChunk {
    int begin = tuning::kAttentionMaxChunk, end = 0;  // of the kept keys
    bool plain = true;                                // no key in between is excluded, nothing is added

    void keep(int key) {
      if (key < begin) begin = key;
      if (key >= end) end = key + 1;
    }
  };

  const char* mask_row(int r, int64_t key) const {
    return static_cast<const char*>(a_.mask) + (mask_offset_[r] + key * a_.mask_col) * mask_bytes(a_.mask_type);
  }

  // Fills kept_ (not for short blocks, which read the mask as it lies).
  template <bool kShort>
  MaskedChunk prepare_boolean(int64_t first, int n) {
    MaskedChunk chunk;
    const int rows = same_mask_ ? 1 : rows_;
    for (int j = 0; j < n; j += 64) {
      const int count = smaller(64, n - j);
      uint64_t bits[64];
      uint64_t any = 0, all = ~uint64_t{0};
      for (int r = 0; r < rows; ++r) {
        bits[r] = load_kept_bits(mask_row(r, first + j), a_.mask_col, count);
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

  // Fills added_: [key] where all rows have one mask row, else [key][kRows] (not for short blocks).
  template <bool kShort>
  MaskedChunk prepare_added(int64_t first, int n) {
    MaskedChunk chunk;
    for (int j = 0; j < n; j += kLanes) {
      const int count = smaller(kLanes, n - j);
      Mask excluded = all_lanes();
      F32 squares = zero();
      const auto see = [&](F32 x) __attribute__((always_inline)) {
        excluded = excluded & excludes(x);
        squares = fmadd(x, x, squares);
      };
      if (same_mask_) {
        const F32 x = load_added(a_.mask_type, mask_row(0, first + j), a_.mask_col, count);
        see(x);
        store(added_ + j, x);
      } else if constexpr (kShort) {
        for (int r = 0; r < rows_; ++r) see(load_added(a_.mask_type, mask_row(r, first + j), a_.mask_col, count));
      } else {
        const bool simple = a_.mask_type == AttentionMask::float32 && a_.mask_col == 1 && count == kLanes;
        for (int v = 0; v < vectors_; ++v) {
          F32 x[kLanes];
          LAMINA_UNROLL
          for (int i = 0; i < kLanes; ++i) {
            // Lanes without a row repeat the last one.
            const char* p = mask_row(smaller(v * kLanes + i, rows_ - 1), first + j);
            x[i] = simple ? load_added(AttentionMask::float32, p, 1, kLanes)
                          : load_added(a_.mask_type, p, a_.mask_col, count);
          }
          LAMINA_UNROLL
          for (int i = 0; i < kLanes; ++i) see(x[i]);
          transpose(x);
          LAMINA_UNROLL
          for (int i = 0; i < kLanes; ++i) store(added_ + (j + i) * kRows + v * kLanes, x[i]);
        }
      }
      chunk.plain = chunk.plain && all(less(squares, set1(1e-30f)));
      if (all(excluded)) continue;
      float kept[kLanes];
      store(kept, select(excluded, zero(), set1(1.0f)));
      for (int i = 0; i < count; ++i) {
        if (kept[i] != 0.0f) chunk.keep(j + i);
      }
    }
    return chunk;
  }

  template <bool kShort>
  void each_chunk() {
    for (int v = 0; v < kRowVectors; ++v) {
      maximum_[v] = set1(kLowest);
      total_[v] = zero();
    }
    for (int r = 0; r < kShortRows; ++r) {
      short_maximum_[r] = kLowest;
      short_total_[r] = 0.0f;
    }
    watch_ = zero();
    bool started = false, finished = false;
    for (int64_t next = 0; next < end_;) {
      int64_t first = next;
      int n = int(smaller(end_ - first, int64_t{tuning::kAttentionChunk}));
      // A short rest is taken along rather than left to a chunk of its own.
      if (end_ - first <= tuning::kAttentionMaxChunk) n = int(end_ - first);
      next = first + n;
      bool masked = false;
      if (a_.mask_type != AttentionMask::none) {
        const MaskedChunk chunk =
            is_bool(a_.mask_type) ? prepare_boolean<kShort>(first, n) : prepare_added<kShort>(first, n);
        if (chunk.end == 0) continue;
        masked = !chunk.plain;
        mask_begin_ = chunk.begin;
        first += chunk.begin;
        n = chunk.end - chunk.begin;
      }
      const bool is_last = next == end_;
      load_keys(first, n, kShort);
      if constexpr (kShort) {
        short_weights(first, n, masked, is_last);
      } else {
        if (is_last && a_.far) look_ahead(n);
        weights(first, n, masked, is_last);
      }
      load_values(first, n);
      ValueTiles<T> tiles{s_,
                          values_,
                          value_stride_,
                          started ? rescale_ : nullptr,
                          is_last ? inverse_ : nullptr,
                          sums_,
                          columns_,
                          static_cast<T*>(a_.out),
                          out_offset_,
                          a_.value_size,
                          &watch_};
      if (careful_) {
        careful_values<kShort>(tiles, n);
      } else {
        values<kShort>(tiles, first, n);
      }
      started = true;
      finished = is_last;
    }
    if (!finished) finish<kShort>(started);
  }

  // The first query vector with a row that takes key j of the chunk.
  int first_vector(int64_t key) const {
    int v = 0;
    while (v + 1 < vectors_ && vector_last_[v] < key) ++v;
    return v;
  }

  template <int NV>
  static void score_keys(const ScoreTiles& t, int keys, int key, int v0, bool limited) {
    constexpr int kMost = NV <= kTileVectors ? kTileSums / NV : 1;
    if (keys == kMost) {
      score_tile<Math, NV, kMost>(t, key, v0, limited);
    } else if (keys == kTileSums / kTileVectors) {
      score_tile<Math, NV, kTileSums / kTileVectors>(t, key, v0, limited);
    } else if (keys == 4) {
      score_tile<Math, NV, 4>(t, key, v0, limited);
    } else {
      score_tile<Math, NV, 1>(t, key, v0, limited);
    }
  }

  // Scores of the chunk -> weights in place, in words; updates maximum, total, rescale and, at the end, inverse.
  void weights(int64_t first, int n, bool masked, bool is_last) {
    float last[kRows];
    if (a_.causal) {
      for (int r = 0; r < vectors_ * kLanes; ++r) last[r] = float(smaller(last_key_[r] - first, int64_t{n}));
    }
    F32 chunk_maximum[kRowVectors];
    for (int v = 0; v < vectors_; ++v) chunk_maximum[v] = set1(-kInfinity);
    const bool boolean = is_bool(a_.mask_type);
    const ScoreTiles t{q_,
                       keys_,
                       key_stride_,
                       words_,
                       factor(),
                       masked && boolean ? kept_ + mask_begin_ : nullptr,
                       masked && !boolean ? added_ + mask_begin_ * (same_mask_ ? 1 : kRows) : nullptr,
                       same_mask_,
                       careful_,
                       last,
                       s_,
                       chunk_maximum};
    for (int j = 0; j < n;) {
      const int v0 = first_vector(first + j);
      const int group = smaller(vectors_ - v0, kTileVectors);
      int keys = kTileSums / group;
      // The last tile starts early enough to be a full one: doing a few keys twice is cheaper than small tiles.
      if (keys > n) keys = n >= 4 ? 4 : 1;
      const int key = smaller(j, n - keys);
      const bool limited = first + key + keys - 1 > first_limit_[v0];
      for (int v = v0; v < vectors_; v += group) {
        switch (smaller(group, vectors_ - v)) {
          case 1: score_keys<1>(t, keys, key, v, limited); break;
          case 2: score_keys<2>(t, keys, key, v, limited); break;
          case 3: score_keys<3>(t, keys, key, v, limited); break;
          default: score_keys<4>(t, keys, key, v, limited);
        }
      }
      ahead_.step();
      j = key + keys;
    }
    for (int v = 0; v < vectors_; ++v) {
      const F32 m = max(maximum_[v], chunk_maximum[v]);
      const F32 f = weight_of<Math>(maximum_[v], m);
      store(rescale_ + v * kLanes, f);
      total_[v] = total_[v] * f;
      maximum_[v] = m;
    }
    // Every row takes every key up to `whole`. The keys behind it go by one vector at a time, each up to the last key
    // that one of its rows takes.
    int whole = round_up(n, kTogether);
    if (a_.causal && first_limit_[0] < first + n - 1) {
      const int64_t shared = first_limit_[0] + 1 - first;
      whole = shared > 0 ? int(shared) / kTogether * kTogether : 0;
    }
    for (int v = 0; v < vectors_; ++v) exclude_rows(v, n, whole);
    switch (vectors_) {
      case 1: exponentials<1>(0, 0, whole); break;
      case 2: exponentials<2>(0, 0, whole); break;
      case 3: exponentials<3>(0, 0, whole); break;
      default: exponentials<4>(0, 0, whole);
    }
    for (int v = 0; v < vectors_ && whole < n; ++v) {
      const int64_t taken = smaller(vector_last_[v] + 1 - first, int64_t{n});
      const int end = taken > whole ? int(taken) : whole, padded = round_up(end, kTogether);
      exclude_rows(v, end, padded);
      exponentials<1>(v, whole, padded);
      for (int j = padded / kPerWord; j * kPerWord < n; ++j) store(s_ + j * kRows + v * kLanes, zero());
    }
    if (is_last) {
      for (int v = 0; v < vectors_; ++v) {
        store(inverse_ + v * kLanes, select(less(total_[v], set1(1e-30f)), zero(), reciprocal(total_[v])));
      }
    }
  }

  // Vector v of the score rows [begin, end) counts as masked out.
  void exclude_rows(int v, int begin, int end) {
    for (int j = begin; j < end; ++j) store(s_ + j * kRows + v * kLanes, set1(-kInfinity));
  }

  // Scores -> weights of NV vectors from v0 on and the keys [begin, end), multiples of kTogether. The weights of
  // kTogether keys are summed before they join the total: a sum of hundreds of terms one by one would be a large part
  // of the error.
  template <int NV>
  __attribute__((noinline)) void exponentials(int v0, int begin, int end) {
    F32 m[NV], total[NV];
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) {
      m[v] = maximum_[v0 + v];
      total[v] = zero();
    }
    const float* from = s_ + begin * kRows + v0 * kLanes;
    float* to = s_ + begin / kPerWord * kRows + v0 * kLanes;
    for (int j = begin; j < end; j += kTogether) {
      LAMINA_UNROLL
      for (int v = 0; v < NV; ++v) {
        F32 w[kTogether / kPerWord][kPerWord];
        LAMINA_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          w[i / kPerWord][i % kPerWord] = weight_of<Math>(load(from + i * kRows + v * kLanes), m[v]);
        }
        LAMINA_UNROLL
        for (int i = 0; i < kTogether / kPerWord; ++i) store(to + i * kRows + v * kLanes, Math::join(w[i]));
        const F32* each = w[0];
        total[v] = total[v] + ((each[0] + each[1]) + (each[2] + each[3]));
      }
      from += kTogether * kRows;
      to += kTogether / kPerWord * kRows;
    }
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) total_[v0 + v] = total_[v0 + v] + total[v];
  }

  // The same for a block of few rows; scores lie as [row][kShortStride].
  void short_weights(int64_t first, int n, bool masked, bool is_last) {
    const int q_stride = round_up(words_, kLanes);
    F32 chunk_maximum[kShortRows];
    for (int r = 0; r < rows_; ++r) chunk_maximum[r] = set1(-kInfinity);
    const F32 factor_vector = set1(factor());
    for (int j = 0; j < n; j += kLanes) {
      const int count = smaller(kLanes, n - j);
      // Rows behind the last key repeat it.
      const char* row[kLanes];
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) row[i] = keys_ + smaller(j + i, n - 1) * key_stride_;
      for (int r = 0; r < rows_; ++r) {
        const float* q = q_ + r * q_stride;
        F32 acc[kLanes];
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) acc[i] = zero();
        for (int w = 0; w < q_stride; w += kLanes) {
          const F32 x = load(q + w);
          LAMINA_UNROLL
          for (int i = 0; i < kLanes; ++i) {
            acc[i] = Math::multiply_add(x, load(reinterpret_cast<const float*>(row[i]) + w), acc[i]);
          }
        }
        F32 s = reduce_add_each(acc);
        if constexpr (!Math::scales_query) s = s * factor_vector;
        if (masked) {
          const char* p = mask_row(r, first + j);
          if (is_bool(a_.mask_type)) {
            const Mask kept = lanes_of_bits(uint32_t(load_kept_bits(p, a_.mask_col, count)));
            s = select(kept, s, set1(-kInfinity));
          } else {
            s = add_mask(s, load_added(a_.mask_type, p, a_.mask_col, count), careful_);
          }
        }
        const int64_t taken = last_key_[r] + 1 - (first + j);
        const int valid = int(smaller(taken, int64_t{count}));
        if (valid < kLanes) s = select(less(iota(), set1(float(valid))), s, set1(-kInfinity));
        store(s_ + r * kShortStride + j, s);
        chunk_maximum[r] = max(chunk_maximum[r], s);
      }
    }
    for (int r = 0; r < rows_; ++r) {
      float* s = s_ + r * kShortStride;
      // A NaN among the lanes may be lost here; its own weight is NaN and so becomes the total.
      float m = reduce_max(chunk_maximum[r]);
      if (!(m > short_maximum_[r])) m = short_maximum_[r];
      alignas(64) float f[kLanes];
      store(f, weight_of<Math>(set1(short_maximum_[r]), set1(m)));
      F32 total = zero();
      constexpr int kStep = kLanes * kPerWord;
      const int stored = round_up(n, kLanes);
      for (int j = 0; j < n; j += kStep) {
        F32 w[kPerWord];
        LAMINA_UNROLL
        for (int i = 0; i < kPerWord; ++i) {
          w[i] = j + i * kLanes < stored ? weight_of<Math>(load(s + j + i * kLanes), set1(m)) : zero();
          total = total + w[i];
        }
        Math::join_adjacent(w, s + j / kPerWord);
      }
      rescale_[r] = f[0];
      short_total_[r] = short_total_[r] * f[0] + reduce_add(total);
      short_maximum_[r] = m;
      if (is_last) inverse_[r] = short_total_[r] < 1e-30f ? 0.0f : 1.0f / short_total_[r];
    }
  }

  template <bool kShort>
  static constexpr int row_stride() {
    return kShort ? kShortStride : 1;
  }
  template <bool kShort>
  static constexpr int key_stride() {
    return kShort ? 1 : kRows;
  }

  template <bool kShort>
  void values(const ValueTiles<T>& t, int64_t first, int n) const {
    const int vectors = columns_ / kLanes;
    for (int c = 0; c < vectors;) {
      const int groups = (vectors - c + kTileVectors - 1) / kTileVectors;
      const int width = (vectors - c + groups - 1) / groups;
      switch (width) {
        case 1: value_rows<1, kShort>(t, first, n, c * kLanes); break;
        case 2: value_rows<2, kShort>(t, first, n, c * kLanes); break;
        case 3: value_rows<3, kShort>(t, first, n, c * kLanes); break;
        default: value_rows<4, kShort>(t, first, n, c * kLanes);
      }
      c += width;
    }
  }

  template <int C, bool kShort>
  void value_rows(const ValueTiles<T>& t, int64_t first, int n, int column) const {
    if constexpr (C <= kTileVectors) {
      constexpr int kMost = kTileSums / C < 12 ? kTileSums / C : 12;
      value_rows_from<kShort ? 4 : kMost, C, kShort>(t, first, n, column, 0);
    }
  }

  template <int R, int C, bool kShort>
  void value_rows_from(const ValueTiles<T>& t, int64_t first, int n, int column, int row) const {
    while (row + R <= rows_) {
      int keys = n;
      if (a_.causal) {
        int64_t last = 0;
        for (int r = row; r < row + R; ++r) last = last_key_[r] > last ? last_key_[r] : last;
        keys = int(smaller(int64_t{n}, last + 1 - first));
        if (keys < 0) keys = 0;
      }
      value_tile<Math, R, C, row_stride<kShort>(), key_stride<kShort>()>(t, row, column,
                                                                         (keys + kPerWord - 1) / kPerWord);
      row += R;
    }
    if constexpr (R > 1) {
      if (row < rows_) value_rows_from<(R > 8 ? 6 : R > 4 ? 4 : R / 2), C, kShort>(t, first, n, column, row);
    }
  }

  template <bool kShort>
  void careful_values(const ValueTiles<T>& t, int n) const {
    for (int r = 0; r < rows_; ++r) {
      for (int c = 0; c < columns_; c += kLanes) {
        value_tile<Math, 1, 1, row_stride<kShort>(), key_stride<kShort>(), true>(t, r, c,
                                                                                 (n + kPerWord - 1) / kPerWord);
      }
    }
  }

  void store_row(int r, float factor) const {
    for (int c = 0; c < columns_; c += kLanes) {
      store_up_to(static_cast<T*>(a_.out) + out_offset_[r] + c, load(sums_ + r * columns_ + c) * set1(factor),
                  smaller(kLanes, a_.value_size - c));
    }
  }

  // When the last chunk took no part: what the sums hold goes out, or 0 where there is none.
  template <bool kShort>
  void finish(bool started) {
    alignas(64) float total[kRows];
    for (int v = 0; v < kRowVectors; ++v) store(total + v * kLanes, total_[v]);
    for (int r = 0; r < rows_; ++r) {
      const float sum = kShort ? short_total_[kShort ? r : 0] : total[r];
      if (!started) {
        for (int c = 0; c < columns_; c += kLanes) store(sums_ + r * columns_ + c, zero());
      }
      store_row(r, sum < 1e-30f ? 0.0f : 1.0f / sum);
      for (int c = 0; c < columns_; c += kLanes) watch_ = fmadd(load(sums_ + r * columns_ + c), zero(), watch_);
    }
  }

  const AttentionArgs& a_;
  const int64_t first_row_;
  const int rows_, vectors_, words_, columns_;
  const bool careful_;
  Prefetch ahead_;
  bool same_mask_;      // whether all rows have one mask row
  int mask_begin_ = 0;  // where the narrowed chunk starts in kept_ or added_
  int64_t end_;         // keys that any row takes
  float *q_, *s_, *added_, *sums_, *k_, *v_;
  uint64_t kept_[tuning::kAttentionMaxChunk];
  const char* keys_;
  int64_t key_stride_;
  const float* values_;
  int64_t value_stride_;
  F32 maximum_[kRowVectors], total_[kRowVectors], watch_;
  float short_maximum_[kShortRows], short_total_[kShortRows];
  alignas(64) float rescale_[kRows];
  alignas(64) float inverse_[kRows];
  int64_t q_offset_[kRows], out_offset_[kRows], mask_offset_[kRows], last_key_[kRows];
  int64_t vector_last_[kRowVectors];  // the last key that any row of the vector takes
  int64_t first_limit_[kRowVectors];  // the last key that every row of this and later vectors takes
};

template <class Math>
void attention(const AttentionArgs& args) {
  for (int64_t row = args.first_row; row < args.first_row + args.rows; row += kRows) {
    const int rows = int(smaller(int64_t{kRows}, args.first_row + args.rows - row));
    if (!Block<Math>(args, row, rows, false).run()) Block<Math>(args, row, rows, true).run();
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
