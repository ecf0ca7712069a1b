// The body of the attention gradient kernels, written once over the arithmetic that a variant brings.
//
// The idea: as in the forward (attention_block.h), a block of query rows lies in the vector lanes, so that
//
//   S[key][query lanes]  = sum_d Q^T[d][query lanes] * K[key][d]           P = exp(S - lse) as the tile is stored: the
//   dP[key][query lanes] = sum_c dO^T[c][query lanes] * V[key][c]          forward left lse, no second pass is needed
//
// and P and dS = P (dP - delta), as [key][query], are in the layout from which all three other products broadcast:
//
//   dV[key][value lanes] += P[key][query] * dO[query][value lanes]
//   dK[key][lanes]       += dS[key][query] * Q[query][lanes]
//   dQ[query][lanes]     += dS[key][query] * K[key][lanes]
//
// Nothing is transposed but Q and dO, once per block. Tiles are strips of a few keys; each knows the rows that take any
// of its keys, from causality, window and mask, and does no work for others. A range of keys has one owner, which adds
// up dK and dV over all rows in their order: the same bits for any number of threads.
//
// [NOTE] Excluded weights are exactly 0, but 0 * NaN is NaN. A block with such a value, where anything is excluded, is
// computed carefully: products leave out factors of 0.
//
// Math offers, beside what the forward uses of it (attention_block.h):
//   store_words(to, x)   weights of one register of queries -> their words, adjacent
#pragma once

#include "cpu/kernels/attention_backward.h"
#include "cpu/kernels/attention_scores.h"
#include "cpu/vec/philox.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kBackwardChunk = tuning::kAttentionBackwardChunk;
constexpr int kStripKeys = kTileSums / kTileVectors;
// A weight below it counts as 0 where that is asked.
constexpr float kSmallest = 1.1754944e-38f;
static_assert(kBackwardChunk % kStripKeys == 0 && kBackwardChunk % kPhiloxKeys == 0);

// What the tiles of one chunk share. Rows of K and V are words, `stride` bytes apart.
struct GradientTiles {
  const float *q, *grad;  // Q^T and dO^T: [words][kRows]
  const char *k, *v;
  int64_t k_stride, v_stride;
  int q_words, v_words;
  const float* lse;           // [row], log2 units; +inf for a row without keys
  const float* delta;         // [row], negative
  float factor;               // of the scores, where the query does not carry it
  float cap;                  // in log2 units, 0 for none
  float slope;                // in log2 units
  const float* position;      // [row]: the key that ALiBi measures from, counted from the chunk's first
  const float* added;         // null, or [key][kRows]
  const uint64_t* kept;       // null, or for each key the rows that keep it, as bits
  const uint64_t* undropped;  // null, or for each key the rows where dropout keeps it
  const float *first, *last;  // [row]: the keys it takes, counted from the chunk's first
  bool careful;               // see [NOTE] Excluded weights
  float* curve;               // where scores are capped: [key][kRows] of 1 - tanh^2
  float* scores;              // null, or [key][kRows]: dS before it becomes words
};

// acc[k][v] = sum over words of x[v0 + v] * rows[key + k].
template <class Math, int NV, int KT>
LAMINA_INLINE void multiply_rows(const float* x, const char* rows, int64_t stride, int64_t words, F32 (&acc)[KT][NV]) {
  LAMINA_UNROLL
  for (int k = 0; k < KT; ++k) {
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) acc[k][v] = zero();
  }
  // Every third row has a pointer of its own; the two between are reached by the addressing modes base + stride and
  // base + 2 stride.
  const char* row[(KT + 2) / 3];
  LAMINA_UNROLL
  for (int g = 0; g < (KT + 2) / 3; ++g) row[g] = rows + 3 * g * stride;
#pragma GCC unroll 4
  for (int64_t w = 0; w < words; ++w) {
    F32 a[NV];
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) a[v] = load(x + w * kRows + v * kLanes);
    LAMINA_UNROLL
    for (int k = 0; k < KT; ++k) {
      const F32 b = broadcast_word(row[k / 3] + (k % 3) * stride + 4 * w);
      LAMINA_UNROLL
      for (int v = 0; v < NV; ++v) acc[k][v] = Math::multiply_add(a[v], b, acc[k][v]);
    }
  }
}

