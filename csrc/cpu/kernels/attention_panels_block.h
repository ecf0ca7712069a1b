// The body of the attention_panels kernels, written over the arithmetic of attention_math.h.
//
// The idea of attention_block.h, where queries lie in the vector lanes and keys are broadcast, needs Q and O transposed
// on the way in and out. In panels all three come and go as the kernel wants them:
//
//   S[key][query lanes] = sum_d Q[d][query lanes] K[d][key]       both as they lie
//   O[d][query lanes]   = sum_key P[key][query lanes] V[d][key]   V as it lies, O as the next layer reads it
//
// A panel has few queries, so that the scores of all keys stay in L2: softmax takes two passes and needs no rescaling.
#pragma once

#include "cpu/kernels/attention_math.h"
#include "cpu/kernels/attention_panels.h"

namespace lamina::LAMINA_ISA {
namespace {

// Registers of queries, keys and dimensions of a tile: as many sums as leave room for queries and a broadcast.
constexpr int kTileQueries = 2;
constexpr int kTileColumns = F32::registers >= 32 ? 8 : 4;
static_assert(kPanelTokens % (kTileQueries * kLanes) == 0 && kPanelTokens % kTileColumns == 0);

template <class Math>
class PanelHead {
  static constexpr int kPerWord = Math::keys_per_word, kDims = Math::dims_per_word;
  static constexpr int kValueWords = kPanelTokens / kPerWord;  // of a dimension of a panel of values

 public:
  explicit PanelHead(const AttentionPanelsArgs& a)
      : a_(a), words_((a.head_size + kDims - 1) / kDims), panels_((a.keys + kPanelTokens - 1) / kPanelTokens) {
    float* room = a.scratch;
    const auto take = [&](int64_t floats) {
      float* taken = room;
      room += floats;
      return taken;
    };
    scores_ = take(panels_ * kPanelTokens * kPanelTokens);
    q_ = take(int64_t{words_} * kPanelTokens);
    keys_ = a.k;
    key_panel_ = a.k_panel;
    if constexpr (kDims > 1) {
      float* packed = take(panels_ * words_ * kPanelTokens);
      for (int64_t p = 0; p < panels_; ++p) {
        pack_pairs_of_dimensions(a.k + p * a.k_panel, packed + p * words_ * kPanelTokens);
      }
      keys_ = packed;
      key_panel_ = int64_t{words_} * kPanelTokens;
    }
    values_ = a.v;
    value_panel_ = a.v_panel;
    if (kPerWord > 1 || a.added) {
      float* packed = take(panels_ * a.value_size * kValueWords);
      for (int64_t p = 0; p < panels_; ++p) pack_values(p, packed + p * a.value_size * kValueWords);
      values_ = packed;
      value_panel_ = int64_t{a.value_size} * kValueWords;
    }
  }

  void run(int64_t panel) {
    const float* q = a_.q + panel * a_.q_panel;
    if constexpr (kDims > 1) {
      pack_pairs_of_dimensions(q, q_);
      q = q_;
    }
    float* out = a_.out + panel * a_.out_panel;
    int32_t* largest = a_.largest + panel * kPanelTokens;
    for (int t = 0; t < kPanelTokens; t += kTileQueries * kLanes) {
      F32 highest[kTileQueries];
      LAMINA_UNROLL
      for (int v = 0; v < kTileQueries; ++v) highest[v] = set1(-kInfinity);
      for (int64_t p = 0; p < panels_; ++p) {
        for (int key = 0; key < kPanelTokens; key += kTileColumns) {
          score_tile(q + t, keys_ + p * key_panel_ + key, p * kPanelTokens + key, t, highest);
        }
      }
      weights(t, highest);
      int d = 0;
      for (; d + kTileColumns <= a_.value_size; d += kTileColumns) value_tile<kTileColumns>(d, t, out, largest);
      for (; d < a_.value_size; ++d) value_tile<1>(d, t, out, largest);
    }
  }

 private:
  // [head_size][32] -> words of the dimensions d and d + 1: [head_size / 2][32].
  void pack_pairs_of_dimensions(const float* x, float* to) const {
    if constexpr (kDims > 1) {
      for (int w = 0; w < words_; ++w) {
        const float* low = x + 2 * w * kPanelTokens;
        for (int t = 0; t < kPanelTokens; t += kLanes) {
          const F32 pair[2] = {load(low + t), 2 * w + 1 < a_.head_size ? load(low + kPanelTokens + t) : zero()};
          store(to + w * kPanelTokens + t, Math::join(pair));
        }
      }
    }
  }

  // Words of adjacent keys, zero where a key takes no part: 0 * v would be NaN if v is not finite.
  void pack_values(int64_t panel, float* to) const {
    const float* from = a_.v + panel * a_.v_panel;
    alignas(64) float kept[kPanelTokens];  // all bits, or none
    for (int j = 0; j < kPanelTokens; ++j) {
      const int64_t key = panel * kPanelTokens + j;
      const uint32_t bits = key < a_.keys && !(a_.added && a_.added[key] == -kInfinity) ? ~uint32_t{0} : 0;
      memcpy(kept + j, &bits, 4);
    }
    for (int d = 0; d < a_.value_size; ++d) {
      for (int j = 0; j < kPanelTokens; j += kPerWord * kLanes) {
        F32 w[kPerWord];
        LAMINA_UNROLL
        for (int i = 0; i < kPerWord; ++i) {
          const int at = j + i * kLanes;
          w[i] = floats_of(bits_of(load(from + d * kPanelTokens + at)) & bits_of(load(kept + at)));
        }
        Math::join_adjacent(w, to + d * kValueWords + j / kPerWord);
      }
    }
  }

