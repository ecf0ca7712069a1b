// The body of the attention kernels, written once over the arithmetic that a variant brings.
//
// The idea: hold the scores transposed. A block of query rows lies in the vector lanes and keys are broadcast,
//
//   S[key][query lanes] = sum_d Q^T[d][query lanes] * K[key][d]        Q^T packed once per block, K read as it lies
//
// so the sum of softmax is a vertical operation, and exp(S), taken before S leaves the registers, is already in the
// layout that the second product wants to broadcast from:
//
//   O[query][value lanes] += P[key][query] * V[key][value lanes]       V read as it lies
//
// Both products are register tiles of kTileSums accumulators (keys x query vectors, queries x value vectors), and keys
// go by in chunks with online softmax. log2(e) is folded into the scale, so that exp is exp2. What causality or a
// window empties is left out by whole query vectors. A sink is where the running maximum and sum begin.
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
//   dims_per_word, keys_per_word      elements in a 32-bit word, the unit that is broadcast and multiplied: neighbours
//                                     in a row of Q and K, and keys of P and V
//   int8_scores                       whether scores come from codes (see attention_codes.h)
//   scales_query                      whether packed Q carries the scale; otherwise scores are multiplied by it
//   reads_in_place                    whether words are the storage itself, so that K needs no conversion
//   score_multiply_add, multiply_add(a, b, c)   c + a * b, word by word, of Q K^T and of P V
//   load_words(p, n)                  n <= lanes * dims_per_word adjacent elements as words, zero behind them
//   gather_words(p, stride, n)        the same, elements apart
//   exp2(x)                           as exact as the weights need; 0 for -inf, NaN stays NaN
//   join(w)                           weights of keys_per_word keys, a register each -> one register of words
//   add_weights(word, sum)             the weights of a word of join, added to a sum
//   join_adjacent(w, to)              keys_per_word registers of adjacent keys' weights -> words in memory
//   nonzero_bits(word)                all ones in the elements of a word that are not 0
//   pack_pairs(v, ..., to, stride)    where keys_per_word is 2: V as pairs of keys
#pragma once

#include "cpu/kernels/attention_codes.h"
#include "cpu/kernels/attention_prefetch.h"
#include "cpu/kernels/attention_values.h"
#include "cpu/vec/philox.h"

namespace lamina::LAMINA_ISA {
namespace {

// How far (in log2 units) scores may be from the base of their row; beyond, the base moves. Weights of 2^24 and 2^-24
// leave floats all their precision and room enough.
constexpr float kMostFromBase = 24.0f;
// Up to this many rows the head size goes into the lanes.
constexpr int kShortRows = kLanes / 2;
// Distance of the score rows of a short block: room for a chunk and the tail of its last vector.
constexpr int kShortStride = tuning::kAttentionMaxChunk + 16;

template <class Math>
class Block {
  using T = typename Math::Storage;
  static constexpr int kPerWord = Math::keys_per_word, kDims = Math::dims_per_word;

 public:
  // `careful`: see [NOTE] Excluded keys.
  Block(const AttentionArgs& args, int64_t first_row, int rows, bool careful)
      : a_(args),
        rows_(args, first_row, rows),
        words_((args.head_size + kDims - 1) / kDims),
        columns_(round_up(args.value_size, kLanes)),
        careful_(careful),
        q_(args.scratch),
        s_(q_ + tuning::kAttentionTaskRows * round_up(args.head_size, 16)),
        sums_(s_ + 2 * tuning::kAttentionTaskRows * (tuning::kAttentionMaxChunk + 32)),
        k_(sums_ + tuning::kAttentionTaskRows * round_up(args.value_size, 16)),
        v_(k_ + (tuning::kAttentionMaxChunk + 32) * round_up(args.head_size, 16)),
        mask_(args, rows_, s_ + tuning::kAttentionTaskRows * (tuning::kAttentionMaxChunk + 32)) {}

