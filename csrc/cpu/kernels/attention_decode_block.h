// The body of the attention_decode kernels, written once over the arithmetic that a variant brings.
//
// One query is bound by reading the cache, so everything serves to read it once, in order, and ahead of need. The rows
// that share keys (the heads of a group, times the new queries) are taken four at a time: a register of scores holds
//
//   [row of four][keys]     16 lanes: 4 rows x 4 keys, 2 x 8 or 1 x 16
//
// whose dot products run with the head size in the lanes and are reduced together, so softmax is vertical and a key's
// weights are broadcast from memory for the second product, sums[row][value lanes] += weight * v[key][value lanes].
//
// The order of keys does not matter, so a piece is read in eight places side by side, the eighths of it: several
// streams come from memory faster than one (its banks work at once). A slot is a place in that order. While keys are
// read, each step asks for one line of the keys that follow, and so for values.
//
// Excluded keys: their score is set to -inf and their weight is exactly 0. But 0 * v is NaN where v is NaN or infinite.
// The sums are watched for that at their end, and a block that shows it is computed again with values of weight 0 left
// out.
//
// Math, the arithmetic of a variant, offers:
//   Storage                      element type of the cache
//   per_word                     elements in a 32-bit word, the unit that is multiplied: pairs of bfloat16, else 1
//   scales_query                 whether packed queries carry the scale; otherwise scores are multiplied by it
//   load_words(p, n)             n <= lanes * per_word adjacent elements as words, zero behind them
//   load_values(x, rows, c, n)   the same of per_word rows, as per_word registers of words of adjacent rows
//   multiply_add(a, b, c)        c + a * b, word by word
//   exp2(x)                      as exact as the weights need, for x <= 0; 0 for -inf, NaN stays NaN
//   store_weights(to, x)         a register of weights -> words
//   nonzero_bits(word)           all ones in the elements of a word that are not 0
//   pack_row(q, col, n, factor, to)   one query row -> words, zero behind them
#pragma once

#include "cpu/kernels/attention_decode.h"
#include "cpu/vec/math.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
constexpr int kMostRows = 4;  // of a block
constexpr int kStreams = tuning::kDecodeStreams;
static_assert(16 % kStreams == 0);  // slots are a multiple of 16
constexpr float kInfinity = __builtin_inff();
// Below every score that is not -inf; the maximum of a row that has seen no key.
constexpr float kLowest = -3.4e38f;

LAMINA_INLINE int smaller(int a, int b) { return a < b ? a : b; }
LAMINA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LAMINA_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
LAMINA_INLINE int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// The bound keeps -inf out, which would give NaN; max returns its second operand on NaN, so that one passes.
LAMINA_INLINE F32 bounded_exp2(F32 x) { return exp2(max(set1(-200.0f), x)); }

LAMINA_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

template <class Math>
class Piece {
  using T = typename Math::Storage;
  static constexpr int kPerWord = Math::per_word;
  static constexpr int kStep = kLanes * kPerWord;  // elements of one load
  static constexpr int kLine = 64 / int(sizeof(T));
  static constexpr int kLineSteps = kLine / kStep;
  static constexpr bool kScaled = sizeof(T) == 1;
  static_assert(kLineSteps >= 1);

 public:
  explicit Piece(const DecodeArgs& a)
      : a_(a),
        columns_(int(decode_columns(a.value_size))),
        slots_(round_up(a.keys, 16)),
        q_stride_(round_up(a.head_size, kStep) / kPerWord),
        ahead_k_(int(decode_rows_ahead(a.head_size * int64_t(sizeof(T))))),
        ahead_v_(int(decode_rows_ahead(a.value_size * int64_t(sizeof(T))))) {
    float* room = a.scratch;
    const auto take = [&room](int64_t floats) {
      float* piece = room;
      room += (floats + 15) / 16 * 16;
      return piece;
    };
    constexpr int kAddresses = 2 * tuning::kDecodePiece;
    q_ = take(tuning::kDecodeTaskRows * q_stride_);
    s_ = take(tuning::kDecodeTaskRows * tuning::kDecodePiece);
    keys_ = reinterpret_cast<const T**>(take(2 * kAddresses));
    values_ = reinterpret_cast<const T**>(take(2 * kAddresses));
    k_scale_ = take(kMostRows * tuning::kDecodePiece);
    v_scale_ = take(kMostRows * tuning::kDecodePiece);
    copies_ = reinterpret_cast<T*>(room);
  }

