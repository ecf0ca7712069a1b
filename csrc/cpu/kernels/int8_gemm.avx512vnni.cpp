// int8_gemm on vpdpbusd: 64 multiply-adds an instruction, one instruction a cycle.
//
// A tile of 6 rows x 64 channels keeps its 24 accumulators in registers over the whole of K, so no partial sum is ever
// stored. Per group of four k it loads four weight vectors and broadcasts one 32-bit piece of each row: 10 loads for 24
// products. The panel (64 x K bytes) stays in L1/L2 while all row tiles pass over it; meanwhile each tile prefetches
// its share of the next panel, which lies behind this one in memory, and its own lines of a residual and of an output
// that is too large for L2 (a residual costs 128 x 768 x 3072 23% without, 6% with it).
//
// Up to three rows are bound by reading the weights instead. They take two panels at once, as two streams for the
// processor's own prefetcher, which is faster than any prefetch by instruction: 98 of 97 GB/s from a warm L3, where one
// stream reads 94 and one with prefetches 72 to 82.
#include "cpu/kernels/int8_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kMaxRows = 6;
constexpr int kMaxStreamedRows = 3;
constexpr int64_t kPanel = tuning::kInt8PanelChannels;

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

// What a tile prefetches on its way through K, spread evenly.
struct Prefetches {
  const int8_t* weights;  // `weight_lines` cache lines from here, into L2
  int64_t weight_lines;
  int count = 0;  // lines of output and residual, into L1
  const char* lines[2 * kMaxRows * (tuning::kInt8PanelChannels / 16 + 1)];

  // The lines of a block of a matrix.
  LAMINA_INLINE void add(const EpilogueMatrix& m, const Block& b) {
    const int64_t size = m.format;
    for (int r = 0; r < b.rows; ++r) {
      const char* row = static_cast<const char*>(m.data) + ((b.row + r) * m.ld + b.first) * size;
      for (int64_t at = 0; at < b.channels * size; at += 64) lines[count++] = row + at;
    }
  }
};

// MR rows x 16 NR channels over all of K -> sums [MR, 16 NR].
template <int MR, int NR>
__attribute__((noinline)) void tile(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t k_padded, int32_t* sums,
                                    const Prefetches& ahead) {
  __m512i acc[MR][NR];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) acc[i][j] = _mm512_setzero_si512();
  }
  int64_t k = 0;
  const int64_t steps = k_padded / 16;
  const int8_t* weights = ahead.weights;
  const int64_t weights_per_step = steps ? (ahead.weight_lines + steps - 1) / steps : 0;
  const char* const* line = ahead.lines;
  const char* const* const last = line + ahead.count;
  const int64_t lines_per_step = steps ? (ahead.count + steps - 1) / steps : 0;
  for (; k + 16 <= k_padded; k += 16) {
    for (int64_t i = 0; i < weights_per_step; ++i, weights += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(weights), _MM_HINT_T1);
    }
    for (int64_t i = 0; i < lines_per_step && line < last; ++i) __builtin_prefetch(*line++, 1);
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

using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*, const Prefetches&);

template <int NR>
constexpr Tile kTiles[kMaxRows] = {tile<1, NR>, tile<2, NR>, tile<3, NR>, tile<4, NR>, tile<5, NR>, tile<6, NR>};

constexpr const Tile* kTilesByWidth[4] = {kTiles<1>, kTiles<2>, kTiles<3>, kTiles<4>};

// MR rows x two panels over all of K -> sums [2][MR, 64].
template <int MR>
__attribute__((noinline)) void two_panels(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t k_padded,
                                          int32_t* sums) {
  const int8_t* second = w + kPanel * k_padded;
  __m512i acc[2][MR][4];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < 4; ++j) acc[0][i][j] = acc[1][i][j] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < k_padded; k += 4) {
    step<MR, 4>(acc[0], x + k, ldx, w + kPanel * k);
    step<MR, 4>(acc[1], x + k, ldx, second + kPanel * k);
  }
  LAMINA_UNROLL
  for (int p = 0; p < 2; ++p) {
    LAMINA_UNROLL
    for (int i = 0; i < MR; ++i) {
      LAMINA_UNROLL
      for (int j = 0; j < 4; ++j) _mm512_store_si512(sums + ((p * MR + i) * 4 + j) * 16, acc[p][i][j]);
    }
  }
}

using TwoPanels = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);
constexpr TwoPanels kTwoPanels[kMaxStreamedRows] = {two_panels<1>, two_panels<2>, two_panels<3>};

void int8_gemm(const Int8GemmArgs& a) {
  alignas(64) int32_t sums[kMaxRows * kPanel];
  int64_t streamed = 0;  // channels that are done
  if (a.rows <= kMaxStreamedRows) {
    const int rows = int(a.rows);
    for (; streamed + 2 * kPanel <= a.channels; streamed += 2 * kPanel) {
      kTwoPanels[rows - 1](a.codes, a.ld_codes, a.panels + streamed * a.k_padded, a.k_padded, sums);
      finish_tile(a, sums, {0, streamed, rows, kPanel, kPanel});
      finish_tile(a, sums + rows * kPanel, {0, streamed + kPanel, rows, kPanel, kPanel});
    }
  }
  for_each_panel(a, streamed, [&](const int8_t* panel, int64_t first, int channels, int width) {
    const Tile* tiles = kTilesByWidth[width / 16 - 1];
    const int64_t tile_count = (a.rows + kMaxRows - 1) / kMaxRows;
    Prefetches ahead;
    // A single tile is a stream of its own, which the processor prefetches.
    ahead.weight_lines = tile_count == 1 ? 0 : (a.k_padded * width / 64 + tile_count - 1) / tile_count;
    ahead.weights = panel + a.k_padded * width;
    const bool far = a.residual.data || a.rows * a.out.ld * a.out.format > tuning::kInt8FarOutputBytes;
    for_balanced_tiles(a.rows, kMaxRows, [&](int64_t row, int rows) {
      const Block block{row, first, rows, channels, width};
      ahead.count = 0;
      if (far) ahead.add(a.out, block);
      if (a.residual.data) ahead.add(a.residual, block);
      tiles[rows - 1](a.codes + row * a.ld_codes, a.ld_codes, panel, a.k_padded, sums, ahead);
      ahead.weights += 64 * ahead.weight_lines;
      finish_tile(a, sums, block);
    });
  });
}

REGISTER_KERNEL(int8_gemm_table, int8_gemm);

}  // namespace
}  // namespace lamina::LAMINA_ISA