  // Scores of kTileColumns keys from `first` on, whose words are k[w][32].
  __attribute__((noinline)) void score_tile(const float* q, const float* k, int64_t first, int t,
                                            F32 (&highest)[kTileQueries]) {
    F32 acc[kTileColumns][kTileQueries];
    LAMINA_UNROLL
    for (int j = 0; j < kTileColumns; ++j) {
      LAMINA_UNROLL
      for (int v = 0; v < kTileQueries; ++v) acc[j][v] = zero();
    }
#pragma GCC unroll 2
    for (int w = 0; w < words_; ++w) {
      F32 x[kTileQueries];
      LAMINA_UNROLL
      for (int v = 0; v < kTileQueries; ++v) x[v] = load(q + v * kLanes);
      LAMINA_UNROLL
      for (int j = 0; j < kTileColumns; ++j) {
        const F32 b = set1(k[j]);
        LAMINA_UNROLL
        for (int v = 0; v < kTileQueries; ++v) acc[j][v] = Math::multiply_add(x[v], b, acc[j][v]);
      }
      q += kPanelTokens;
      k += kPanelTokens;
    }
    const F32 factor = set1(a_.factor);
    const float* added = a_.added ? a_.added + first : nullptr;
    float* to = scores_ + first * kPanelTokens + t;
    LAMINA_UNROLL
    for (int j = 0; j < kTileColumns; ++j) {
      const bool out = first + j >= a_.keys || (added && added[j] == -kInfinity);
      LAMINA_UNROLL
      for (int v = 0; v < kTileQueries; ++v) {
        F32 s = acc[j][v] * factor;
        if (added) s = s + set1(added[j]);
        if (out) s = set1(-kInfinity);
        highest[v] = max(s, highest[v]);  // in this order a NaN is left out; its weight is NaN
        store(to + j * kPanelTokens + v * kLanes, s);
      }
    }
  }

  // Scores -> words of weights in their place, and 1 / their sum.
  __attribute__((noinline)) void weights(int t, const F32 (&highest)[kTileQueries]) {
    F32 base[kTileQueries], total[kTileQueries];
    LAMINA_UNROLL
    for (int v = 0; v < kTileQueries; ++v) {
      base[v] = max(highest[v], set1(kLowest));
      total[v] = zero();
    }
    for (int64_t panel = 0; panel < panels_; ++panel) {
      // A panel is summed by itself before it joins the sum: shorter chains, smaller errors.
      F32 sum[kTileQueries];
      LAMINA_UNROLL
      for (int v = 0; v < kTileQueries; ++v) sum[v] = zero();
      for (int j = 0; j < kPanelTokens; j += kPerWord) {
        const int64_t key = panel * kPanelTokens + j;
        const float* s = scores_ + key * kPanelTokens + t;
        float* to = scores_ + key / kPerWord * kPanelTokens + t;
        LAMINA_UNROLL
        for (int v = 0; v < kTileQueries; ++v) {
          F32 w[kPerWord];
          LAMINA_UNROLL
          for (int i = 0; i < kPerWord; ++i) w[i] = Math::exp2(load(s + i * kPanelTokens + v * kLanes) - base[v]);
          const F32 word = Math::join(w);
          sum[v] = Math::add_weights(word, sum[v]);
          store(to + v * kLanes, word);
        }
      }
      LAMINA_UNROLL
      for (int v = 0; v < kTileQueries; ++v) total[v] = total[v] + sum[v];
    }
    LAMINA_UNROLL
    for (int v = 0; v < kTileQueries; ++v) {
      inverse_[v] = select(less(zero(), total[v]), set1(1.0f) / total[v], total[v]);
    }
  }

  template <int D>
  __attribute__((noinline)) void value_tile(int d, int t, float* out, int32_t* largest) const {
    F32 acc[D][kTileQueries];
    LAMINA_UNROLL
    for (int i = 0; i < D; ++i) {
      LAMINA_UNROLL
      for (int v = 0; v < kTileQueries; ++v) acc[i][v] = zero();
    }
    const float* p = scores_ + t;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const float* values = values_ + panel * value_panel_ + d * kValueWords;
      const int64_t left = (a_.keys - panel * kPanelTokens + kPerWord - 1) / kPerWord;
      const int count = int(smaller(left, int64_t{kValueWords}));
#pragma GCC unroll 2
      for (int j = 0; j < count; ++j) {
        F32 x[kTileQueries];
        LAMINA_UNROLL
        for (int v = 0; v < kTileQueries; ++v) x[v] = load(p + v * kLanes);
        LAMINA_UNROLL
        for (int i = 0; i < D; ++i) {
          const F32 b = set1(values[i * kValueWords + j]);
          LAMINA_UNROLL
          for (int v = 0; v < kTileQueries; ++v) acc[i][v] = Math::multiply_add(x[v], b, acc[i][v]);
        }
        p += kPanelTokens;
      }
    }
    LAMINA_UNROLL
    for (int v = 0; v < kTileQueries; ++v) {
      I32 most = load_i32(largest + t + v * kLanes);
      LAMINA_UNROLL
      for (int i = 0; i < D; ++i) {
        const F32 y = acc[i][v] * inverse_[v];
        most = max(most, abs_bits(y));
        store(out + (d + i) * kPanelTokens + t + v * kLanes, y);
      }
      store_i32(largest + t + v * kLanes, most);
    }
  }

  const AttentionPanelsArgs& a_;
  const int words_;
  const int64_t panels_;
  float *scores_, *q_;
  const float *keys_, *values_;
  int64_t key_panel_, value_panel_;
  F32 inverse_[kTileQueries];
};

template <class Math>
void attention_panels(const AttentionPanelsArgs& a) {
  PanelHead<Math> head(a);
  for (int64_t panel = 0; panel < a.panels; ++panel) head.run(panel);
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
