// int8_gemm on vpdpbusd: 64 multiply-adds an instruction, one instruction a cycle.
//
// A tile of 6 rows x 64 channels keeps its 24 accumulators in registers over the whole of K, so no partial sum is ever
// stored. Per group of four k it loads four weight vectors and broadcasts one 32-bit piece of each row: 10 loads for 24
// products. The panel (64 x K bytes) stays in L1/L2 while all row tiles pass over it; meanwhile each tile prefetches
// its share of the next panel, which lies behind this one in memory.
#include "cpu/kernels/int8_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kMaxRows = 6;
// A single row tile cannot prefetch a whole panel ahead; it runs this many bytes ahead of itself instead.
constexpr int64_t kStreamAhead = 8192;

// acc += a (unsigned bytes) . b (signed bytes), four at a time. Inline assembly, since GCC 12 spills the accumulators
// of a large tile when they pass through the intrinsic.
LAMINA_INLINE void dot4(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

template <int MR, int NR>
LAMINA_INLINE void step(__m512i (&acc)[MR][NR], const uint8_t* x, int64_t ldx, const int8_t* w) {
  __m512i b[NR];
  LAMINA_UNROLL
  for (int j = 0; j < NR; ++j) b[j] = _mm512_loadu_si512(w + 64 * j);
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    int32_t four;
    memcpy(&four, x + i * ldx, 4);
    const __m512i a = _mm512_set1_epi32(four);
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) dot4(acc[i][j], a, b[j]);
  }
}

// MR rows x 16 NR channels over all of K -> sums [MR, 16 NR]; touches `lines` cache lines from `ahead` on the way.
template <int MR, int NR>
__attribute__((noinline)) void tile(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t k_padded, int32_t* sums,
                                    const int8_t* ahead, int64_t lines) {
  __m512i acc[MR][NR];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) acc[i][j] = _mm512_setzero_si512();
  }
  int64_t k = 0;
  const int64_t per_step = k_padded ? (16 * lines + k_padded - 1) / k_padded : 0;
  for (; k + 16 <= k_padded; k += 16) {
    for (int64_t line = 0; line < per_step; ++line, ahead += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    }
    LAMINA_UNROLL
    for (int u = 0; u < 4; ++u) step<MR, NR>(acc, x + 4 * u, ldx, w + 64 * NR * u);
    x += 16;
    w += 256 * NR;
  }
  for (; k < k_padded; k += 4) {
    step<MR, NR>(acc, x, ldx, w);
    x += 4;
    w += 64 * NR;
  }
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) _mm512_store_si512(sums + (i * NR + j) * 16, acc[i][j]);
  }
}

using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*, const int8_t*, int64_t);

template <int NR>
constexpr Tile kTiles[kMaxRows] = {tile<1, NR>, tile<2, NR>, tile<3, NR>, tile<4, NR>, tile<5, NR>, tile<6, NR>};

constexpr const Tile* kTilesByWidth[4] = {kTiles<1>, kTiles<2>, kTiles<3>, kTiles<4>};

void int8_gemm(const Int8GemmArgs& a) {
  alignas(64) int32_t sums[kMaxRows * tuning::kInt8PanelChannels];
  const Tile* tiles = kTilesByWidth[a.width / 16 - 1];
  const int64_t panel_lines = a.k_padded * a.width / 64;
  const int64_t tile_count = (a.rows + kMaxRows - 1) / kMaxRows;
  const int64_t lines = (panel_lines + tile_count - 1) / tile_count;
  const int8_t* ahead = a.panel + (tile_count == 1 ? kStreamAhead : a.k_padded * a.width);
  for_balanced_tiles(a.rows, kMaxRows, [&](int64_t row, int rows) {
    tiles[rows - 1](a.codes + row * a.ld_codes, a.ld_codes, a.panel, a.k_padded, sums, ahead, lines);
    ahead += 64 * lines;
    finish_tile(a, sums, row, rows);
  });
}

REGISTER_KERNEL(int8_gemm_table, int8_gemm);

}  // namespace
}  // namespace lamina::LAMINA_ISA