  void run() {
    pack_queries();
    if (a_.keys > 0) {
      T* copy = copies_;
      find(a_.k, a_.head_size, ahead_k_, keys_, copy);
      find(a_.v, a_.value_size, ahead_v_, values_, copy);
    }
    int scaled_for = 0;
    for (int row = 0; row < a_.rows;) {
      const int left = a_.rows - row;
      const int rows = left > 2 ? kMostRows : left;
      if (kScaled && rows != scaled_for) {
        expand_scales(a_.k, rows, k_scale_);
        expand_scales(a_.v, rows, v_scale_);
        scaled_for = rows;
      }
      switch (rows) {
        case 1: block<1>(row); break;
        case 2: block<2>(row); break;
        default: block<kMostRows>(row);
      }
      row += rows;
    }
  }

 private:
  void pack_queries() {
    const int padded = round_up(a_.rows, kMostRows);
    for (int r = 0; r < padded; ++r) {
      float* to = q_ + r * q_stride_;
      if (r >= a_.rows) {
        memset(to, 0, size_t(q_stride_) * sizeof(float));
        continue;
      }
      const int64_t row = a_.first_row + r;
      const int64_t offset = row / a_.group * a_.q_query + row % a_.group * a_.q_head;
      const float factor = Math::scales_query ? score_factor() : 1.0f;
      switch (a_.q_type) {
        case DecodeArgs::Type::float32: pack_row<float>(offset, factor, to); break;
        case DecodeArgs::Type::bfloat16: pack_row<bf16>(offset, factor, to); break;
        case DecodeArgs::Type::float16: pack_row<f16>(offset, factor, to); break;
      }
    }
  }

  template <class Q>
  void pack_row(int64_t offset, float factor, float* to) {
    Math::pack_row(static_cast<const Q*>(a_.q) + offset, a_.q_col, a_.head_size, factor, to);
  }

  // What a dot product is multiplied by: it becomes a score in units of log2, or the argument of the cap's tanh.
  float score_factor() const { return a_.softcap > 0 ? a_.scale / a_.softcap : a_.scale * kLog2E; }

  // Addresses of the rows of this piece in the order of slots, and of the first of the next piece, which are fetched
  // ahead; the last row of the cache stands for those behind it. Rows whose elements lie apart are copied, to `copy`.
  void find(const DecodeCache& c, int size, int ahead, const T** to, T*& copy) {
    const int each = slots_ / kStreams;
    for (int s = 0; s < kStreams; ++s) {
      find_rows(c, s * each, each, to + s);
      find_rows(c, a_.keys + s * each, ahead, to + slots_ + s);
    }
    if (c.col != 1 && size > 1) {
      for (int i = 0; i < slots_; ++i, copy += size) {
        for (int e = 0; e < size; ++e) copy[e] = to[i][e * c.col];
        to[i] = copy;
      }
      for (int i = slots_; i < slots_ + kStreams * ahead; ++i) to[i] = to[0];
    }
  }

  // Rows of `count` keys, the first `key` keys behind the piece's first, into every kStreams-th place.
  void find_rows(const DecodeCache& c, int64_t key, int count, const T** to) const {
    const T* data = static_cast<const T*>(c.data);
    const int64_t first = a_.first_key + key;
    const int there = int(larger(0, smaller(int64_t{count}, a_.length - first)));
    if (a_.block_table) {
      int64_t block = first / a_.block_size, within = first % a_.block_size;
      for (int i = 0; i < there; ++block, within = 0) {
        const T* row = data + a_.block_table[block] * c.block + within * c.row;
        const int end = int(smaller(int64_t{there}, i + a_.block_size - within));
        for (; i < end; ++i, row += c.row) to[i * kStreams] = row;
      }
    } else {
      const T* row = data + first * c.row;
      for (int i = 0; i < there; ++i, row += c.row) to[i * kStreams] = row;
    }
    if (there == count) return;
    const int64_t last = a_.length - 1;
    const int64_t block = a_.block_table ? a_.block_table[last / a_.block_size] : 0;
    const T* row = data + block * c.block + (a_.block_table ? last % a_.block_size : last) * c.row;
    for (int i = there; i < count; ++i) to[i * kStreams] = row;
  }