  // While the last chunk is multiplied: the rows to be written after it, and what the next call reads.
  void look_ahead(int keys) {
    constexpr int64_t kSize = sizeof(T);
    ahead_ = Prefetch();
    ahead_.add(static_cast<const T*>(a_.out) + rows_.out_offset[0], a_.out_row * kSize, a_.value_size * kSize,
               rows_.head_of[0] == rows_.head_of[rows_.rows - 1] ? rows_.rows : 0, true);
    if (a_.next_k && rows_.first_row + rows_.rows == a_.first_row + a_.rows) {
      const int64_t chunk = smaller(a_.keys, int64_t{tuning::kAttentionChunk});
      const int64_t queries = smaller(a_.queries, int64_t{tuning::kAttentionTaskRows});
      ahead_.add(a_.next_k, a_.k_row * kSize, a_.head_size * kSize, chunk, false);
      ahead_.add(a_.next_q, a_.q_row * kSize, a_.head_size * kSize, queries, false);
      ahead_.add(a_.next_v, a_.v_row * kSize, a_.value_size * kSize, chunk, false);
    }
    ahead_.set_steps(keys * rows_.vectors / kTileSums + 1);
  }

  // False when something not finite came out although keys were excluded: to be done again, carefully.
  bool run() {
    if (rows_.rows <= kShortRows && !drops()) {
      pack_short_query();
      each_chunk<true>();
    } else {
      if constexpr (Math::int8_scores) {
        pack_int8_query();
      } else {
        pack_query();
      }
      each_chunk<false>();
    }
    const bool excludes = mask_.exists() || rows_.shared.begin > 0 || rows_.shared.end < a_.keys;
    const float watched = reduce_add(watch_);
    return careful_ || !excludes || watched == watched;
  }

 private:
  const T* query_row(int r) const { return static_cast<const T*>(a_.q) + rows_.q_offset[r]; }

  // Words [w, w + lanes) of a row of n elements, zero behind its end.
  static LAMINA_INLINE F32 row_words(const T* row, int64_t col, int n, int w) {
    const int rest = smaller(n - w * kDims, kLanes * kDims);
    return col == 1 ? Math::load_words(row + w * kDims, rest) : Math::gather_words(row + w * kDims * col, col, rest);
  }

  bool drops() const { return a_.keep_below < 65536; }
  // What kept weights grow by.
  float growth() const { return a_.keep_below == 0 ? 0.0f : 65536.0f / float(a_.keep_below); }

  // log2(e) turns exp into exp2.
  float factor() const { return float(a_.scale) * kLog2E; }
  float softcap() const { return float(a_.softcap) * kLog2E; }
  F32 query_factor() const { return set1(Math::scales_query ? factor() : 1.0f); }