// Weights P of KT keys from `key` on for NV query vectors from `v0` on, to p [KT][kRows].
template <class Math, int NV, int KT>
__attribute__((noinline)) void weight_tile(const GradientTiles& t, int key, int v0, bool limited, float* p) {
  F32 acc[KT][NV];
  multiply_rows<Math>(t.q + v0 * kLanes, t.k + key * t.k_stride, t.k_stride, t.q_words, acc);
  if constexpr (!Math::scales_query) {
    const F32 factor = set1(t.factor);
    LAMINA_UNROLL
    for (int k = 0; k < KT; ++k) {
      LAMINA_UNROLL
      for (int v = 0; v < NV; ++v) acc[k][v] = acc[k][v] * factor;
    }
  }
  if (t.cap != 0.0f) {
    for (int k = 0; k < KT; ++k) {
      for (int v = 0; v < NV; ++v) {
        const F32 x = tanh_precise(acc[k][v]);
        store(t.curve + (key + k) * kRows + (v0 + v) * kLanes, fmadd(-x, x, set1(1.0f)));
        acc[k][v] = x * set1(t.cap);
      }
    }
  }
  if (t.slope != 0.0f) {
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const F32 position = load(t.position + (v0 + v) * kLanes);
      LAMINA_UNROLL
      for (int k = 0; k < KT; ++k) {
        const F32 distance = and_bits(position - set1(float(key + k)), 0x7fffffffu);
        acc[k][v] = fmadd(distance, set1(-t.slope), acc[k][v]);
      }
    }
  }
  if (t.added) {
    LAMINA_UNROLL
    for (int k = 0; k < KT; ++k) {
      LAMINA_UNROLL
      for (int v = 0; v < NV; ++v) {
        acc[k][v] = fmadd(load(t.added + (key + k) * kRows + (v0 + v) * kLanes), set1(kLog2E), acc[k][v]);
      }
    }
  }
  LAMINA_UNROLL
  for (int v = 0; v < NV; ++v) {
    const F32 lse = load(t.lse + (v0 + v) * kLanes);
    LAMINA_UNROLL
    for (int k = 0; k < KT; ++k) acc[k][v] = Math::exp2(acc[k][v] - lse);
  }
  // Afterwards, so that an excluded weight is 0 whatever its score is.
  if (t.kept) {
    LAMINA_UNROLL
    for (int k = 0; k < KT; ++k) {
      LAMINA_UNROLL
      for (int v = 0; v < NV; ++v) {
        const Mask kept = lanes_of_bits(uint32_t(t.kept[key + k] >> ((v0 + v) * kLanes)));
        acc[k][v] = select(kept, acc[k][v], zero());
      }
    }
  }
  if (limited) {
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const F32 first = load(t.first + (v0 + v) * kLanes), last = load(t.last + (v0 + v) * kLanes);
      LAMINA_UNROLL
      for (int k = 0; k < KT; ++k) {
        const F32 at = set1(float(key + k));
        acc[k][v] = select(less(last, at), zero(), select(less(at, first), zero(), acc[k][v]));
      }
    }
  }
  LAMINA_UNROLL
  for (int k = 0; k < KT; ++k) {
    LAMINA_UNROLL
    for (int v = 0; v < NV; ++v) store(p + k * kRows + (v0 + v) * kLanes, acc[k][v]);
  }
}

// Where words of weights and of dS go. For float32 all four are the same two buffers of [key][kRows].
struct GradientWords {
  float* p;      // [key][kRows / keys_per_word]: words of adjacent queries
  float* ds;     // the same
  float* ds_by;  // [key / keys_per_word][kRows]: words of adjacent keys
};

template <class Math, int NV, int KT>
LAMINA_INLINE void store_gradient_words(const GradientWords& to, int key, int v, const F32 (&ds)[KT]) {
  constexpr int kPerWord = Math::keys_per_word, kWords = kRows / kPerWord;
  LAMINA_UNROLL
  for (int k = 0; k < KT; ++k) {
    if constexpr (kPerWord > 1) Math::store_words(to.ds + (key + k) * kWords + v * kLanes / kPerWord, ds[k]);
  }
  LAMINA_UNROLL
  for (int k = 0; k < KT; k += kPerWord) {
    F32 group[kPerWord];
    LAMINA_UNROLL
    for (int i = 0; i < kPerWord; ++i) group[i] = k + i < KT ? ds[k + i < KT ? k + i : k] : zero();
    store(to.ds_by + (key + k) / kPerWord * kRows + v * kLanes, Math::join(group));
  }
}

// dS for the tile that weight_tile has left in p, and the words of both.
template <class Math, int NV, int KT>
__attribute__((noinline)) void gradient_tile(const GradientTiles& t, int key, int v0, const float* p,
                                             const GradientWords& to) {
  constexpr int kPerWord = Math::keys_per_word, kWords = kRows / kPerWord;
  F32 acc[KT][NV];
  multiply_rows<Math>(t.grad + v0 * kLanes, t.v + key * t.v_stride, t.v_stride, t.v_words, acc);
  LAMINA_UNROLL
  for (int v = 0; v < NV; ++v) {
    const F32 delta = load(t.delta + (v0 + v) * kLanes);
    F32 ds[KT];
    LAMINA_UNROLL
    for (int k = 0; k < KT; ++k) {
      F32 weight = load(p + k * kRows + (v0 + v) * kLanes);
      F32 dp = acc[k][v] + delta;
      if (t.undropped) {
        const Mask kept = lanes_of_bits(uint32_t(t.undropped[key + k] >> ((v0 + v) * kLanes)));
        dp = select(kept, dp, delta);
        ds[k] = weight * dp;
        if (t.careful) ds[k] = select(less(weight, set1(kSmallest)), zero(), ds[k]);
        weight = select(kept, weight, zero());
      } else {
        ds[k] = weight * dp;
        if (t.careful) ds[k] = select(less(weight, set1(kSmallest)), zero(), ds[k]);
      }
      if (kPerWord > 1 || t.undropped)
        Math::store_words(to.p + (key + k) * kWords + (v0 + v) * kLanes / kPerWord, weight);
    }
    if (t.scores) {
      LAMINA_UNROLL
      for (int k = 0; k < KT; ++k) store(t.scores + (key + k) * kRows + (v0 + v) * kLanes, ds[k]);
    } else {
      store_gradient_words<Math, NV, KT>(to, key, v0 + v, ds);
    }
  }
}