  // Which key of the piece a slot holds; behind the last there may be slots without a key.
  int key_of(int slot) const { return slot % kStreams * (slots_ / kStreams) + slot / kStreams; }

  // Scales of the keys, laid out as a block of RT rows has its scores.
  void expand_scales(const DecodeCache& c, int rows, float* to) const {
    float flat[tuning::kDecodePiece + 16];
    for (int i = 0; i < slots_; ++i) {
      const int64_t key = a_.first_key + smaller(key_of(i), a_.keys - 1);
      const int64_t at = a_.block_table
                             ? a_.block_table[key / a_.block_size] * c.scale_block + key % a_.block_size * c.scale_row
                             : key * c.scale_row;
      flat[i] = c.scale[at];
    }
    const int together = kLanes / rows;
    for (int i = 0; i < slots_; i += together) {
      for (int r = 0; r < rows; ++r, to += together) memcpy(to, flat + i, size_t(together) * sizeof(float));
    }
  }

  template <int RT>
  void block(int row) {
    if (row == 0) {
      scores<RT, true>(row);
      values<RT, false, true>(row);
    } else {
      scores<RT, false>(row);
      values<RT, false, false>(row);
    }
    F32 watch = zero();
    for (int r = row; r < smaller(row + RT, a_.rows); ++r) {
      const float* sums = a_.sums + r * columns_;
      for (int c = 0; c < a_.value_size; c += kLanes) watch = fmadd(load(sums + c), zero(), watch);
    }
    if (reduce_add(watch) != 0.0f) values<RT, true, false>(row);
  }

