// The tiles of sparse_int8, for every width of registers.
//
// Tokens lie in the lanes: a group of four inputs of a panel is one load for 16 tokens, the four weights of a channel
// one broadcast, and a block of four channels reuses the loads of its group four times. With two registers of tokens a
// 4x4 block is two loads, four broadcasts and eight products.
#pragma once

#include "cpu/kernels/int8_tile.h"
#include "cpu/kernels/sparse_int8.h"
#include "cpu/vec/dot.h"
#include "cpu/vec/four.h"
#include "cpu/vec/gather.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
alignas(64) constexpr int32_t kNoCompensation[kSparseInt8Slab] = {};

LAMINA_INLINE I32 broadcast_weights(const int8_t* w) {
  int32_t four;
  memcpy(&four, w, 4);
  return set1_i32(four);
}

// The sums of `H` channels and `V` registers of tokens over `count` blocks, from what begin(channel, register) gives:
// calls finish(channel, sums [V]).
template <int H, int V, class Begin, class Finish>
LAMINA_INLINE void block_row(const uint16_t* groups, const int8_t* weights, int count, const int32_t* panel, int width,
                             const Begin& begin, const Finish& finish) {
  // Enough sums at a time to hide the latency of a product, 4 cycles.
  constexpr int kStep = sparse_int8_step(H), kSets = H * V >= 4 ? 1 : kStep < 4 / (H * V) ? kStep : 4 / (H * V);
  I32 acc[kSets][H][V];
  LAMINA_UNROLL
  for (int s = 0; s < kSets; ++s) {
    LAMINA_UNROLL
    for (int h = 0; h < H; ++h) {
      LAMINA_UNROLL
      for (int v = 0; v < V; ++v) {
        acc[s][h][v] = s == 0 ? begin(h, v) : set1_i32(0);
      }
    }
  }
  // The products of one group of inputs with the weights that weight(h) gives.
  const auto multiply = [&](int64_t group, I32(&to)[H][V], const auto& weight) __attribute__((always_inline)) {
    const int32_t* x = panel + group * width;
    I32 codes[V];
    LAMINA_UNROLL
    for (int v = 0; v < V; ++v) codes[v] = load_i32(x + v * kLanes);
    LAMINA_UNROLL
    for (int h = 0; h < H; ++h) {
      const I32 w = weight(h);
      LAMINA_UNROLL
      for (int v = 0; v < V; ++v) to[h][v] = dot4(to[h][v], codes[v], w);
    }
  };
  for (; count > 0; count -= kStep) {
    if constexpr (H == 1) {
      // One load for the weights of four blocks, and one for their places: loads are what this height is bound by.
      uint64_t at;
      memcpy(&at, groups, 8);
      const Repeated four = repeat_four(reinterpret_cast<const float*>(weights));
      multiply(at & 0xffff, acc[0], [&](int) { return bits_of(one<0>(four)); });
      multiply(at >> 16 & 0xffff, acc[1 % kSets], [&](int) { return bits_of(one<1>(four)); });
      multiply(at >> 32 & 0xffff, acc[2 % kSets], [&](int) { return bits_of(one<2>(four)); });
      multiply(at >> 48, acc[3 % kSets], [&](int) { return bits_of(one<3>(four)); });
    } else {
      LAMINA_UNROLL
      for (int u = 0; u < kStep; ++u) {
        multiply(groups[u], acc[u % kSets], [&](int h) { return broadcast_weights(weights + 4 * (u * H + h)); });
      }
    }
    groups += kStep;
    weights += 4 * H * kStep;
  }
  LAMINA_UNROLL
  for (int h = 0; h < H; ++h) {
    I32 sums[V];
    LAMINA_UNROLL
    for (int v = 0; v < V; ++v) {
      sums[v] = acc[0][h][v];
      LAMINA_UNROLL
      for (int s = 1; s < kSets; ++s) sums[v] = sums[v] + acc[s][h][v];
    }
    finish(h, sums);
  }
}

// Registers of tokens at once: as many as leave registers for the codes and their magnitudes.
template <int H>
constexpr int tile_vectors(int width) {
  constexpr int kMost = F32::registers >= 32 ? 4 : H == 1 ? 4 : 2;
  return width / kLanes < kMost ? width / kLanes : kMost;
}

