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

#include "cpu/kernels/attention_prefetch.h"
#include "cpu/kernels/attention_values.h"
#include "cpu/vec/philox.h"

namespace lamina::LAMINA_ISA {
namespace {

// Keys whose weights are summed before they join the total.
constexpr int kTogether = 4;
// Up to this many rows the head size goes into the lanes.
constexpr int kShortRows = kLanes / 2;
// Distance of the score rows of a short block: room for a chunk and the tail of its last vector.
constexpr int kShortStride = tuning::kAttentionMaxChunk + 16;

// Scores in log2 units less the row's maximum -> weights.
template <class Math>
LAMINA_INLINE F32 weight_of(F32 score, F32 maximum) {
  return Math::exp2(score - maximum);
}

template <class Math>
class Block {
  using T = typename Math::Storage;
  static constexpr int kPerWord = Math::per_word;

 public:
  // `careful`: see [NOTE] Excluded keys.
  Block(const AttentionArgs& args, int64_t first_row, int rows, bool careful)
      : a_(args),
        rows_(args, first_row, rows),
        words_((args.head_size + kPerWord - 1) / kPerWord),
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
      pack_query();
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
    const int rest = smaller(n - w * kPerWord, kLanes * kPerWord);
    return col == 1 ? Math::load_words(row + w * kPerWord, rest)
                    : Math::gather_words(row + w * kPerWord * col, col, rest);
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

  // The running maximum and sum: of nothing, or of the sink.
  void start_rows() {
    alignas(64) float maximum[kRows], total[kRows];
    for (int r = 0; r < rows_.vectors * kLanes; ++r) {
      maximum[r] = kLowest;
      total[r] = 0.0f;
      if (!a_.sinks) continue;
      const float sink = static_cast<const float*>(a_.sinks)[rows_.head_of[r] * a_.sinks_head] * kLog2E;
      if (sink <= kLowest) continue;  // a NaN goes on
      maximum[r] = sink;
      total[r] = 1.0f;
    }
    for (int v = 0; v < rows_.vectors; ++v) {
      maximum_[v] = load(maximum + v * kLanes);
      total_[v] = load(total + v * kLanes);
    }
    for (int r = 0; r < kShortRows && r < rows_.rows; ++r) {
      short_maximum_[r] = maximum[r];
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
    F32 chunk_maximum[kRowVectors];
    for (int v = 0; v < vectors; ++v) chunk_maximum[v] = set1(-kInfinity);
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
                       s_,
                       chunk_maximum};
    int v0 = 0, v1 = vectors;  // the vectors with a row that takes a key of the tile
    for (int j = 0; j < n;) {
      if (limits) {
        while (v0 + 1 < vectors && rows_.any_of[v0].end <= first + j) ++v0;
        const int64_t reached = first + smaller(j + kTileSums, n);
        for (v1 = vectors; v1 > v0 + 1 && rows_.any_of[v1 - 1].begin >= reached;) --v1;
      }
      const int group = smaller(v1 - v0, kTileVectors);
      int keys = kTileSums / group;
      // The last tile starts early enough to be a full one: doing a few keys twice is cheaper than small tiles.
      if (keys > n) keys = n >= 4 ? 4 : 1;
      const int key = smaller(j, n - keys);
      for (int v = v0; v < v1; v += group) {
        const int width = smaller(group, v1 - v);
        const bool limited = limits && !rows_.take_all(v, width, first + key, first + key + keys);
        switch (width) {
          case 1: score_keys<1>(t, keys, key, v, limited); break;
          case 2: score_keys<2>(t, keys, key, v, limited); break;
          case 3: score_keys<3>(t, keys, key, v, limited); break;
          default: score_keys<4>(t, keys, key, v, limited);
        }
      }
      ahead_.step();
      j = key + keys;
    }
    for (int v = 0; v < vectors; ++v) {
      const F32 m = max(maximum_[v], chunk_maximum[v]);
      const F32 f = weight_of<Math>(maximum_[v], m);
      store(rescale_ + v * kLanes, f);
      total_[v] = total_[v] * f;
      maximum_[v] = m;
    }
    if (drops()) {
      int32_t query[kRows], head[kRows];
      for (int r = 0; r < vectors * kLanes; ++r) {
        query[r] = int32_t(rows_.position[r] - a_.shift);
        head[r] = int32_t(a_.first_head + rows_.head_of[r]);
      }
      kept_by_dropout(a_.keep_below, a_.seed, a_.batch, query, head, vectors, first, round_up(n, kTogether),
                      undropped_);
    }
    if (limits) {
      limited_exponentials(first, n);
    } else {
      const int whole = round_up(n, kTogether);
      for (int v = 0; v < vectors; ++v) exclude_rows(v, n, whole);
      all_exponentials(0, whole);
    }
    if (is_last) {
      for (int v = 0; v < vectors; ++v) {
        const F32 inverse = drops() ? set1(growth()) / total_[v] : reciprocal(total_[v]);
        store(inverse_ + v * kLanes, select(less(total_[v], set1(1e-30f)), zero(), inverse));
      }
    }
  }