  // Scores and then weights of a block, in s_; the maximum and the total of each row.
  template <int RT, bool kAhead>
  void scores(int row) {
    constexpr int KT = kLanes / RT;
    alignas(64) float last[kLanes], first[kLanes], slope[kLanes], offset[kLanes], key[kLanes], maximum[kLanes];
    bool limited = slots_ != a_.keys;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t r = smaller(row + i / KT, a_.rows - 1) + a_.first_row;
      const int64_t position = a_.first_position + r / a_.group - a_.first_key;
      const int64_t from = a_.window > 0 ? larger(position - a_.window + 1, 0) : 0;
      const int64_t to = smaller(position, int64_t{a_.keys} - 1);
      key[i] = float(key_of(i % KT));
      last[i] = float(larger(to, -1));
      first[i] = float(smaller(from, int64_t{a_.keys}));
      slope[i] = a_.alibi_slopes ? a_.alibi_slopes[r % a_.group * a_.alibi_stride] * kLog2E : 0.0f;
      offset[i] = float(-position);
      limited = limited || to < a_.keys - 1 || from > 0;
    }
    const F32 lane_key = load(key), lane_last = load(last), lane_first = load(first);
    const F32 lane_slope = load(slope), lane_offset = load(offset);
    const F32 factor = set1(score_factor());
    float* s = s_ + row * tuning::kDecodePiece;
    F32 most = set1(kLowest);
    for (int j = 0; j < slots_; j += KT) {
      F32 x = products<RT, kAhead>(row, j);
      if constexpr (!Math::scales_query) x = x * factor;
      if constexpr (kScaled) x = x * load(k_scale_ + j * RT);
      if (a_.softcap > 0) x = set1(a_.softcap * kLog2E) * tanh_precise(x);
      const F32 at = set1(float(key_of(j))) + lane_key;
      if (a_.alibi_slopes) x = fmadd(lane_slope, at + lane_offset, x);
      if (limited) {
        x = select(less(lane_last, at), set1(-kInfinity), x);
        x = select(less(at, lane_first), set1(-kInfinity), x);
      }
      most = max(most, x);
      store(s + j * RT, x);
    }
    // A NaN among the lanes may be lost here; its own weight is NaN and so becomes the total.
    store(maximum, most);
    float* record = a_.sums + a_.rows * columns_;
    for (int r = 0; r < RT; ++r) {
      float m = kLowest;
      for (int i = 0; i < KT; ++i) m = maximum[r * KT + i] > m ? maximum[r * KT + i] : m;
      for (int i = 0; i < KT; ++i) maximum[r * KT + i] = m;
      if (row + r < a_.rows) record[row + r] = m;
    }
    most = load(maximum);
    // Four sums of a lane: shorter chains.
    F32 total[4] = {zero(), zero(), zero(), zero()};
    for (int j = 0; j < slots_; j += 4 * KT) {
      LAMINA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (j + i * KT >= slots_) break;
        const int at = (j + i * KT) * RT;
        F32 x = Math::exp2(load(s + at) - most);
        total[i] = total[i] + x;
        if constexpr (kScaled) x = select(less(zero(), x), x * load(v_scale_ + at), zero());
        Math::store_weights(s + at / kPerWord, x);
      }
    }
    alignas(64) float each[kLanes];
    store(each, (total[0] + total[1]) + (total[2] + total[3]));
    for (int r = 0; r < RT && row + r < a_.rows; ++r) {
      float sum = 0.0f;
      for (int i = 0; i < KT; ++i) sum += each[r * KT + i];
      record[a_.rows + row + r] = sum;
    }
  }

  // Dot products of RT rows with KT keys from `j` on, one register [row][key].
  template <int RT, bool kAhead>
  LAMINA_INLINE F32 products(int row, int j) const {
    constexpr int KT = kLanes / RT;
    constexpr int kPass = KT < 8 ? KT : 8;  // keys whose addresses fit the general registers
    F32 acc[kLanes];
    LAMINA_UNROLL
    for (int pass = 0; pass < KT; pass += kPass) {
      F32 sum[RT][kPass];
      const T *k[kPass], *next[kPass];
      LAMINA_UNROLL
      for (int i = 0; i < kPass; ++i) {
        k[i] = keys_[j + pass + i];
        next[i] = keys_[j + pass + i + kStreams * ahead_k_];
        LAMINA_UNROLL
        for (int r = 0; r < RT; ++r) sum[r][i] = zero();
      }
      const float* q = q_ + row * q_stride_;
      const auto step = [&](int e, int n) __attribute__((always_inline)) {
        F32 x[RT];
        LAMINA_UNROLL
        for (int r = 0; r < RT; ++r) x[r] = load(q + r * q_stride_ + e / kPerWord);
        LAMINA_UNROLL
        for (int i = 0; i < kPass; ++i) {
          const F32 y = Math::load_words(k[i] + e, n);
          LAMINA_UNROLL
          for (int r = 0; r < RT; ++r) sum[r][i] = Math::multiply_add(x[r], y, sum[r][i]);
        }
      };
      int e = 0;
      for (; e + kLine <= a_.head_size; e += kLine) {
        if constexpr (kAhead) {
          LAMINA_UNROLL
          for (int i = 0; i < kPass; ++i) fetch(next[i] + e);
        }
        LAMINA_UNROLL
        for (int u = 0; u < kLineSteps; ++u) step(e + u * kStep, kStep);
      }
      if (e < a_.head_size) {
        if constexpr (kAhead) {
          LAMINA_UNROLL
          for (int i = 0; i < kPass; ++i) fetch(next[i] + e);
        }
        for (; e < a_.head_size; e += kStep) step(e, smaller(kStep, a_.head_size - e));
      }
      LAMINA_UNROLL
      for (int i = 0; i < kPass; ++i) {
        LAMINA_UNROLL
        for (int r = 0; r < RT; ++r) acc[r * KT + pass + i] = sum[r][i];
      }
    }
    return reduce_add_each(acc);
  }

  // Values go by in groups of keys that stay in the first-level cache while all columns of them are read.
  template <int RT, bool kCareful, bool kAhead>
  void values(int row) const {
    constexpr int kVectors = F32::registers >= 32 || RT <= 2 ? 4 : 2;
    constexpr int U = kVectors / kPerWord;
    if (a_.keys == 0) {
      const int rows = smaller(RT, a_.rows - row);
      memset(a_.sums + row * columns_, 0, size_t(rows) * size_t(columns_) * sizeof(float));
      return;
    }
    for (int j = 0; j < slots_; j += tuning::kDecodeValueGroup) {
      const int end = smaller(j + tuning::kDecodeValueGroup, slots_);
      int c = 0;
      for (; c + U * kStep <= a_.value_size; c += U * kStep) {
        value_tile<RT, U, kCareful, kAhead>(row, j, end, c, U * kStep);
      }
      for (; c < a_.value_size; c += kStep) {
        value_tile<RT, 1, kCareful, kAhead>(row, j, end, c, smaller(kStep, a_.value_size - c));
      }
    }
  }

  // RT rows times U loads of columns over the keys [begin, end); n columns.
  template <int RT, int U, bool kCareful, bool kAhead>
  LAMINA_INLINE void value_tile(int row, int begin, int end, int column, int n) const {
    constexpr int KT = kLanes / RT;
    constexpr int C = U * kPerWord;
    F32 acc[RT][C];
    LAMINA_UNROLL
    for (int r = 0; r < RT; ++r) {
      LAMINA_UNROLL
      for (int c = 0; c < C; ++c) acc[r][c] = zero();
    }
    // The first of the passes fetches for all.
    const int fetched = kAhead && column == 0 ? a_.value_size * int(sizeof(T)) : 0;
    const float* p = s_ + row * tuning::kDecodePiece + begin * RT / kPerWord;
    for (int j = begin; j < end; j += KT, p += kLanes / kPerWord) {
      LAMINA_UNROLL
      for (int i = 0; i < KT; i += kPerWord) {
        F32 x[C];
        LAMINA_UNROLL
        for (int u = 0; u < U; ++u) {
          F32 words[kPerWord];
          Math::load_values(words, values_ + j + i, column + u * kStep, U > 1 ? kStep : n);
          LAMINA_UNROLL
          for (int w = 0; w < kPerWord; ++w) x[u * kPerWord + w] = words[w];
        }
        for (int b = 0; b < fetched; b += 64) {
          LAMINA_UNROLL
          for (int w = 0; w < kPerWord; ++w) {
            fetch(reinterpret_cast<const char*>(values_[j + i + w + kStreams * ahead_v_]) + b);
          }
        }
        LAMINA_UNROLL
        for (int r = 0; r < RT; ++r) {
          const float weight = p[(r * KT + i) / kPerWord];
          const F32 b = set1(weight);
          LAMINA_UNROLL
          for (int c = 0; c < C; ++c) {
            F32 y = x[c];
            if constexpr (kCareful) y = and_bits(y, Math::nonzero_bits(weight));
            acc[r][c] = Math::multiply_add(y, b, acc[r][c]);
          }
        }
      }
    }
    float* sums = a_.sums + row * columns_ + column;
    LAMINA_UNROLL
    for (int r = 0; r < RT; ++r) {
      if (row + r >= a_.rows) break;
      LAMINA_UNROLL
      for (int c = 0; c < C; ++c) {
        float* to = sums + r * columns_ + c * kLanes;
        store(to, begin == 0 ? acc[r][c] : load(to) + acc[r][c]);
      }
    }
  }

  const DecodeArgs& a_;
  const int columns_, slots_, q_stride_, ahead_k_, ahead_v_;
  float *q_, *s_, *k_scale_, *v_scale_;
  const T **keys_, **values_;
  T* copies_;
};

template <class Math>
void attention_decode(const DecodeArgs& args) {
  Piece<Math>(args).run();
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
