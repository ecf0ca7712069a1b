// Register tiles of panel_gemm, and of the kernels that go on from its sums: rows x panels over the whole of k.
//
// With 32 registers of 16 lanes a tile of many rows has up to 24 accumulators: 6 rows x 4 groups, 7 x 3, or 6 x four
// panels of one group. Up to three rows are bound by reading the weights, not by arithmetic: they take two panels at
// once, two streams for the processor's prefetcher. Narrower registers cut the 16 lanes of a group into slices. As far
// as registers allow, a tile has all slices of some groups rather than one slice of all, so that each line of weights
// is read once: two slices of every group for one row, of two groups for up to three, of one for more.
#pragma once

#include "cpu/kernels/panel_gemm.h"
#include "cpu/vec/dot.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kSlices = kPanelLanes / F32::lanes;
constexpr int kMaxRows = 7;
constexpr bool kWide = F32::registers >= 32;
constexpr int kMaxSums = 24 * kPanelLanes;  // of a tile: rows x panels x groups x 16
// A tile of some of a panel's groups skips lines, which the processor does not foresee: they are asked for so many k
// ahead, some 400 cycles.
constexpr int kAhead = 64;

// Rows of the tallest tile: accumulators, the weights of one k, and a broadcast of x must fit the registers.
constexpr int tile_rows(int groups) { return kWide ? (groups == 3 ? 7 : 6) : (groups == 4 ? 3 : 4); }

// Panels of a tile.
constexpr int tile_panels(int rows, int groups) {
  if (groups == 1) return rows == 1 ? 8 / (kWide ? 1 : 2) : kWide ? 4 : 2;
  return kWide && rows <= 3 ? 2 : 1;
}

// Groups of a tile of floats, and slices of each.
constexpr int tile_groups(int rows, int groups, int panels) {
  if (kSlices == 1 || rows == 1 || panels > 1 || (groups == 3 && rows <= 4)) return groups;
  return kSlices == 2 && rows <= 3 && groups % 2 == 0 ? 2 : 1;
}
constexpr int tile_slices(int rows, int groups, int panels) {
  if (kSlices == 1) return 1;
  if (rows == 1) return 2;
  if (panels > 1 || (groups == 3 && rows <= 4)) return 1;
  return rows <= 3 ? 4 / (kSlices == 2 ? 2 : 1) : 2;
}

// MR rows x NP panels x (S of kSlices slices of each of G of NG groups), from place `first` of a panel's row on.
template <int MR, int NG, int NP, int G, int S, class Weight>
LAMINA_INLINE void float_tile(const PanelGemmArgs<Weight>& a, int64_t panel, int64_t row, int first, float* out) {
  constexpr int kColumns = NP * G * S, kWidth = NG * kPanelLanes;
  const auto place = [](int j) { return j / S % G * kPanelLanes + j % S * F32::lanes; };
  F32 acc[MR][kColumns];
  LAMINA_UNROLL
  for (int j = 0; j < kColumns; ++j) {
    const F32 start = a.bias ? load(a.bias + (panel + j / (G * S)) * kWidth + place(j) + first) : zero();
    LAMINA_UNROLL
    for (int r = 0; r < MR; ++r) acc[r][j] = start;
  }
  const float* x = a.x + row * a.ldx;
  const int64_t panel_size = (a.panel_k ? a.panel_k : a.k) * kWidth;
  const Weight* w = a.panels + panel * panel_size + first;
  for (int64_t k = 0; k < a.k; ++k, w += kWidth) {
    F32 column[kColumns];
    LAMINA_UNROLL
    for (int j = 0; j < kColumns; ++j) column[j] = load(w + j / (G * S) * panel_size + place(j));
    if constexpr (G < NG) {
      LAMINA_UNROLL
      for (int g = 0; g < G; ++g) __builtin_prefetch(w + kAhead * kWidth + g * kPanelLanes);
    }
    LAMINA_UNROLL
    for (int r = 0; r < MR; ++r) {
      const F32 value = set1(x[r * a.ldx + k]);
      LAMINA_UNROLL
      for (int j = 0; j < kColumns; ++j) acc[r][j] = fmadd(value, column[j], acc[r][j]);
    }
  }
  if (a.adds) {
    LAMINA_UNROLL
    for (int r = 0; r < MR; ++r) {
      LAMINA_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        acc[r][j] = acc[r][j] + load(out + j / (G * S) * a.out_panel + r * a.out_row + place(j) + first);
      }
    }
  }
  LAMINA_UNROLL
  for (int r = 0; r < MR; ++r) {
    LAMINA_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      store(out + j / (G * S) * a.out_panel + r * a.out_row + place(j) + first, acc[r][j]);
    }
  }
}