  void pack_query() {
    const F32 factor = query_factor();
    for (int v = 0; v < rows_.vectors; ++v) {
      for (int w = 0; w < words_; w += kLanes) {
        F32 x[kLanes];
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) {
          const int r = v * kLanes + i;
          x[i] = r < rows_.rows ? row_words(query_row(r), a_.q_col, a_.head_size, w) : zero();
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

  void pack_int8_query() {
    const Int8Keys packed(a_);
    const float none[tuning::kAttentionMaxHeadSize] = {};
    for (int r = 0; r < rows_.vectors * kLanes; ++r) {
      const T* row = query_row(smaller(r, rows_.rows - 1));
      alignas(64) uint8_t codes[tuning::kAttentionMaxHeadSize];
      float sum;
      row_scale_[r] = factor() * quantize_row(row, a_.q_col, a_.head_size, none, 128, codes, &sum);
      for (int w = 0; w < words_; ++w) memcpy(q_ + w * kRows + r, codes + 4 * w, 4);
      F32 shift = zero();
      for (int c = 0; c < a_.head_size; c += kLanes) {
        shift = fmadd(row_elements(row + c * a_.q_col, a_.q_col, smaller(kLanes, a_.head_size - c)),
                      load(packed.mean + c), shift);
      }
      row_shift_[r] = factor() * reduce_add(shift);
    }
  }

  // [row][words, rounded up to lanes]
  void pack_short_query() {
    const int stride = round_up(words_, kLanes);
    for (int r = 0; r < rows_.rows; ++r) {
      for (int w = 0; w < words_; w += kLanes) {
        F32 x = row_words(query_row(r), a_.q_col, a_.head_size, w);
        if constexpr (Math::scales_query) x = x * query_factor();
        store(q_ + r * stride + w, x);
      }
    }
  }

  // Keys of the chunk as words: in place where that is possible, else packed with rows of whole registers.
  void load_keys(int64_t first, int n, bool whole_registers) {
    if constexpr (Math::int8_scores) {
      const Int8Keys packed(a_);
      keys_ = reinterpret_cast<const char*>(packed.codes + first * packed.stride);
      key_stride_ = packed.stride;
      key_scale_ = packed.scale + first;
      key_start_ = packed.start + first;
      return;
    }
    const T* k = static_cast<const T*>(a_.k) + first * a_.k_row;
    if (Math::reads_in_place && a_.k_col == 1 && a_.head_size % (whole_registers ? kLanes * kDims : kDims) == 0) {
      keys_ = reinterpret_cast<const char*>(k);
      key_stride_ = a_.k_row * int64_t(sizeof(T));
      return;
    }
    const int stride = round_up(words_, kLanes);
    const bool keeps = a_.packed && first <= a_.packed->k_keys;
    float* to = keeps ? a_.packed->k + first * stride : k_;
    keys_ = reinterpret_cast<const char*>(to);
    key_stride_ = stride * int64_t(sizeof(float));
    if (keeps) {
      if (first + n <= a_.packed->k_keys) return;
      a_.packed->k_keys = first + n;
    }
    for (int j = 0; j < n; ++j) {
      for (int w = 0; w < words_; w += kLanes) {
        store(to + j * stride + w, row_words(k + j * a_.k_row, a_.k_col, a_.head_size, w));
      }
    }
  }

  void load_values(int64_t first, int n) {
    const T* v = static_cast<const T*>(a_.v) + first * a_.v_row;
    if (kPerWord == 1 && sizeof(T) == sizeof(float) && a_.v_col == 1 && a_.value_size % kLanes == 0) {
      values_ = reinterpret_cast<const float*>(v);
      value_stride_ = a_.v_row;
      return;
    }
    const bool keeps = a_.packed && first <= a_.packed->v_keys && first % kPerWord == 0;
    float* to = keeps ? a_.packed->v + first / kPerWord * columns_ : v_;
    values_ = to;
    value_stride_ = columns_;
    if (keeps) {
      if (first + n <= a_.packed->v_keys) return;
      a_.packed->v_keys = first + n;
    }
    if constexpr (kPerWord == 1) {
      for (int j = 0; j < n; ++j) {
        for (int c = 0; c < a_.value_size; c += kLanes) {
          store(to + j * columns_ + c,
                row_elements(v + j * a_.v_row + c * a_.v_col, a_.v_col, smaller(kLanes, a_.value_size - c)));
        }
      }
    } else {
      Math::pack_pairs(v, a_.v_row, a_.v_col, n, a_.value_size, to, columns_);
    }
  }

  // Sums begin with nothing, or with the sink.
  void start_rows() {
    alignas(64) float base[kRows], total[kRows];
    for (int r = 0; r < rows_.vectors * kLanes; ++r) {
      base[r] = 0.0f;
      total[r] = 0.0f;
      rescale_[r] = 1.0f;
      if (!a_.sinks) continue;
      const float sink = static_cast<const float*>(a_.sinks)[rows_.head_of[r] * a_.sinks_head] * kLog2E;
      if (sink <= kLowest) continue;  // a NaN goes on
      base[r] = sink;
      total[r] = 1.0f;
    }
    for (int v = 0; v < rows_.vectors; ++v) {
      base_[v] = load(base + v * kLanes);
      total_[v] = divisor_[v] = load(total + v * kLanes);
    }
    for (int r = 0; r < kShortRows && r < rows_.rows; ++r) {
      short_maximum_[r] = total[r] == 0.0f ? kLowest : base[r];
      short_total_[r] = total[r];
    }
  }

  template <bool kShort>
  void each_chunk() {
    start_rows();
    watch_ = zero();
    bool started = false, finished = false;
    for (int64_t next = rows_.all.begin; next < rows_.all.end;) {
      int64_t first = next;
      int n = int(smaller(rows_.all.end - first, int64_t{tuning::kAttentionChunk}));
      // A short rest is taken along rather than left to a chunk of its own.
      if (rows_.all.end - first <= tuning::kAttentionMaxChunk) n = int(rows_.all.end - first);
      next = first + n;
      bool masked = false;
      int begin = 0;
      if (mask_.exists()) {
        const KeptKeys kept = mask_.template prepare<kShort>(first, n);
        if (kept.none()) continue;
        masked = !kept.plain;
        begin = kept.begin;
        first += begin;
        n = kept.end - begin;
      }
      const bool is_last = next == rows_.all.end;
      load_keys(first, n, kShort);
      if constexpr (kShort) {
        short_weights(first, n, masked, is_last);
      } else {
        if (is_last && a_.far) look_ahead(n);
        weights(first, n, begin, masked, is_last);
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
                          rows_.out_offset,
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
    if (a_.lse) store_lse<kShort>();
  }

  template <int NV>
  static void score_keys(const ScoreTiles& t, int keys, int key, int known, int v0, bool limited) {
    constexpr int kMost = NV <= kTileVectors ? kTileSums / NV : kPerWord;
    if (keys == kMost) {
      score_tile<Math, NV, kMost>(t, key, known, v0, limited);
    } else if (keys == kTileSums / kTileVectors) {
      score_tile<Math, NV, kTileSums / kTileVectors>(t, key, known, v0, limited);
    } else if (keys == 4) {
      score_tile<Math, NV, 4>(t, key, known, v0, limited);
    } else if (keys == kPerWord) {
      score_tile<Math, NV, kPerWord>(t, key, known, v0, limited);
    } else {
      score_tile<Math, NV, 1>(t, key, known, v0, limited);
    }
  }

  // The chunk's weights, in words; updates base, total, rescale and, at the end, inverse.
  void weights(int64_t first, int n, int mask_begin, bool masked, bool is_last) {
    const int vectors = rows_.vectors;
    const bool limits = rows_.shared.begin > first || rows_.shared.end < first + n;
    float begin[kRows], end[kRows];
    if (limits) {
      for (int r = 0; r < vectors * kLanes; ++r) {
        begin[r] = float(within(rows_.taken[r].begin - first, n));
        end[r] = float(within(rows_.taken[r].end - first, n));
      }
    }
    F32 highest[kRowVectors], total[kRowVectors], rounded[kRowVectors];
    const ScoreTiles t{q_,
                       keys_,
                       key_stride_,
                       words_,
                       factor(),
                       softcap(),
                       masked ? mask_.kept(mask_begin) : nullptr,
                       masked ? mask_.added(mask_begin) : nullptr,
                       mask_.per_key(),
                       careful_,
                       begin,
                       end,
                       base_,
                       highest,
                       total,
                       rounded,
                       s_,
                       row_scale_,
                       row_shift_,
                       key_scale_,
                       key_start_};
    score_chunk(t, first, n, limits);
    if (rescaled_) {
      for (int r = 0; r < vectors * kLanes; ++r) rescale_[r] = 1.0f;
      rescaled_ = false;
    }
    if (move_base(highest)) {
      rescaled_ = true;
      score_chunk(t, first, n, limits);
    }
    if (drops()) drop_weights(first, n);
    for (int v = 0; v < vectors; ++v) {
      total_[v] = total_[v] + total[v];
      divisor_[v] = divisor_[v] + (kPerWord > 1 ? rounded : total)[v];
    }
    if (is_last) {
      for (int v = 0; v < vectors; ++v) {
        const F32 inverse = drops() ? set1(growth()) / divisor_[v] : reciprocal(divisor_[v]);
        store(inverse_ + v * kLanes, select(less(divisor_[v], set1(1e-30f)), zero(), inverse));
      }
    }
  }

  // Dropped weights become 0; what they are part of the total of stays.
  void drop_weights(int64_t first, int n) {
    int32_t query[kRows], head[kRows];
    for (int r = 0; r < rows_.vectors * kLanes; ++r) {
      query[r] = int32_t(rows_.position[r] - a_.shift);
      head[r] = int32_t(a_.first_head + rows_.head_of[r]);
    }
    kept_by_dropout(a_.keep_below, a_.seed, a_.batch, query, head, rows_.vectors, first, round_up(n, kPerWord),
                    undropped_);
    for (int j = 0; j < n; j += kPerWord) {
      float* words = s_ + j / kPerWord * kRows;
      for (int v = 0; v < rows_.vectors; ++v) {
        F32 w = load(words + v * kLanes);
        for (int i = 0; i < kPerWord; ++i) {
          const Mask kept = lanes_of_bits(uint32_t(undropped_[j + i] >> (v * kLanes)));
          w = select(kept, w, kPerWord == 1 ? zero() : and_bits(w, i == 0 ? 0xffff0000u : 0x0000ffffu));
        }
        store(words + v * kLanes, w);
      }
    }
  }

  void score_chunk(const ScoreTiles& t, int64_t first, int n, bool limits) {
    const int vectors = rows_.vectors;
    for (int v = 0; v < vectors; ++v) {
      t.highest[v] = set1(-kInfinity);
      t.total[v] = t.rounded[v] = zero();
    }
    const int whole = n / kPerWord * kPerWord;  // keys in whole words
    int v0 = 0, v1 = vectors;                   // the vectors with a row that takes a key of the tile
    for (int j = 0; j < n;) {
      if (limits) {
        while (v0 + 1 < vectors && rows_.any_of[v0].end <= first + j) ++v0;
        const int64_t reached = first + smaller(j + kTileSums, n);
        for (v1 = vectors; v1 > v0 + 1 && rows_.any_of[v1 - 1].begin >= reached;) --v1;
      }
      const int group = smaller(v1 - v0, kTileVectors);
      int keys = kTileSums / group, key = j;
      if (j == whole) {
        keys = 1;
      } else {
        // The last tile starts early enough to be a full one: doing a few keys twice is cheaper than small tiles.
        if (keys > whole) keys = whole >= 4 ? 4 : kPerWord;
        key = smaller(j, whole - keys);
      }
      for (int v = v0; v < v1; v += group) {
        const int width = smaller(group, v1 - v);
        const bool limited = limits && !rows_.take_all(v, width, first + key, first + key + keys);
        switch (width) {
          case 1: score_keys<1>(t, keys, key, j - key, v, limited); break;
          case 2: score_keys<2>(t, keys, key, j - key, v, limited); break;
          case 3: score_keys<3>(t, keys, key, j - key, v, limited); break;
          default: score_keys<4>(t, keys, key, j - key, v, limited);
        }
      }
      if (v0 > 0 || v1 < vectors) {
        for (int w = j / kPerWord; w * kPerWord < key + keys; ++w) {
          for (int v = 0; v < v0; ++v) store(s_ + w * kRows + v * kLanes, zero());
          for (int v = v1; v < vectors; ++v) store(s_ + w * kRows + v * kLanes, zero());
        }
      }
      ahead_.step();
      j = key + keys;
    }
  }

  // Where a row's scores are too far from its base, the base goes to the highest of them, and the sums so far with it.
  // Whether a row moves depends on itself alone. False if none did.
  bool move_base(const F32* highest) {
    bool moved = false;
    for (int v = 0; v < rows_.vectors; ++v) {
      if (all(less(highest[v], set1(kMostFromBase)) & less(set1(-kMostFromBase), highest[v]))) continue;
      float by[kLanes], total[kLanes];
      store(by, highest[v]);
      store(total, total_[v]);
      bool here = false;
      for (int i = 0; i < kLanes; ++i) {
        const bool too_low = total[i] == 0.0f && by[i] < -kMostFromBase && by[i] > -kInfinity;
        if (by[i] > kMostFromBase || too_low) {
          here = true;
        } else {
          by[i] = 0.0f;
        }
      }
      if (!here) continue;
      moved = true;
      const F32 factor = exp2(max(set1(-200.0f), min(set1(120.0f), zero() - load(by))));
      store(rescale_ + v * kLanes, factor);
      total_[v] = total_[v] * factor;
      divisor_[v] = divisor_[v] * factor;
      base_[v] = base_[v] + load(by);
    }
    return moved;
  }

  static LAMINA_INLINE int64_t within(int64_t key, int n) { return key < 0 ? 0 : smaller(key, int64_t{n}); }

  // The same for a block of few rows; scores lie as [row][kShortStride].
  void short_weights(int64_t first, int n, bool masked, bool is_last) {
    const int q_stride = round_up(words_, kLanes);
    F32 chunk_maximum[kShortRows];
    for (int r = 0; r < rows_.rows; ++r) chunk_maximum[r] = set1(-kInfinity);
    const F32 factor_vector = set1(factor());
    for (int j = 0; j < n; j += kLanes) {
      const int count = smaller(kLanes, n - j);
      // Rows behind the last key repeat it.
      const char* row[kLanes];
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) row[i] = keys_ + smaller(j + i, n - 1) * key_stride_;
      for (int r = 0; r < rows_.rows; ++r) {
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
        if (a_.softcap != 0.0) s = capped(s, softcap());
        if (masked) s = masked_short(s, r, first + j, count);
        const int64_t begin = rows_.taken[r].begin - (first + j), end = rows_.taken[r].end - (first + j);
        if (begin > 0) s = select(less(iota(), set1(float(begin))), set1(-kInfinity), s);
        const int64_t valid = smaller(end, int64_t{count});
        if (valid < kLanes) s = select(less(iota(), set1(float(valid))), s, set1(-kInfinity));
        store(s_ + r * kShortStride + j, s);
        chunk_maximum[r] = max(chunk_maximum[r], s);
      }
    }
    for (int r = 0; r < rows_.rows; ++r) {
      float* s = s_ + r * kShortStride;
      // A NaN among the lanes may be lost here; its own weight is NaN and so becomes the total.
      float m = reduce_max(chunk_maximum[r]);
      if (!(m > short_maximum_[r])) m = short_maximum_[r];
      alignas(64) float f[kLanes];
      store(f, Math::exp2(set1(short_maximum_[r]) - set1(m)));
      F32 total = zero();
      constexpr int kStep = kLanes * kPerWord;
      const int stored = round_up(n, kLanes);
      for (int j = 0; j < n; j += kStep) {
        F32 w[kPerWord];
        LAMINA_UNROLL
        for (int i = 0; i < kPerWord; ++i) {
          w[i] = j + i * kLanes < stored ? Math::exp2(load(s + j + i * kLanes) - set1(m)) : zero();
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

  F32 masked_short(F32 s, int r, int64_t key, int count) const {
    const char* p = mask_.row(r, key);
    if (is_added(a_.mask_type)) s = add_mask(s, load_added(a_.mask_type, p, a_.mask_col, count), careful_);
    if (a_.alibi_slopes) {
      const F32 bias = alibi_of(set1(mask_.slope(r)), set1(float(rows_.position[r] - key)) - iota());
      s = fmadd(bias, set1(kLog2E), s);
    }
    if (!is_bool(a_.mask_type)) return s;
    return select(lanes_of_bits(uint32_t(load_kept_bits(p, a_.mask_col, count))), s, set1(-kInfinity));
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
    const bool limits = rows_.shared.begin > first || rows_.shared.end < first + n;
    while (row + R <= rows_.rows) {
      int begin = 0, end = (n + kPerWord - 1) / kPerWord;
      if (limits) {
        const KeyRange taken = rows_.taken_by(row, R);
        begin = int(within(taken.begin - first, n)) / kPerWord;
        end = (int(within(taken.end - first, n)) + kPerWord - 1) / kPerWord;
      }
      value_tile<Math, R, C, row_stride<kShort>(), key_stride<kShort>()>(t, row, column, begin, end);
      row += R;
    }
    if constexpr (R > 1) {
      if (row < rows_.rows) value_rows_from<(R > 8 ? 6 : R > 4 ? 4 : R / 2), C, kShort>(t, first, n, column, row);
    }
  }

  template <bool kShort>
  void careful_values(const ValueTiles<T>& t, int n) const {
    for (int r = 0; r < rows_.rows; ++r) {
      for (int c = 0; c < columns_; c += kLanes) {
        value_tile<Math, 1, 1, row_stride<kShort>(), key_stride<kShort>(), true>(t, r, c, 0,
                                                                                 (n + kPerWord - 1) / kPerWord);
      }
    }
  }

  void store_row(int r, float factor) const {
    for (int c = 0; c < columns_; c += kLanes) {
      store_up_to(static_cast<T*>(a_.out) + rows_.out_offset[r] + c, load(sums_ + r * columns_ + c) * set1(factor),
                  smaller(kLanes, a_.value_size - c));
    }
  }

  // When the last chunk took no part: what the sums hold goes out, or 0 where there is none.
  template <bool kShort>
  void finish(bool started) {
    alignas(64) float total[kRows];
    for (int v = 0; v < kRowVectors; ++v) store(total + v * kLanes, divisor_[v]);
    for (int r = 0; r < rows_.rows; ++r) {
      const float sum = kShort ? short_total_[kShort ? r : 0] : total[r];
      if (!started) {
        for (int c = 0; c < columns_; c += kLanes) store(sums_ + r * columns_ + c, zero());
      }
      store_row(r, sum < 1e-30f ? 0.0f : growth() / sum);
      for (int c = 0; c < columns_; c += kLanes) watch_ = fmadd(load(sums_ + r * columns_ + c), zero(), watch_);
    }
  }

  template <bool kShort>
  void store_lse() const {
    alignas(64) float lse[kRows];
    if constexpr (kShort) {
      for (int v = 0; v < rows_.vectors; ++v) {
        store(lse + v * kLanes, lse_of(load_up_to(short_maximum_ + v * kLanes, rows_.rows - v * kLanes),
                                       load_up_to(short_total_ + v * kLanes, rows_.rows - v * kLanes)));
      }
    } else {
      for (int v = 0; v < rows_.vectors; ++v) store(lse + v * kLanes, lse_of(base_[v], total_[v]));
    }
    for (int r = 0; r < rows_.rows; ++r) {
      static_cast<float*>(a_.lse)[rows_.head_of[r] * a_.lse_head + (rows_.position[r] - a_.shift) * a_.lse_row] =
          lse[r];
    }
  }

  static F32 lse_of(F32 maximum, F32 total) {
    const F32 lse = fmadd(maximum, set1(1 / kLog2E), log_of_normal(total));
    return select(less(total, set1(1e-30f)), set1(-kInfinity), lse);
  }

  const AttentionArgs& a_;
  const RowBlock rows_;
  const int words_, columns_;
  const bool careful_;
  float *const q_, *const s_, *const sums_, *const k_, *const v_;
  ChunkMask mask_;
  uint64_t undropped_[tuning::kAttentionMaxChunk];  // for each key of a chunk the rows where dropout keeps it, as bits
  Prefetch ahead_;
  const char* keys_;
  int64_t key_stride_;
  const float* key_scale_ = nullptr;  // these four where scores are int8
  const int32_t* key_start_ = nullptr;
  alignas(64) float row_scale_[Math::int8_scores ? kRows : kLanes];
  alignas(64) float row_shift_[Math::int8_scores ? kRows : kLanes];
  const float* values_;
  int64_t value_stride_;
  bool rescaled_ = false;  // whether rescale_ holds anything but 1
  // The divisor of the output is the sum of the weights that multiply V: where those are rounded, a single heavy one
  // would else be off by its rounding. The log-sum-exp wants the sum of what they were.
  F32 base_[kRowVectors], total_[kRowVectors], divisor_[kRowVectors], watch_;
  float short_maximum_[kShortRows], short_total_[kShortRows];
  alignas(64) float rescale_[kRows];
  alignas(64) float inverse_[kRows];
};

template <class Math>
void run_block(const AttentionArgs& args, int64_t row, int rows) {
  if (!Block<Math>(args, row, rows, false).run()) Block<Math>(args, row, rows, true).run();
}

template <class Math>
void attention(const AttentionArgs& args) {
  for (int64_t row = args.first_row; row < args.first_row + args.rows; row += kRows) {
    run_block<Math>(args, row, int(smaller(int64_t{kRows}, args.first_row + args.rows - row)));
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
