// The tiles of sparse_int8, for every width of registers.
//
// Tokens lie in the lanes: a group of four inputs of a panel is one load for 16 tokens, the four weights of a channel
// one broadcast, and a block of four channels reuses the loads of its group four times. With two registers of tokens a
// 4x4 block is two loads, four broadcasts and eight products.
#pragma once

#include "cpu/kernels/int8_tile.h"
#include "cpu/kernels/sparse_int8.h"
#include "cpu/vec/dot.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
alignas(64) constexpr int32_t kNoCompensation[kSparseUnit] = {};

LAMINA_INLINE I32 broadcast_weights(const int8_t* w) {
  int32_t four;
  memcpy(&four, w, 4);
  return set1_i32(four);
}

// The sums of `H` channels and `V` registers of tokens over `count` blocks, from what `sums` holds or from zero.
template <int H, int V>
LAMINA_INLINE void block_row(const uint16_t* groups, const int8_t* weights, int count, const int32_t* panel, int width,
                             bool add, int32_t* sums) {
  // Enough sums at a time to hide the latency of a product, 4 cycles.
  constexpr int kSets = H * V >= 4 ? 1 : 4 / (H * V);
  I32 acc[kSets][H][V];
  LAMINA_UNROLL
  for (int s = 0; s < kSets; ++s) {
    LAMINA_UNROLL
    for (int h = 0; h < H; ++h) {
      LAMINA_UNROLL
      for (int v = 0; v < V; ++v) {
        acc[s][h][v] = s == 0 && add ? load_i32(sums + h * width + v * kLanes) : set1_i32(0);
      }
    }
  }
  const auto step = [&](I32(&to)[H][V]) __attribute__((always_inline)) {
    const int32_t* x = panel + int64_t(*groups++) * width;
    I32 codes[V];
    LAMINA_UNROLL
    for (int v = 0; v < V; ++v) codes[v] = load_i32(x + v * kLanes);
    LAMINA_UNROLL
    for (int h = 0; h < H; ++h) {
      const I32 w = broadcast_weights(weights + 4 * h);
      LAMINA_UNROLL
      for (int v = 0; v < V; ++v) to[h][v] = dot4(to[h][v], codes[v], w);
    }
    weights += 4 * H;
  };
  constexpr int kUnroll = kSets > 2 ? kSets : 2;
  for (; count >= kUnroll; count -= kUnroll) {
    LAMINA_UNROLL
    for (int u = 0; u < kUnroll; ++u) step(acc[u % kSets]);
  }
  for (; count > 0; --count) step(acc[0]);
  LAMINA_UNROLL
  for (int h = 0; h < H; ++h) {
    LAMINA_UNROLL
    for (int v = 0; v < V; ++v) {
      I32 sum = acc[0][h][v];
      LAMINA_UNROLL
      for (int s = 1; s < kSets; ++s) sum = sum + acc[s][h][v];
      store_i32(sums + h * width + v * kLanes, sum);
    }
  }
}

// Registers of tokens at once: as many as leave registers for the codes and their magnitudes.
template <int H>
constexpr int tile_vectors(int width) {
  constexpr int kMost = F32::registers >= 32 ? 4 : H == 1 ? 4 : 2;
  return width / kLanes < kMost ? width / kLanes : kMost;
}

// One unit of one span -> sums [16][width].
template <int H, int W>
LAMINA_INLINE void unit_sums(const SparseInt8Weight& w, int64_t span, int64_t unit, const int32_t* panel,
                             int32_t* sums) {
  constexpr int V = tile_vectors<H>(W);
  int64_t block = w.starts[span * (w.units + 1) + unit];
  const uint16_t* counts = w.counts + (span * w.units + unit) * (kSparseUnit / H);
  for (int row = 0; row < kSparseUnit / H; ++row) {
    const int count = counts[row];
    for (int t = 0; t < W; t += V * kLanes) {
      block_row<H, V>(w.groups + block, w.weights + block * 4 * H, count, panel + t, W, span > 0,
                      sums + row * H * W + t);
    }
    block += count;
  }
}

// sums [a.rows][16] of the channels from `first` on -> out.
LAMINA_INLINE void finish_rows_of_unit(const Int8GemmArgs& a, const int32_t* sums, int64_t first) {
  const int64_t left = a.channels - first;
  const Block block{0, 0, int(a.rows), int(left < kSparseUnit ? left : kSparseUnit), kSparseUnit};
  Int8GemmArgs unit = a;
  unit.compensation = kDotKeepsOffset ? a.compensation + first : kNoCompensation;
  unit.w_scales += first;
  if (unit.bias) unit.bias += first;
  const auto advance = [&](EpilogueMatrix& m) {
    if (m.data) m.data = static_cast<char*>(m.data) + first * m.format;
  };
  advance(unit.residual);
  advance(unit.out);
  finish_tile(unit, sums, block);
}

