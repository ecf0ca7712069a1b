// panel_gemm on the vector vocabulary: a tile of rows x one panel in registers over the whole of k.
//
// With 32 registers of 16 lanes a tile is 6 rows x 4 groups or 7 x 3 (24 and 21 accumulators); one row alone is bound
// by reading the weights, not by arithmetic. Narrower registers cut the 16 lanes of a group into slices: several slices
// at once for one row (each weight line is read once), one slice for a tile of rows.
#include "cpu/kernels/panel_gemm.h"

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kSlices = kPanelLanes / F32::lanes;
constexpr int kMaxRows = 7;

// Rows of the tallest tile: accumulators, the weights of one k, and a broadcast of x must fit the registers.
constexpr int tile_rows(int groups) { return F32::registers >= 32 ? (groups == 4 ? 6 : 7) : (groups == 4 ? 3 : 4); }

// MR rows x (S of kSlices slices of each of NG groups), from slice `first` on.
template <int MR, int NG, int S>
LAMINA_INLINE void slices(const PanelGemmArgs& a, const float* x, const float* w, const float* bias, float* out,
                          int first) {
  F32 acc[MR][NG][S];
  LAMINA_UNROLL
  for (int g = 0; g < NG; ++g) {
    LAMINA_UNROLL
    for (int s = 0; s < S; ++s) {
      const F32 start = bias ? load(bias + g * kPanelLanes + (first + s) * F32::lanes) : zero();
      LAMINA_UNROLL
      for (int r = 0; r < MR; ++r) acc[r][g][s] = start;
    }
  }
  w += first * F32::lanes;
  for (int64_t k = 0; k < a.k; ++k, w += NG * kPanelLanes) {
    F32 column[NG][S];
    LAMINA_UNROLL
    for (int g = 0; g < NG; ++g) {
      LAMINA_UNROLL
      for (int s = 0; s < S; ++s) column[g][s] = load(w + g * kPanelLanes + s * F32::lanes);
    }
    LAMINA_UNROLL
    for (int r = 0; r < MR; ++r) {
      const F32 value = set1(x[r * a.ldx + k]);
      LAMINA_UNROLL
      for (int g = 0; g < NG; ++g) {
        LAMINA_UNROLL
        for (int s = 0; s < S; ++s) acc[r][g][s] = fmadd(value, column[g][s], acc[r][g][s]);
      }
    }
  }
  LAMINA_UNROLL
  for (int r = 0; r < MR; ++r) {
    LAMINA_UNROLL
    for (int g = 0; g < NG; ++g) {
      LAMINA_UNROLL
      for (int s = 0; s < S; ++s) {
        store(out + r * a.out_row + g * kPanelLanes + (first + s) * F32::lanes, acc[r][g][s]);
      }
    }
  }
}

template <int MR, int NG>
void tile(const PanelGemmArgs& a, const float* x, const float* w, const float* bias, float* out) {
  constexpr int together = MR == 1 && kSlices > 1 ? 2 : 1;
  for (int first = 0; first < kSlices; first += together) slices<MR, NG, together>(a, x, w, bias, out, first);
}

using Tile = void (*)(const PanelGemmArgs&, const float*, const float*, const float*, float*);

// Null where a tile would not fit the registers: it is never asked for.
template <int MR, int NG>
constexpr Tile tile_if_it_fits() {
  if constexpr (MR <= tile_rows(NG)) {
    return tile<MR, NG>;
  } else {
    return nullptr;
  }
}

template <int NG>
constexpr Tile kTiles[kMaxRows] = {tile_if_it_fits<1, NG>(), tile_if_it_fits<2, NG>(), tile_if_it_fits<3, NG>(),
                                   tile_if_it_fits<4, NG>(), tile_if_it_fits<5, NG>(), tile_if_it_fits<6, NG>(),
                                   tile_if_it_fits<7, NG>()};

template <int NG>
void panels(const PanelGemmArgs& a) {
  const int64_t tiles = (a.rows + tile_rows(NG) - 1) / tile_rows(NG);
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t p = a.backwards ? a.count - 1 - i : i;
    const float* w = a.panels + p * a.k * NG * kPanelLanes;
    const float* bias = a.bias ? a.bias + p * NG * kPanelLanes : nullptr;
    float* out = a.out + p * a.out_panel;
    // Tiles of nearly equal height: 8 rows as 4 + 4, not as 6 + 2.
    for (int64_t t = 0, row = 0; t < tiles; ++t) {
      const int64_t rows = (a.rows - row + tiles - t - 1) / (tiles - t);
      kTiles<NG>[rows - 1](a, a.x + row* a.ldx, w, bias, out + row* a.out_row);
      row += rows;
    }
  }
}

void panel_gemm(const PanelGemmArgs& a) { a.groups == 4 ? panels<4>(a) : panels<3>(a); }

REGISTER_KERNEL(panel_gemm_table, panel_gemm);

}  // namespace
}  // namespace lamina::LAMINA_ISA