template <int MR, int NG, int NP, int S>
LAMINA_INLINE void int8_tile(const PanelGemmArgs<int8_t>& a, int64_t panel, int64_t row, int first, float* out) {
  constexpr int kColumns = NP * NG * S, kWidth = NG * kPanelLanes;
  const auto place = [](int j) { return j / S % NG * kPanelLanes + j % S * F32::lanes; };
  const auto channel = [&](int j) { return (panel + j / (NG * S)) * kWidth + place(j) + first; };
  first *= F32::lanes;
  I32 acc[MR][kColumns];
  LAMINA_UNROLL
  for (int j = 0; j < kColumns; ++j) {
    const I32 start = dot4_start(a.compensation + channel(j));
    LAMINA_UNROLL
    for (int r = 0; r < MR; ++r) acc[r][j] = start;
  }
  // The sums are exact: backwards, k falls too.
  const int64_t fours = a.k / 4, panel_size = a.k * kWidth;
  const int64_t by = a.backwards ? -1 : 1;
  const uint8_t* x = a.x + row * a.ldx + (a.backwards ? 4 * (fours - 1) : 0);
  const int8_t* w = a.panels + panel * panel_size + 4 * first + (a.backwards ? (fours - 1) * 4 * kWidth : 0);
  for (int64_t k = 0; k < fours; ++k, w += by * 4 * kWidth, x += by * 4) {
    I32 column[kColumns];
    LAMINA_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      column[j] = load_i32(reinterpret_cast<const int32_t*>(w + j / (NG * S) * panel_size + 4 * place(j)));
    }
    LAMINA_UNROLL
    for (int r = 0; r < MR; ++r) {
      int32_t four;
      memcpy(&four, x + r * a.ldx, 4);
      const I32 codes = set1_i32(four);
      LAMINA_UNROLL
      for (int j = 0; j < kColumns; ++j) acc[r][j] = dot4(acc[r][j], codes, column[j]);
    }
  }
  LAMINA_UNROLL
  for (int j = 0; j < kColumns; ++j) {
    const F32 w_scale = load(a.w_scales + channel(j));
    const F32 bias = a.bias ? load(a.bias + channel(j)) : zero();
    float* at = out + j / (NG * S) * a.out_panel + place(j) + first;
    LAMINA_UNROLL
    for (int r = 0; r < MR; ++r) {
      store(at + r * a.out_row, to_float(acc[r][j]) * w_scale * set1(a.x_scales[row + r]) + bias);
    }
  }
}

template <class Weight, int MR, int NG, int NP>
__attribute__((noinline)) void tile(const PanelGemmArgs<Weight>& a, int64_t panel, int64_t row, float* out) {
  if constexpr (PanelGemmArgs<Weight>::is_int8) {
    constexpr int together = MR == 1 && kSlices > 1 ? 2 : 1;
    for (int first = 0; first < kSlices; first += together) {
      int8_tile<MR, NG, NP, together>(a, panel, row, first, out);
    }
  } else {
    constexpr int groups = tile_groups(MR, NG, NP), slices = tile_slices(MR, NG, NP);
    for (int group = 0; group < NG; group += groups) {
      for (int slice = 0; slice < kSlices; slice += slices) {
        const int first = group * kPanelLanes + slice * F32::lanes;
        float_tile<MR, NG, NP, groups, slices>(a, panel, row, first, out);
      }
    }
  }
}

// Null where a tile would not fit the registers: it is never asked for.
template <class Weight>
using TileFunction = void (*)(const PanelGemmArgs<Weight>&, int64_t, int64_t, float*);

template <class Weight, int MR, int NG, bool kSeveral>
constexpr TileFunction<Weight> tile_if_it_fits() {
  if constexpr (MR <= tile_rows(NG)) {
    return tile < Weight, MR, NG, kSeveral ? tile_panels(MR, NG) : 1 > ;
  } else {
    return nullptr;
  }
}

template <class Weight, int NG, bool kSeveral>
constexpr TileFunction<Weight> kTiles[kMaxRows] = {
    tile_if_it_fits<Weight, 1, NG, kSeveral>(), tile_if_it_fits<Weight, 2, NG, kSeveral>(),
    tile_if_it_fits<Weight, 3, NG, kSeveral>(), tile_if_it_fits<Weight, 4, NG, kSeveral>(),
    tile_if_it_fits<Weight, 5, NG, kSeveral>(), tile_if_it_fits<Weight, 6, NG, kSeveral>(),
    tile_if_it_fits<Weight, 7, NG, kSeveral>()};

// Calls body(tile, first panel, panels, first row, rows) for all tiles; tile(args, first panel, first row, out)
// computes it into out[panel][row][groups][16] with the strides of the arguments. Row by row within a block of panels.
template <int NG, class Weight, class Body>
LAMINA_INLINE void for_each_tile(const PanelGemmArgs<Weight>& a, const Body& body) {
  constexpr int kTallest = tile_rows(NG);
  // Tiles of nearly equal height: 8 rows as 4 + 4, not as 6 + 2.
  const int64_t tiles = (a.rows + kTallest - 1) / kTallest;
  const int64_t width = tile_panels(int(a.rows < kTallest ? a.rows : kTallest), NG);
  const int64_t wide = width > 1 ? a.count / width : 0;    // blocks of `width` panels
  const int64_t blocks = wide + (a.count - wide * width);  // and single ones
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t block = a.backwards ? blocks - 1 - i : i;
    const int64_t panel = block < wide ? block * width : a.count - (blocks - block);
    const auto& tiles_of = block < wide ? kTiles<Weight, NG, true> : kTiles<Weight, NG, false>;
    for (int64_t t = 0, row = 0; t < tiles; ++t) {
      const int64_t rows = (a.rows - row + tiles - t - 1) / (tiles - t);
      body(tiles_of[rows - 1], panel, block < wide ? width : 1, row, rows);
      row += rows;
    }
  }
}

template <class Weight, int NG>
void panels(const PanelGemmArgs<Weight>& a) {
  for_each_tile<NG>(a, [&](auto tile, int64_t panel, int64_t, int64_t row, int64_t) {
    tile(a, panel, row, a.out + panel * a.out_panel + row * a.out_row);
  });
}

template <class Weight>
void panel_gemm(const PanelGemmArgs<Weight>& a) {
  if (a.groups == 4) return panels<Weight, 4>(a);
  if (a.groups == 3) return panels<Weight, 3>(a);
  panels<Weight, 1>(a);
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