// One slab of one span -> sums [16][W].
template <int H, int W>
LAMINA_INLINE void slab_sums(const SparseInt8Weight& w, int64_t span, int64_t slab, const int32_t* panel,
                             int32_t* sums) {
  constexpr int V = tile_vectors<H>(W);
  const int64_t chunk = span * w.slabs + slab;
  int64_t block = w.chunk_first[chunk];
  panel += span * w.span_groups * W;
  for (int64_t g = w.group_first[chunk]; g < w.group_first[chunk + 1]; ++g) {
    const SparseGroup group = w.groups[g];
    for (int t = 0; t < W; t += V * kLanes) {
      int32_t* to = sums + group.group * H * W + t;
      block_row<H, V>(
          w.index + block, w.values + block * 4 * H, group.count, panel + t, W,
          [&](int h, int v)
              __attribute__((always_inline)) { return span > 0 ? load_i32(to + h * W + v * kLanes) : set1_i32(0); },
          [&](int h, const I32(&sum)[V]) __attribute__((always_inline)) {
            LAMINA_UNROLL
            for (int v = 0; v < V; ++v) store_i32(to + h * W + v * kLanes, sum[v]);
          });
    }
    block += group.count;
  }
}

// sums [a.rows][16] of the channels from `first` on -> out.
LAMINA_INLINE void finish_rows_of_slab(const Int8GemmArgs& a, const int32_t* sums, int64_t first) {
  const int64_t left = a.channels - first;
  const Block block{0, 0, int(a.rows), int(left < kSparseInt8Slab ? left : kSparseInt8Slab), kSparseInt8Slab};
  Int8GemmArgs slab = a;
  slab.compensation = kDotKeepsOffset ? a.compensation + first : kNoCompensation;
  slab.w_scales += first;
  if (slab.bias) slab.bias += first;
  const auto advance = [&](EpilogueMatrix& m) {
    if (m.data) m.data = static_cast<char*>(m.data) + first * m.format;
  };
  advance(slab.residual);
  advance(slab.out);
  finish_tile(slab, sums, block);
}

// sums [16][W] of the channels from `first` on -> out.
template <int W>
LAMINA_INLINE void finish_slab(const Int8GemmArgs& a, const int32_t* sums, int64_t first) {
  alignas(64) int32_t tokens[W * kSparseInt8Slab];
  for (int t = 0; t < W; t += kLanes) {
    LAMINA_UNROLL
    for (int c = 0; c < kSparseInt8Slab; c += kLanes) {
      F32 r[kLanes];
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) r[i] = floats_of(load_i32(sums + (c + i) * W + t));
      transpose(r);
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) store_i32(tokens + (t + i) * kSparseInt8Slab + c, bits_of(r[i]));
    }
  }
  finish_rows_of_slab(a, tokens, first);
}

// Calls finish(sums [16][W], first channel, counted from those of slab_begin) for every slab.
template <int H, int W, class Args, class Finish>
LAMINA_INLINE void multiply_panel(const Args& a, const Finish& finish) {
  const SparseInt8Weight& w = a.weight;
  const int64_t held = w.spans > 1 ? kSparseHeldSlabs : 1;
  for (int64_t slab = a.slab_begin; slab < a.slab_end; slab += held) {
    const int64_t end = slab + held < a.slab_end ? slab + held : a.slab_end;
    // Without inputs nothing is summed.
    if (w.spans == 0) memset(a.sums, 0, size_t(kSparseInt8Slab) * W * sizeof(int32_t));
    for (int64_t span = 0; span < w.spans; ++span) {
      for (int64_t s = slab; s < end; ++s) {
        slab_sums<H, W>(w, span, s, a.panel, a.sums + (s - slab) * kSparseInt8Slab * W);
      }
    }
    for (int64_t s = slab; s < end; ++s) {
      finish(a.sums + (s - slab) * kSparseInt8Slab * W, (s - a.slab_begin) * kSparseInt8Slab);
    }
  }
}

// body.operator()<H>() for the height of a block.
template <class Body>
LAMINA_INLINE void with_height(int height, const Body& body) {
  if (height == 1) return body.template operator()<1>();
  if (height == 2) return body.template operator()<2>();
  body.template operator()<4>();
}

template <int H, int W>
void multiply_to_rows(const SparseInt8Args& a) {
  multiply_panel<H, W>(a, [&](const int32_t* sums, int64_t first) { finish_slab<W>(a.epilogue, sums, first); });
}

void sparse_int8(const SparseInt8Args& a) {
  with_height(a.weight.height, [&]<int H>() {
    if (a.width == kPanelTokens) return multiply_to_rows<H, kPanelTokens>(a);
    multiply_to_rows<H, kPanelTokens / 2>(a);
  });
}

// -- outputs that stay a panel

// Registers of tokens at once in the epilogue.
constexpr int kFinished = kPanelTokens / kLanes < 4 ? kPanelTokens / kLanes : 4;