  static LAMINA_INLINE int64_t within(int64_t key, int n) { return key < 0 ? 0 : smaller(key, int64_t{n}); }

  void all_exponentials(int begin, int end) {
    switch (rows_.vectors) {
      case 1: exponentials<1>(0, begin, end); break;
      case 2: exponentials<2>(0, begin, end); break;
      case 3: exponentials<3>(0, begin, end); break;
      default: exponentials<4>(0, begin, end);
    }
  }

  // Where rows take different keys: those that all take go by together, the others one vector at a time, from the first
  // to the last that one of its rows takes; the rest is 0.
  void limited_exponentials(int64_t first, int n) {
    const int padded = round_up(n, kTogether);
    int shared_begin = int(within(rows_.shared.begin - first, n)),
        shared_end = int(within(rows_.shared.end - first, n));
    shared_begin = round_up(shared_begin, kTogether);
    shared_end = shared_end / kTogether * kTogether;
    const bool shares = shared_begin < shared_end;
    int low[kRowVectors], high[kRowVectors];
    for (int v = 0; v < rows_.vectors; ++v) {
      const int begin = int(within(rows_.any_of[v].begin - first, n)),
                end = int(within(rows_.any_of[v].end - first, n));
      low[v] = begin < end ? begin / kTogether * kTogether : 0;
      high[v] = begin < end ? round_up(end, kTogether) : 0;
      if (begin >= end) continue;
      exclude_rows(v, low[v], begin);
      exclude_rows(v, end, high[v]);
    }
    // In rising order, since weights in words take the place of scores that come before their own.
    for (int v = 0; v < rows_.vectors; ++v) exponentials<1>(v, low[v], shares ? shared_begin : high[v]);
    if (shares) {
      all_exponentials(shared_begin, shared_end);
      for (int v = 0; v < rows_.vectors; ++v) exponentials<1>(v, shared_end, high[v]);
    }
    for (int v = 0; v < rows_.vectors; ++v) {
      zero_weights(v, 0, low[v]);
      zero_weights(v, high[v], padded);
    }
  }

  void zero_weights(int v, int begin, int end) {
    for (int j = begin / kPerWord; j < end / kPerWord; ++j) store(s_ + j * kRows + v * kLanes, zero());
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
    const bool dropping = drops();
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
        const F32* each = w[0];
        total[v] = total[v] + ((each[0] + each[1]) + (each[2] + each[3]));
        if (dropping) {
          LAMINA_UNROLL
          for (int i = 0; i < kTogether; ++i) {
            const Mask kept = lanes_of_bits(uint32_t(undropped_[j + i] >> ((v0 + v) * kLanes)));
            w[i / kPerWord][i % kPerWord] = select(kept, w[i / kPerWord][i % kPerWord], zero());
          }
        }
        LAMINA_UNROLL
        for (int i = 0; i < kTogether / kPerWord; ++i) store(to + i * kRows + v * kLanes, Math::join(w[i]));
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
    for (int v = 0; v < kRowVectors; ++v) store(total + v * kLanes, total_[v]);
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
      for (int v = 0; v < rows_.vectors; ++v) store(lse + v * kLanes, lse_of(maximum_[v], total_[v]));
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
  const float* values_;
  int64_t value_stride_;
  F32 maximum_[kRowVectors], total_[kRowVectors], watch_;
  float short_maximum_[kShortRows], short_total_[kShortRows];
  alignas(64) float rescale_[kRows];
  alignas(64) float inverse_[kRows];
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