// sums [16][W] of the channels from `first` on -> out.
template <int W>
LAMINA_INLINE void finish_unit(const Int8GemmArgs& a, const int32_t* sums, int64_t first) {
  alignas(64) int32_t tokens[W * kSparseUnit];
  for (int t = 0; t < W; t += kLanes) {
    LAMINA_UNROLL
    for (int c = 0; c < kSparseUnit; c += kLanes) {
      F32 r[kLanes];
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) r[i] = floats_of(load_i32(sums + (c + i) * W + t));
      transpose(r);
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) store_i32(tokens + (t + i) * kSparseUnit + c, bits_of(r[i]));
    }
  }
  finish_rows_of_unit(a, tokens, first);
}

template <int H, int W>
void multiply_panel(const SparseInt8Args& a) {
  const SparseInt8Weight& w = a.weight;
  const int64_t chunk = w.spans > 1 ? kSparseChunkUnits : 1;
  for (int64_t unit = a.unit_begin; unit < a.unit_end; unit += chunk) {
    const int64_t end = unit + chunk < a.unit_end ? unit + chunk : a.unit_end;
    for (int64_t span = 0; span < w.spans; ++span) {
      for (int64_t u = unit; u < end; ++u) {
        unit_sums<H, W>(w, span, u, a.panel, a.sums + (u - unit) * kSparseUnit * W);
      }
    }
    for (int64_t u = unit; u < end; ++u) {
      finish_unit<W>(a.epilogue, a.sums + (u - unit) * kSparseUnit * W, (u - a.unit_begin) * kSparseUnit);
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

void sparse_int8(const SparseInt8Args& a) {
  with_height(a.weight.height, [&]<int H>() {
    if (a.width == kSparsePanel) return multiply_panel<H, kSparsePanel>(a);
    multiply_panel<H, kSparsePanel / 2>(a);
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
  const auto step = [&](const uint16_t* at, const int8_t* four) __attribute__((always_inline)) {
    int32_t words[kLanes];
    memcpy(words, four, sizeof words);
    const I32 w = load_i32(words);
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) acc[r] = dot4(acc[r], gather_each<H>(codes + r * ld, at), w);
  };
  for (; count >= kBlocks; count -= kBlocks) {
    step(groups, weights);
    groups += kBlocks;
    weights += 4 * kLanes;
  }
  if (count > 0) {
    // Blocks of zeros behind the last.
    uint16_t at[kBlocks] = {};
    int8_t four[4 * kLanes] = {};
    for (int i = 0; i < count; ++i) at[i] = groups[i];
    memcpy(four, weights, size_t(count) * 4 * H);
    step(at, four);
  }
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) {
    int32_t lanes[kLanes];
    store_i32(lanes, acc[r]);
    LAMINA_UNROLL
    for (int h = 0; h < H; ++h) {
      uint32_t sum = add ? uint32_t(sums[r * kSparseUnit + h]) : 0;
      LAMINA_UNROLL
      for (int i = h; i < kLanes; i += H) sum += uint32_t(lanes[i]);
      sums[r * kSparseUnit + h] = int32_t(sum);
    }
  }
}

template <int H, int R>
void multiply_rows(const SparseInt8RowsArgs& a) {
  const SparseInt8Weight& w = a.weight;
  alignas(64) int32_t sums[R * kSparseUnit];
  const int32_t* codes = reinterpret_cast<const int32_t*>(a.epilogue.codes);
  for (int64_t unit = a.unit_begin; unit < a.unit_end; ++unit) {
    for (int64_t span = 0; span < w.spans; ++span) {
      int64_t block = w.starts[span * (w.units + 1) + unit];
      const uint16_t* counts = w.counts + (span * w.units + unit) * (kSparseUnit / H);
      for (int row = 0; row < kSparseUnit / H; ++row) {
        few_rows<H, R>(w.groups + block, w.weights + block * 4 * H, counts[row], codes, a.epilogue.ld_codes / 4,
                       span > 0, sums + row * H);
        block += counts[row];
      }
    }
    finish_rows_of_unit(a.epilogue, sums, (unit - a.unit_begin) * kSparseUnit);
  }
}

void sparse_int8_rows(const SparseInt8RowsArgs& a) {
  with_height(a.weight.height, [&]<int H>() {
    switch (a.epilogue.rows) {
      case 1: return multiply_rows<H, 1>(a);
      case 2: return multiply_rows<H, 2>(a);
      case 3: return multiply_rows<H, 3>(a);
      default: return multiply_rows<H, 4>(a);
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