// sums [16][32] of the channels from `first` on -> out, by the operations of finish_rows in their order.
template <Activation A, bool kResidual>
void finish_panel(const SparseInt8ToPanelArgs& a, const int32_t* sums, int64_t first) {
  const int channels = int(a.channels - first < kSparseInt8Slab ? a.channels - first : kSparseInt8Slab);
  const int32_t* compensation = kDotKeepsOffset ? a.compensation + first : kNoCompensation;
  const float* const w_scales = a.w_scales + first;
  const float* const bias = a.bias ? a.bias + first : nullptr;
  for (int t = 0; t < kPanelTokens; t += kFinished * kLanes) {
    F32 x_scales[kFinished];
    I32 largest[kFinished];
    LAMINA_UNROLL
    for (int v = 0; v < kFinished; ++v) {
      x_scales[v] = load(a.x_scales + t + v * kLanes);
      largest[v] = load_i32(a.largest + t + v * kLanes);
    }
    const int32_t* sum = sums + t;
    const float* residual = kResidual ? a.residual + first * kPanelTokens + t : nullptr;
    float* out = a.out + first * kPanelTokens + t;
    for (int c = 0; c < channels; ++c) {
      const I32 offset = set1_i32(compensation[c]);
      const F32 w_scale = set1(w_scales[c]), b = bias ? set1(bias[c]) : zero();
      LAMINA_UNROLL
      for (int v = 0; v < kFinished; ++v) {
        F32 y = to_float(load_i32(sum + v * kLanes) - offset) * w_scale * x_scales[v] + b;
        if constexpr (kResidual) y = y + load(residual + v * kLanes);
        y = activate<A>(y);
        largest[v] = max(largest[v], abs_bits(y));
        store(out + v * kLanes, y);
      }
      sum += kPanelTokens;
      if constexpr (kResidual) residual += kPanelTokens;
      out += kPanelTokens;
    }
    LAMINA_UNROLL
    for (int v = 0; v < kFinished; ++v) store_i32(a.largest + t + v * kLanes, largest[v]);
  }
}

// The same of a weight of one span, where the sums of a group are finished while they are in registers, and begin with
// what the offset of the codes adds to them taken off. For the activations that stand between most layers: others are
// worth the way by memory, and would be most of the code here.
template <int H, bool kResidual, Activation A>
void multiply_to_panel_at_once(const SparseInt8ToPanelArgs& a) {
  constexpr int V = tile_vectors<H>(kPanelTokens);
  const SparseInt8Weight& w = a.weight;
  for (int64_t slab = a.slab_begin; slab < a.slab_end; ++slab) {
    for (int t = 0; t < kPanelTokens; t += V * kLanes) {
      F32 x_scales[V];
      I32 largest[V];
      LAMINA_UNROLL
      for (int v = 0; v < V; ++v) {
        x_scales[v] = load(a.x_scales + t + v * kLanes);
        largest[v] = load_i32(a.largest + t + v * kLanes);
      }
      int64_t block = w.chunk_first[slab];
      for (int64_t g = w.group_first[slab]; g < w.group_first[slab + 1]; ++g) {
        const SparseGroup group = w.groups[g];
        const int64_t first = (slab - a.slab_begin) * kSparseInt8Slab + group.group * H;
        const int64_t channels = a.channels - first;
        const int32_t* compensation = a.compensation + first;
        const float* w_scales = a.w_scales + first;
        const float* bias = a.bias ? a.bias + first : nullptr;
        const float* residual = kResidual ? a.residual + first * kPanelTokens + t : nullptr;
        float* out = a.out + first * kPanelTokens + t;
        block_row<H, V>(
            w.index + block, w.values + block * 4 * H, group.count, a.panel + t, kPanelTokens,
            [&](int h, int) __attribute__((always_inline)) {
              return kDotKeepsOffset ? set1_i32(0) - set1_i32(compensation[h]) : set1_i32(0);
            },
            [&](int h, const I32(&sum)[V]) __attribute__((always_inline)) {
              if (h >= channels) return;
              const F32 w_scale = set1(w_scales[h]), b = bias ? set1(bias[h]) : zero();
              LAMINA_UNROLL
              for (int v = 0; v < V; ++v) {
                F32 y = to_float(sum[v]) * w_scale * x_scales[v] + b;
                if constexpr (kResidual) y = y + load(residual + h * kPanelTokens + v * kLanes);
                y = activate<A>(y);
                largest[v] = max(largest[v], abs_bits(y));
                store(out + h * kPanelTokens + v * kLanes, y);
              }
            });
        block += group.count;
      }
      LAMINA_UNROLL
      for (int v = 0; v < V; ++v) store_i32(a.largest + t + v * kLanes, largest[v]);
    }
  }
}