// sums[r][c] += sum over j < steps of a[r * kRowStride + j * kStepStride] * b[j][c]: words times rows of words, R rows
// times C vectors. The products are summed by themselves first: shorter chains, half the rounding error.
// kCareful: the same, but factors of 0 are left out (for a single row).
template <class Math, int R, int C, int kRowStride, int kStepStride, bool kCareful = false>
__attribute__((noinline)) void product_tile(const float* a, const float* b, int64_t b_stride, int steps, float* sums,
                                            int64_t sum_stride) {
  F32 acc[R][C];
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) {
    LAMINA_UNROLL
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  }
#pragma GCC unroll 2
  for (int j = 0; j < steps; ++j) {
    F32 x[C];
    LAMINA_UNROLL
    for (int c = 0; c < C; ++c) x[c] = load(b + c * kLanes);
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (kCareful) {
        static_assert(R == 1);
        LAMINA_UNROLL
        for (int c = 0; c < C; ++c) x[c] = and_bits(x[c], Math::nonzero_bits(a[0]));
      }
      const F32 y = set1(a[r * kRowStride]);
      LAMINA_UNROLL
      for (int c = 0; c < C; ++c) acc[r][c] = Math::multiply_add(x[c], y, acc[r][c]);
    }
    a += kStepStride;
    b += b_stride;
  }
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) {
    LAMINA_UNROLL
    for (int c = 0; c < C; ++c) {
      float* to = sums + r * sum_stride + c * kLanes;
      store(to, load(to) + acc[r][c]);
    }
  }
}

template <class Math>
class RangeGradient {
  using T = typename Math::Storage;
  static constexpr int kPerWord = Math::keys_per_word;
  static constexpr int kWords = kRows / kPerWord;  // words of one key's row of weights
  // Behind the rows of the wide products, for tiles that read a whole register.
  static constexpr int kSlack = 16;

 public:
  explicit RangeGradient(const AttentionBackwardArgs& args)
      : a_(args),
        q_words_((args.head_size + kPerWord - 1) / kPerWord),
        v_words_((args.value_size + kPerWord - 1) / kPerWord),
        q_columns_(round_up(args.head_size, kLanes)),
        v_columns_(round_up(args.value_size, kLanes)),
        excludes_(args.mask_type != AttentionMask::none || args.window_left < kAttentionUnlimited ||
                  args.window_right < kAttentionUnlimited),
        scale_(float(args.scale)),
        softcap_(float(args.softcap)) {
    const int d = round_up(args.head_size, 16), dv = round_up(args.value_size, 16);
    const int64_t range = args.range + kSlack, tile = int64_t{tuning::kAttentionTaskRows} * kBackwardChunk;
    float* p = args.scratch;
    const auto take = [&p](int64_t n) {
      float* piece = p;
      p += n;
      return piece;
    };
    k_ = take(range * d);
    k_pairs_ = take(kPerWord > 1 ? range * d : 0);
    v_ = take(range * dv);
    grad_k_ = take(range * d);
    grad_v_ = take(range * dv);
    q_ = take(tuning::kAttentionTaskRows * d);
    q_rows_ = take(tuning::kAttentionTaskRows * d);
    grad_q_ = take(tuning::kAttentionTaskRows * d);
    grad_ = take(tuning::kAttentionTaskRows * dv);
    grad_rows_ = take(tuning::kAttentionTaskRows * dv);
    p_ = take(tile);
    ds_ = take(tile);
    scores_ = take(tile);
    added_ = take(tile);
    curve_ = take(tile);
    words_.p = p_;
    words_.ds = words_.ds_by = ds_;
    if constexpr (kPerWord > 1) {
      // Words take half the room: both orders of dS in one tile.
      words_.ds_by = ds_ + tile / 2;
      strip_p_ = p_ + tile / 2;
    }
  }

  void run() {
    load_keys();
    const int64_t range = a_.range;
    memset(grad_k_, 0, size_t(range) * size_t(q_columns_) * sizeof(float));
    memset(grad_v_, 0, size_t(range) * size_t(v_columns_) * sizeof(float));
    for (int64_t head = 0; head < a_.heads; ++head) {
      for (int64_t row = 0; row < a_.queries; row += kRows) rows(head, row);
    }
    store_rows(grad_k_, q_columns_, int(range), a_.head_size, scale_, static_cast<T*>(a_.grad_k), a_.grad_k_row);
    store_rows(grad_v_, v_columns_, int(range), a_.value_size, 1.0f, static_cast<T*>(a_.grad_v), a_.grad_v_row);
  }

 private:
  static void store_rows(const float* from, int from_row, int64_t rows, int columns, float factor, T* to,
                         int64_t to_row) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; c += kLanes) {
        store_up_to(to + r * to_row + c, load(from + r * from_row + c) * set1(factor), columns - c);
      }
    }
  }

  // Words [w, w + lanes) of a row of n elements, zero behind its end.
  static LAMINA_INLINE F32 row_words(const T* row, int64_t col, int n, int w) {
    const int rest = smaller(n - w * kPerWord, kLanes * kPerWord);
    return col == 1 ? Math::load_words(row + w * kPerWord, rest)
                    : Math::gather_words(row + w * kPerWord * col, col, rest);
  }
  static LAMINA_INLINE F32 row_floats(const T* row, int64_t col, int n, int c) {
    const int rest = smaller(n - c, kLanes);
    if (col == 1) return load_up_to(row + c, rest);
    T t[kLanes] = {};
    for (int i = 0; i < rest; ++i) t[i] = row[(c + i) * col];
    return load(t);
  }

  static bool all_finite(const T* first, int64_t row, int64_t col, int64_t rows, int columns) {
    F32 watch = zero();
    for (int64_t r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; c += kLanes)
        watch = fmadd(row_floats(first + r * row, col, columns, c), zero(), watch);
    }
    const float sum = reduce_add(watch);
    return sum == sum;
  }

  // Rows as words, for broadcasts: in place where words are the storage itself.
  struct Words {
    const char* rows;
    int64_t stride;  // bytes
  };
  static Words as_words(const T* first, int64_t row, int64_t col, int64_t rows, int size, float* packed) {
    if (Math::reads_in_place && col == 1 && size % (kPerWord > 1 ? kPerWord : kLanes) == 0) {
      return {reinterpret_cast<const char*>(first), row * int64_t(sizeof(T))};
    }
    const int words = (size + kPerWord - 1) / kPerWord, stride = round_up(words, kLanes);
    for (int64_t j = 0; j < rows; ++j) {
      for (int w = 0; w < words; w += kLanes) store(packed + j * stride + w, row_words(first + j * row, col, size, w));
    }
    return {reinterpret_cast<const char*>(packed), stride * int64_t(sizeof(float))};
  }

  // The same rows as the right side of a product over rows: words of keys_per_word rows.
  struct Matrix {
    const float* rows;
    int64_t stride;
  };
  static Matrix as_matrix(const T* first, int64_t row, int64_t col, int rows, int size, const Words& words,
                          float* packed) {
    if constexpr (kPerWord == 1) {
      return {reinterpret_cast<const float*>(words.rows), words.stride / int64_t(sizeof(float))};
    } else {
      const int stride = round_up(size, kLanes);
      Math::pack_pairs(first, row, col, rows, size, packed, stride);
      return {packed, stride};
    }
  }

  void load_keys() {
    const T* k = static_cast<const T*>(a_.k) + a_.first_key * a_.k_row;
    const T* v = static_cast<const T*>(a_.v) + a_.first_key * a_.v_row;
    key_words_ = as_words(k, a_.k_row, a_.k_col, a_.range, a_.head_size, k_);
    key_matrix_ = as_matrix(k, a_.k_row, a_.k_col, int(a_.range), a_.head_size, key_words_, k_pairs_);
    value_words_ = as_words(v, a_.v_row, a_.v_col, a_.range, a_.value_size, v_);
    finite_ = !excludes_ || (all_finite(k, a_.k_row, a_.k_col, a_.range, a_.head_size) &&
                             all_finite(v, a_.v_row, a_.v_col, a_.range, a_.value_size));
  }

  // to[word][kRows]: the transpose of rows of words; lanes without a row are 0.
  static void pack_transposed(const T* first, int64_t row, int64_t col, int rows, int size, float factor, float* to) {
    const int words = (size + kPerWord - 1) / kPerWord;
    for (int v = 0; v * kLanes < rows; ++v) {
      for (int w = 0; w < words; w += kLanes) {
        F32 x[kLanes];
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) {
          const int r = v * kLanes + i;
          x[i] = r < rows ? row_words(first + r * row, col, size, w) : zero();
          if constexpr (kPerWord == 1) x[i] = x[i] * set1(factor);
        }
        transpose(x);
        const int count = smaller(kLanes, words - w);
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) {
          if (i < count) store(to + (w + i) * kRows + v * kLanes, x[i]);
        }
      }
    }
  }

  // log2(e) turns exp into exp2; a capped score is divided by the cap first.
  float score_factor() const { return softcap_ != 0.0f ? scale_ / softcap_ : scale_ * kLog2E; }

  // The first row of the block that takes a key at or behind j, and the first that takes none up to j.
  int64_t first_row_of(int64_t j) const { return j - a_.window_right - a_.shift - row_; }
  int64_t end_row_of(int64_t j) const { return j + a_.window_left - a_.shift - row_ + 1; }

  void load_rows() {
    const T* q = static_cast<const T*>(a_.q) + head_ * a_.q_head + row_ * a_.q_row;
    const T* grad = static_cast<const T*>(a_.grad) + head_ * a_.grad_head + row_ * a_.grad_row;
    const T* out = static_cast<const T*>(a_.out) + head_ * a_.out_head + row_ * a_.out_row;
    pack_transposed(q, a_.q_row, a_.q_col, rows_, a_.head_size, Math::scales_query ? score_factor() : 1.0f, q_);
    pack_transposed(grad, a_.grad_row, a_.grad_col, rows_, a_.value_size, 1.0f, grad_);
    if constexpr (kPerWord == 1) {
      row_matrix_ = as_matrix(q, a_.q_row, a_.q_col, rows_, a_.head_size,
                              as_words(q, a_.q_row, a_.q_col, rows_, a_.head_size, q_rows_), q_rows_);
      grad_matrix_ = as_matrix(grad, a_.grad_row, a_.grad_col, rows_, a_.value_size,
                               as_words(grad, a_.grad_row, a_.grad_col, rows_, a_.value_size, grad_rows_), grad_rows_);
    } else {
      row_matrix_ = as_matrix(q, a_.q_row, a_.q_col, rows_, a_.head_size, Words(), q_rows_);
      grad_matrix_ = as_matrix(grad, a_.grad_row, a_.grad_col, rows_, a_.value_size, Words(), grad_rows_);
    }

    // Kept weights grow by 1 / keep: folded into lse, and taken out of delta.
    const float keep = a_.keep_below == 0 ? 1.0f : float(a_.keep_below) / 65536.0f;
    const float log_keep = __builtin_log2f(keep);
    const float* lse = static_cast<const float*>(a_.lse) + head_ * a_.lse_head + row_ * a_.lse_row;
    const float* grad_lse = static_cast<const float*>(a_.grad_lse) + head_ * a_.grad_lse_head + row_ * a_.grad_lse_row;
    float sink = 0.0f;
    bool finite = finite_;
    for (int r = 0; r < kRows; ++r) {
      lse_[r] = kInfinity;
      delta_[r] = 0.0f;
      if (r >= rows_) continue;
      F32 sum = zero();
      for (int c = 0; c < a_.value_size; c += kLanes) {
        sum = fmadd(row_floats(out + r * a_.out_row, a_.out_col, a_.value_size, c),
                    row_floats(grad + r * a_.grad_row, a_.grad_col, a_.value_size, c), sum);
      }
      const float at = lse[r * a_.lse_row] * kLog2E;
      float delta = reduce_add(sum);
      if (a_.grad_lse && at != -kInfinity) delta -= grad_lse[r * a_.grad_lse_row];
      finite = finite && delta - delta == 0.0f && at == at;
      if (a_.grad_sinks && at != -kInfinity) {
        sink -= __builtin_exp2f(static_cast<const float*>(a_.sinks)[head_ * a_.sinks_head] * kLog2E - at) * delta;
      }
      delta_[r] = -delta * keep;
      if (at != -kInfinity) lse_[r] = at + log_keep;
    }
    if (a_.grad_sinks) static_cast<float*>(a_.grad_sinks)[head_] += sink;
    careful_ = excludes_ && !(finite && all_finite(q, a_.q_row, a_.q_col, rows_, a_.head_size) &&
                              all_finite(grad, a_.grad_row, a_.grad_col, rows_, a_.value_size));
  }

  // One block of query rows of one head against all keys of the range.
  void rows(int64_t head, int64_t row) {
    head_ = head;
    row_ = row;
    rows_ = int(smaller(int64_t{kRows}, a_.queries - row));
    vectors_ = (rows_ + kLanes - 1) / kLanes;
    load_rows();
    memset(grad_q_, 0, size_t(rows_) * size_t(q_columns_) * sizeof(float));
    // The keys that any row takes, from a multiple of the random block on.
    int64_t begin = row + a_.shift - a_.window_left, end = row + rows_ + a_.shift + a_.window_right;
    begin = begin < a_.first_key ? a_.first_key : begin / kPhiloxKeys * kPhiloxKeys;
    end = smaller(end, a_.first_key + a_.range);
    for (int64_t first = begin; first < end; first += kBackwardChunk) {
      chunk(first, int(smaller(end - first, int64_t{kBackwardChunk})));
    }
    if (a_.partial_q) {
      float* to = a_.partial_q + (head * a_.queries + row) * round_up(a_.head_size, 16);
      for (int r = 0; r < rows_; ++r) {
        for (int c = 0; c < q_columns_; c += kLanes) {
          store(to + r * round_up(a_.head_size, 16) + c, load(grad_q_ + r * q_columns_ + c));
        }
      }
    } else {
      store_rows(grad_q_, q_columns_, rows_, a_.head_size, scale_,
                 static_cast<T*>(a_.grad_q) + head * a_.grad_q_head + row * a_.grad_q_row, a_.grad_q_row);
    }
  }

  const char* mask_at(int r, int64_t key) const {
    return static_cast<const char*>(a_.mask) +
           (head_ * a_.mask_head + (row_ + r) * a_.mask_row + key * a_.mask_col) * mask_bytes(a_.mask_type);
  }

  enum class Masked { nothing, some, everything };

  // Fills kept_, and added_ for an additive mask.
  Masked prepare_mask(int64_t first, int n) {
    const bool boolean = is_bool(a_.mask_type);
    const int rows = a_.mask_row == 0 ? 1 : rows_;
    uint64_t any = 0;
    bool plain = true;
    if (boolean) {
      for (int j = 0; j < n; j += 64) {
        const int count = smaller(64, n - j);
        const uint64_t whole = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
        uint64_t bits[64];
        uint64_t all = whole;
        for (int r = 0; r < rows; ++r) {
          bits[r] = load_kept_bits(mask_at(r, first + j), a_.mask_col, count);
          any |= bits[r];
          all &= bits[r];
        }
        plain = plain && all == whole;
        if (rows == 1 || all == whole) {
          for (int i = 0; i < count; ++i) kept_[j + i] = all >> i & 1 ? ~uint64_t{0} : 0;
        } else {
          for (int r = rows; r < 64; ++r) bits[r] = 0;
          transpose_bits(bits);
          for (int i = 0; i < count; ++i) kept_[j + i] = bits[i];
        }
      }
    } else {
      F32 squares = zero();
      for (int j = 0; j < n; j += kLanes) {
        const int count = smaller(kLanes, n - j);
        for (int i = 0; i < count; ++i) kept_[j + i] = 0;
        for (int v = 0; v < vectors_; ++v) {
          F32 x[kLanes];
          if (rows == 1) {
            const F32 row = load_added(a_.mask_type, mask_at(0, first + j), a_.mask_col, count);
            LAMINA_UNROLL
            for (int i = 0; i < kLanes; ++i) x[i] = row;
          } else {
            LAMINA_UNROLL
            for (int i = 0; i < kLanes; ++i) {
              // Lanes without a row repeat the last one.
              x[i] =
                  load_added(a_.mask_type, mask_at(smaller(v * kLanes + i, rows_ - 1), first + j), a_.mask_col, count);
            }
          }
          LAMINA_UNROLL
          for (int i = 0; i < kLanes; ++i) squares = fmadd(x[i], x[i], squares);
          transpose(x);
          for (int i = 0; i < count; ++i) {
            const uint64_t excluded = bits_of_lanes(LAMINA_ISA::excludes(x[i]));
            kept_[j + i] |= (~excluded & ((uint64_t{1} << kLanes) - 1)) << (v * kLanes);
            store(added_ + (j + i) * kRows + v * kLanes, x[i]);
          }
        }
        for (int i = 0; i < count; ++i) any |= kept_[j + i];
      }
      plain = all(less(squares, set1(1e-30f)));
    }
    return any == 0 ? Masked::everything : plain ? Masked::nothing : Masked::some;
  }

  template <int NV, int KT>
  void strip_of(const GradientTiles& t, int key, int v, bool limited) {
    float* p = kPerWord > 1 ? strip_p_ : p_ + key * kRows;
    weight_tile<Math, NV, KT>(t, key, v, limited, p);
    gradient_tile<Math, NV, KT>(t, key, v, p, words_);
  }

  template <int KT>
  void strip(const GradientTiles& t, int key, int begin, int end, bool limited) {
    for (int v = begin; v < end; v += kTileVectors) {
      const int width = smaller(end - v, kTileVectors);
      if (width == 1) strip_of<1, KT>(t, key, v, limited);
      if (width == 2) strip_of<2, KT>(t, key, v, limited);
      if constexpr (kTileVectors > 2) {
        if (width == 3) strip_of<3, KT>(t, key, v, limited);
        if (width == 4) strip_of<4, KT>(t, key, v, limited);
      }
    }
  }

  // A strip of keys and the rows [begin, end) that take any of them.
  struct Strip {
    int key, keys, begin, end;
  };

  void chunk(int64_t first, int n) {
    Masked masked = Masked::nothing;
    if (a_.mask_type != AttentionMask::none) {
      masked = prepare_mask(first, n);
      if (masked == Masked::everything) return;
    }
    for (int r = 0; r < vectors_ * kLanes; ++r) {
      const int64_t at = row_ + smaller(r, rows_ - 1) + a_.shift - first;
      position_[r] = float(at);
      first_[r] = float(at - a_.window_left > -n ? at - a_.window_left : -n);
      last_[r] = float(smaller(at + a_.window_right, int64_t{n}));
    }
    if (a_.keep_below < 65536) {
      int32_t query[kRows], head[kRows];
      for (int r = 0; r < kRows; ++r) {
        query[r] = int32_t(row_ + r);
        head[r] = int32_t(a_.first_head + head_);
      }
      kept_by_dropout(a_.keep_below, a_.seed, a_.batch, query, head, vectors_, first, n, undropped_);
    }
    const bool slope_gradient = a_.grad_slopes != nullptr;
    const bool apart = softcap_ != 0.0f || a_.grad_mask || slope_gradient;
    const int64_t at = first - a_.first_key;
    const GradientTiles t{
        q_,
        grad_,
        key_words_.rows + at * key_words_.stride,
        value_words_.rows + at * value_words_.stride,
        key_words_.stride,
        value_words_.stride,
        q_words_,
        v_words_,
        lse_,
        delta_,
        score_factor(),
        softcap_ * kLog2E,
        a_.alibi_slopes ? static_cast<const float*>(a_.alibi_slopes)[head_ * a_.alibi_head] * kLog2E : 0.0f,
        position_,
        masked == Masked::some && !is_bool(a_.mask_type) ? added_ : nullptr,
        masked == Masked::some ? kept_ : nullptr,
        a_.keep_below < 65536 ? undropped_ : nullptr,
        first_,
        last_,
        careful_,
        curve_,
        apart ? scores_ : nullptr};

    Strip strips[kBackwardChunk];
    int count = 0;
    for (int key = 0; key < n;) {
      const int keys = n - key >= kStripKeys ? kStripKeys : n - key >= 2 ? 2 : 1;
      int64_t begin = first_row_of(first + key), end = end_row_of(first + key + keys - 1);
      if (begin < 0) begin = 0;
      if (end > rows_) end = rows_;
      if (t.kept && begin < end) {
        uint64_t any = 0;
        for (int k = 0; k < keys; ++k) any |= t.kept[key + k];
        any &= ~uint64_t{0} >> (64 - rows_);
        if (any == 0) {
          end = begin;
        } else {
          if (__builtin_ctzll(any) > begin) begin = __builtin_ctzll(any);
          if (64 - __builtin_clzll(any) < end) end = 64 - __builtin_clzll(any);
        }
      }
      if (begin >= end) begin = end = 0;
      const int v0 = int(begin) / kLanes, v1 = int(end + kLanes - 1) / kLanes;
      clear(key, keys, 0, v0, apart);
      clear(key, keys, v1, vectors_, apart);
      if (begin < end) {
        // Whether the first row of the vectors takes the last key, and the last row the first.
        const bool limited =
            first_row_of(first + key + keys - 1) > v0 * kLanes || end_row_of(first + key) < smaller(v1 * kLanes, rows_);
        if (keys == kStripKeys) {
          strip<kStripKeys>(t, key, v0, v1, limited);
        } else if (keys == 2) {
          strip<2>(t, key, v0, v1, limited);
        } else {
          strip<1>(t, key, v0, v1, limited);
        }
        strips[count++] = {key, keys, int(begin), int(end)};
      }
      key += keys;
    }
    if (apart) score_gradients(t, first, n);

    const int64_t k_sums = at * q_columns_, v_sums = at * v_columns_;
    for (int i = 0; i < count; ++i) {
      key_sums(strips[i], words_.p, grad_matrix_, v_columns_, grad_v_ + v_sums);
    }
    for (int i = 0; i < count; ++i) {
      key_sums(strips[i], words_.ds, row_matrix_, q_columns_, grad_k_ + k_sums);
    }
    query_sums(first, n);
  }

  // Words of dS that no tile writes: rows of vectors [begin, end).
  void clear(int key, int keys, int begin, int end, bool apart) {
    for (int v = begin; v < end; ++v) {
      for (int k = 0; k < keys; ++k) {
        if (apart) store(scores_ + (key + k) * kRows + v * kLanes, zero());
        if (k % kPerWord == 0) store(words_.ds_by + (key + k) / kPerWord * kRows + v * kLanes, zero());
      }
    }
  }

  // What dS of a chunk gives to the mask and the slope, before it passes the cap; then its words.
  void score_gradients(const GradientTiles& t, int64_t first, int n) {
    if (a_.grad_slopes) {
      F32 sum = zero();
      for (int j = 0; j < n; ++j) {
        F32 row = zero();
        for (int v = 0; v < vectors_; ++v) {
          const F32 distance = and_bits(load(position_ + v * kLanes) - set1(float(j)), 0x7fffffffu);
          row = fmadd(distance, load(scores_ + j * kRows + v * kLanes), row);
        }
        sum = sum + row;
      }
      static_cast<float*>(a_.grad_slopes)[head_] -= reduce_add(sum);
    }
    if (a_.grad_mask) add_to_mask(first, n);
    for (int j = 0; j < n; j += kPerWord) {
      for (int v = 0; v < vectors_; ++v) {
        F32 ds[kPerWord];
        LAMINA_UNROLL
        for (int i = 0; i < kPerWord; ++i) {
          const int at = (j + i) * kRows + v * kLanes;
          ds[i] = j + i < n ? load(scores_ + at) : zero();
          if (t.cap != 0.0f && j + i < n) ds[i] = below_cap(ds[i], load(curve_ + at));
        }
        store_gradient_words<Math, 1, kPerWord>(words_, j, v, ds);
      }
    }
  }

  // Where dS is 0, nothing may have written the curve.
  static LAMINA_INLINE F32 below_cap(F32 ds, F32 curve) {
    const F32 x = ds * curve;
    return select(less(zero(), and_bits(ds, 0x7fffffffu)), x, ds);
  }

  // scores_ [key][query lanes] -> grad_mask [query][key], summed over what the mask broadcasts.
  void add_to_mask(int64_t first, int n) {
    float* to = static_cast<float*>(a_.grad_mask) + head_ * a_.grad_mask_head + row_ * a_.grad_mask_row +
                first * a_.grad_mask_col;
    for (int v = 0; v < vectors_; ++v) {
      const int rows = smaller(rows_ - v * kLanes, kLanes);
      for (int j = 0; j < n; j += kLanes) {
        const int count = smaller(kLanes, n - j);
        F32 x[kLanes];
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) x[i] = i < count ? load(scores_ + (j + i) * kRows + v * kLanes) : zero();
        transpose(x);
        if (a_.grad_mask_row == 0) {
          for (int i = 1; i < rows; ++i) x[0] = x[0] + x[i];
        }
        for (int i = 0; i < (a_.grad_mask_row == 0 ? 1 : rows); ++i) {
          float* row = to + (v * kLanes + i) * a_.grad_mask_row + j * a_.grad_mask_col;
          if (a_.grad_mask_col == 1) {
            store_up_to(row, load_up_to(row, count) + x[i], count);
          } else if (a_.grad_mask_col == 0) {
            *row += reduce_add(x[i]);
          } else {
            float t[kLanes];
            store(t, x[i]);
            for (int c = 0; c < count; ++c) row[c * a_.grad_mask_col] += t[c];
          }
        }
      }
    }
  }

  // Vectors of a row that one tile takes, so that all tiles are about as wide.
  static int tile_width(int vectors) {
    const int groups = (vectors + kTileVectors - 1) / kTileVectors;
    return (vectors + groups - 1) / groups;
  }

  // A strip's rows of dV or dK.
  void key_sums(const Strip& s, const float* words, const Matrix& b, int columns, float* sums) const {
    const int begin = s.begin / kPerWord, steps = (s.end + kPerWord - 1) / kPerWord - begin;
    const float* a = words + s.key * kWords + begin;
    const float* rows = b.rows + begin * b.stride;
    float* to = sums + s.key * columns;
    for (int c = 0, vectors = columns / kLanes; c < vectors;) {
      const int width = tile_width(vectors - c);
      const float* right = rows + c * kLanes;
      float* left = to + c * kLanes;
      if (careful_) {
        for (int k = 0; k < s.keys; ++k) {
          for (int w = 0; w < width; ++w) {
            product_tile<Math, 1, 1, kWords, 1, true>(a + k * kWords, right + w * kLanes, b.stride, steps,
                                                      left + k * columns + w * kLanes, columns);
          }
        }
      } else if (s.keys == kStripKeys) {
        product<kStripKeys, kWords, 1>(width, a, right, b.stride, steps, left, columns);
      } else if (s.keys == 2) {
        product<2, kWords, 1>(width, a, right, b.stride, steps, left, columns);
      } else {
        product<1, kWords, 1>(width, a, right, b.stride, steps, left, columns);
      }
      c += width;
    }
  }

  template <int R, int kRowStride, int kStepStride>
  static void product(int width, const float* a, const float* b, int64_t b_stride, int steps, float* sums,
                      int64_t sum_stride) {
    if (width == 1) product_tile<Math, R, 1, kRowStride, kStepStride>(a, b, b_stride, steps, sums, sum_stride);
    if (width == 2) product_tile<Math, R, 2, kRowStride, kStepStride>(a, b, b_stride, steps, sums, sum_stride);
    if constexpr (kTileVectors > 2) {
      if (width == 3) product_tile<Math, R, 3, kRowStride, kStepStride>(a, b, b_stride, steps, sums, sum_stride);
      if (width == 4) product_tile<Math, R, 4, kRowStride, kStepStride>(a, b, b_stride, steps, sums, sum_stride);
    }
  }

  // The chunk's part of dQ.
  void query_sums(int64_t first, int n) {
    const float* keys = key_matrix_.rows + (first - a_.first_key) / kPerWord * key_matrix_.stride;
    for (int r = 0; r < rows_;) {
      const int count = careful_                  ? 1
                        : rows_ - r >= kStripKeys ? kStripKeys
                        : rows_ - r >= 4          ? 4
                        : rows_ - r >= 2          ? 2
                                                  : 1;
      // Keys that these rows take.
      int64_t begin = row_ + r + a_.shift - a_.window_left - first,
              end = row_ + r + count + a_.shift + a_.window_right - first;
      begin = begin < 0 ? 0 : begin / kPerWord;
      end = (smaller(end, int64_t{n}) + kPerWord - 1) / kPerWord;
      if (begin < end) {
        const float* a = words_.ds_by + begin * kRows + r;
        const float* b = keys + begin * key_matrix_.stride;
        const int steps = int(end - begin);
        for (int c = 0, vectors = q_columns_ / kLanes; c < vectors;) {
          const int width = tile_width(vectors - c);
          float* to = grad_q_ + r * q_columns_ + c * kLanes;
          const float* right = b + c * kLanes;
          const int64_t stride = key_matrix_.stride;
          if (careful_) {
            for (int w = 0; w < width; ++w) {
              product_tile<Math, 1, 1, 1, kRows, true>(a, right + w * kLanes, stride, steps, to + w * kLanes,
                                                       q_columns_);
            }
          } else if (count == kStripKeys) {
            product<kStripKeys, 1, kRows>(width, a, right, stride, steps, to, q_columns_);
          } else if (count == 4) {
            product<4, 1, kRows>(width, a, right, stride, steps, to, q_columns_);
          } else if (count == 2) {
            product<2, 1, kRows>(width, a, right, stride, steps, to, q_columns_);
          } else {
            product<1, 1, kRows>(width, a, right, stride, steps, to, q_columns_);
          }
          c += width;
        }
      }
      r += count;
    }
  }

  const AttentionBackwardArgs& a_;
  const int q_words_, v_words_, q_columns_, v_columns_;
  const bool excludes_;  // whether any weight may be left out
  const float scale_, softcap_;
  bool finite_, careful_;
  int64_t head_ = 0, row_ = 0;
  int rows_ = 0, vectors_ = 0;
  float *k_, *k_pairs_, *v_, *grad_k_, *grad_v_, *q_, *q_rows_, *grad_q_, *grad_, *grad_rows_;
  float *p_, *ds_, *scores_, *added_, *curve_;
  float* strip_p_ = nullptr;  // where weights of a strip wait to become words
  GradientWords words_;
  Words key_words_, value_words_;
  Matrix key_matrix_, row_matrix_, grad_matrix_;
  alignas(64) float lse_[kRows];
  alignas(64) float delta_[kRows];
  alignas(64) float position_[kRows];
  alignas(64) float first_[kRows];
  alignas(64) float last_[kRows];
  uint64_t kept_[kBackwardChunk], undropped_[kBackwardChunk];
};

template <class Math>
void attention_backward(const AttentionBackwardArgs& args) {
  RangeGradient<Math>(args).run();
}

template <class T>
void attention_backward_sum(const AttentionSumArgs& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    const float* row = args.parts + r * args.row_stride;
    for (int c = 0; c < args.columns; c += kLanes) {
      F32 sum = load(row + c);
      for (int i = 1; i < args.count_parts; ++i) sum = sum + load(row + i * args.part_stride + c);
      store_up_to(static_cast<T*>(args.out) + r * args.out_row + c, sum * set1(args.factor), args.columns - c);
    }
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