void sparse_int8_to_panel(const SparseInt8ToPanelArgs& a) {
  if (a.weight.spans == 1 && a.activation == Activation::none) {
    return with_height(a.weight.height, [&]<int H>() {
      a.residual ? multiply_to_panel_at_once<H, true, Activation::none>(a)
                 : multiply_to_panel_at_once<H, false, Activation::none>(a);
    });
  }
  if (a.weight.spans == 1 && a.activation == Activation::gelu && !a.residual) {
    return with_height(a.weight.height, [&]<int H>() { multiply_to_panel_at_once<H, false, Activation::gelu>(a); });
  }
  void (*finish)(const SparseInt8ToPanelArgs&, const int32_t*, int64_t) = nullptr;
  with_activation(a.activation,
                  [&]<Activation A>() { finish = a.residual ? finish_panel<A, true> : finish_panel<A, false>; });
  with_height(a.weight.height, [&]<int H>() {
    multiply_panel<H, kPanelTokens>(a, [&](const int32_t* sums, int64_t first) { finish(a, sums, first); });
  });
}

// -- few rows

// The sums of the H channels of a row of blocks and R rows of codes -> sums [R][16].
template <int H, int R>
LAMINA_INLINE void few_rows(const uint16_t* groups, const int8_t* weights, int count, const int32_t* codes, int64_t ld,
                            bool add, int32_t* sums) {
  constexpr int kBlocks = kLanes / H;  // of a register
  I32 acc[R];
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) acc[r] = set1_i32(0);
  const auto step = [&](const uint16_t* at, I32 w) __attribute__((always_inline)) {
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) acc[r] = dot4(acc[r], gather_words<H>(codes + r * ld, at), w);
  };
  for (; count >= kBlocks; count -= kBlocks) {
    step(groups, load_i32(reinterpret_cast<const int32_t*>(weights)));
    groups += kBlocks;
    weights += 4 * kLanes;
  }
  // What lies behind the last block is weighed with zero. The places there are of this span, or the first ones of the
  // next, which are no farther than this one reaches.
  if (count > 0) step(groups, bits_of(load_n(reinterpret_cast<const float*>(weights), count * H)));
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) {
    int32_t lanes[kLanes];
    store_i32(lanes, acc[r]);
    LAMINA_UNROLL
    for (int h = 0; h < H; ++h) {
      uint32_t sum = add ? uint32_t(sums[r * kSparseInt8Slab + h]) : 0;
      LAMINA_UNROLL
      for (int i = h; i < kLanes; i += H) sum += uint32_t(lanes[i]);
      sums[r * kSparseInt8Slab + h] = int32_t(sum);
    }
  }
}

template <int H, int R>
void multiply_rows(const SparseInt8RowsArgs& a) {
  const SparseInt8Weight& w = a.weight;
  alignas(64) int32_t sums[R * kSparseInt8Slab] = {};
  const int32_t* codes = reinterpret_cast<const int32_t*>(a.epilogue.codes);
  for (int64_t slab = a.slab_begin; slab < a.slab_end; ++slab) {
    for (int64_t span = 0; span < w.spans; ++span) {
      const int64_t chunk = span * w.slabs + slab;
      int64_t block = w.chunk_first[chunk];
      for (int64_t g = w.group_first[chunk]; g < w.group_first[chunk + 1]; ++g) {
        const SparseGroup group = w.groups[g];
        few_rows<H, R>(w.index + block, w.values + block * 4 * H, group.count, codes + span * w.span_groups,
                       a.epilogue.ld_codes / 4, span > 0, sums + group.group * H);
        block += group.count;
      }
    }
    finish_rows_of_slab(a.epilogue, sums, (slab - a.slab_begin) * kSparseInt8Slab);
  }
}

void sparse_int8_rows(const SparseInt8RowsArgs& a) {
  with_height(a.weight.height, [&]<int H>() {
    switch (a.epilogue.rows) {
      case 1: return multiply_rows<H, 1>(a);
      case 2: return multiply_rows<H, 2>(a);
      default: return multiply_rows<H, 3>(a);
    }
  });
}

// -- panels

// Row-major codes -> a panel: 4 lanes x lanes bytes at a time, transposed as words of four codes.
void sparse_int8_panel(const SparsePanelArgs& a) {
  for (int64_t g = 0; g < a.groups; g += kLanes) {
    const int count = int(a.groups - g < kLanes ? a.groups - g : kLanes);
    for (int t = 0; t < a.width; t += kLanes) {
      F32 r[kLanes];
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        // A row is followed by bytes enough for a whole register (kInt8RowPadding).
        r[i] = zero();
        if (t + i < a.rows) {
          int32_t words[kLanes];
          memcpy(words, a.codes + (t + i) * a.ld + 4 * g, sizeof words);
          r[i] = floats_of(load_i32(words));
        }
      }
      transpose(r);
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        if (i < count) store_i32(a.panel + (g + i) * a.width + t, bits_of(r[i]));
      }
    }
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
