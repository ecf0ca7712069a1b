// int8_gemm on vpdpbusd: 64 multiply-adds an instruction, one instruction a cycle.
//
// A tile of 6 rows x 64 channels keeps its 24 accumulators in registers over the whole of K, so no partial sum is ever
// stored. Per group of four k it loads four weight vectors and broadcasts one 32-bit piece of each row: 10 loads for 24
// products. The panel (64 x K bytes) stays in L1/L2 while all row tiles pass over it; meanwhile each tile prefetches
// its share of the next panel, which lies behind this one in memory, and its own lines of a residual and of an output
// that is too large for L2 (a residual costs 128 x 768 x 3072 23% without, 6% with it).
//
// Outputs are finished one tile late: while a tile multiplies, the sums of the one before become outputs, a vector
// every 16 k. The epilogue then takes the arithmetic units that vpdpbusd leaves free, instead of making it wait: 2% of
// 128 x 768 x 768, 5% with GELU. Tiles at the right edge, residuals and outputs other than float32 are finished at
// once.
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

// A tile of a whole panel whose sums are not outputs yet.
struct Pending {
  const int32_t* sums;  // of the vectors that are left
  int vectors = 0;      // how many those are, of four a row
  int64_t row, first;
  const GateTable* gate;
};

// What is applied to a pending tile; the gates differ in their table only.
enum class Late { none, relu, gate };

alignas(64) constexpr float kNoBias[kPanel] = {};

// The next vector of a pending tile. It shares the registers with 24 accumulators, and so takes everything it can from
// memory.
template <Late L>
LAMINA_INLINE void finish_vector(const Int8GemmArgs& a, Pending& p) {
  const int c = 16 * (-p.vectors & 3);
  float* out = static_cast<float*>(a.out.data) + p.row * a.out.ld + p.first;
  const float* bias = a.bias ? a.bias + p.first : kNoBias;
  const I32 sum = load_i32(p.sums) - load_i32(a.compensation + p.first + c);
  F32 y = to_float(sum) * load(a.w_scales + p.first + c) * set1(a.x_scales[p.row]) + load(bias + c);
  if constexpr (L == Late::relu) y = activate<Activation::relu>(y);
  if constexpr (L == Late::gate) {
    const GateTable* gate = p.gate;
    asm("" : "+r"(gate));  // or it would be loaded before the loop, into registers that the loop needs
    y = gated(y, *gate);
  }
  store(out + c, y);
  p.sums += 16;
  p.row += c == 48;
  --p.vectors;
}

// What a tile prefetches on its way through K: every 16 k some lines of weights into L2, and a row of its output and of
// its residual into L1.
struct Prefetches {
  const int8_t* weights;
  int64_t weight_lines;
  int rows;
  const char *out, *residual;
  int64_t out_stride, residual_stride;
  int64_t out_bytes, residual_bytes;
};

LAMINA_INLINE void prefetch(Prefetches& p) {
  const int8_t* line = p.weights;
  for (int64_t i = p.weight_lines; i > 0; --i, line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
  }
  p.weights = line;
  if (p.rows == 0) return;
  for (int64_t i = 0; i < p.out_bytes; i += 64) __builtin_prefetch(p.out + i, 1);
  for (int64_t i = 0; i < p.residual_bytes; i += 64) __builtin_prefetch(p.residual + i);
  p.out += p.out_stride;
  p.residual += p.residual_stride;
  --p.rows;
}

// GCC would keep constants of the late epilogue in registers and accumulators on the stack.
#ifndef __clang__
#pragma GCC push_options
#pragma GCC optimize("no-move-loop-invariants", "no-gcse")
#endif

// MR rows x 16 NR channels over all of K -> sums [MR, 16 NR]; meanwhile `before` is finished.
template <int MR, int NR, Late L>
__attribute__((noinline)) void tile(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t k_padded, int32_t* sums,
                                    const Int8GemmArgs& a, Pending& before, Prefetches& ahead) {
  __m512i acc[MR][NR];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) acc[i][j] = _mm512_setzero_si512();
  }
  int64_t k = k_padded;
  for (; k >= 16; k -= 16) {
    if (before.vectors) finish_vector<L>(a, before);
    LAMINA_UNROLL
    for (int u = 0; u < 4; ++u) step<MR, NR>(acc, x + 4 * u, ldx, w + 64 * NR * u);
    x += 16;
    w += 256 * NR;
    prefetch(ahead);
  }
  while (before.vectors) finish_vector<L>(a, before);
  for (; k > 0; k -= 4) {
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

#ifndef __clang__
#pragma GCC pop_options
#endif

using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*, const Int8GemmArgs&, Pending&,
                      Prefetches&);

template <int NR, Late L>
constexpr Tile kTiles[kMaxRows] = {tile<1, NR, L>, tile<2, NR, L>, tile<3, NR, L>,
                                   tile<4, NR, L>, tile<5, NR, L>, tile<6, NR, L>};

constexpr const Tile* kTilesByWidth[4] = {kTiles<1, Late::none>, kTiles<2, Late::none>, kTiles<3, Late::none>,
                                          kTiles<4, Late::none>};
constexpr const Tile* kTilesByLate[3] = {kTiles<4, Late::none>, kTiles<4, Late::relu>, kTiles<4, Late::gate>};

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

// The lines of a tile's residual, and of its output.
LAMINA_INLINE void prefetch_block(const Int8GemmArgs& a, const Block& b, Prefetches& p) {
  p.rows = b.rows;
  p.out = static_cast<const char*>(a.out.data) + (b.row * a.out.ld + b.first) * a.out.format;
  p.out_stride = a.out.ld * a.out.format;
  p.out_bytes = b.channels * a.out.format;
  p.residual_bytes = 0;
  if (!a.residual.data) return;
  p.residual = static_cast<const char*>(a.residual.data) + (b.row * a.residual.ld + b.first) * a.residual.format;
  p.residual_stride = a.residual.ld * a.residual.format;
  p.residual_bytes = b.channels * a.residual.format;
}

void int8_gemm(const Int8GemmArgs& a) {
  alignas(64) int32_t buffers[2][kMaxRows * kPanel];
  int64_t streamed = 0;  // channels that are done
  if (a.rows <= kMaxStreamedRows) {
    const int rows = int(a.rows);
    int32_t* sums = buffers[0];
    for (; streamed + 2 * kPanel <= a.channels; streamed += 2 * kPanel) {
      kTwoPanels[rows - 1](a.codes, a.ld_codes, a.panels + streamed * a.k_padded, a.k_padded, sums);
      finish_tile(a, sums, {0, streamed, rows, kPanel, kPanel});
      finish_tile(a, sums + rows * kPanel, {0, streamed + kPanel, rows, kPanel, kPanel});
    }
  }
  const GateTable* gate = gate_table(a.activation);
  const bool late = a.out.format == EpilogueMatrix::f32 && !a.residual.data &&
                    (gate || a.activation == Activation::none || a.activation == Activation::relu);
  const Tile* late_tiles = kTilesByLate[int(gate                               ? Late::gate
                                            : a.activation == Activation::relu ? Late::relu
                                                                               : Late::none)];
  const bool far = a.residual.data || a.rows * a.out.ld * a.out.format > tuning::kInt8FarOutputBytes;
  int buffer = 0;
  Pending before{};
  const auto finish_before = [&] {
    if (before.vectors) finish_tile(a, before.sums, {before.row, before.first, before.vectors / 4, kPanel, kPanel});
    before.vectors = 0;
  };
  for_each_panel(a, streamed, [&](const int8_t* panel, int64_t first, int channels, int width) {
    const bool late_here = late && channels == kPanel;
    if (!late_here) finish_before();
    const Tile* tiles = late_here ? late_tiles : kTilesByWidth[width / 16 - 1];
    const int64_t tile_count = (a.rows + kMaxRows - 1) / kMaxRows;
    Prefetches ahead{};
    ahead.weights = panel + a.k_padded * width;
    // A single tile is a stream of its own, which the processor prefetches.
    ahead.weight_lines = tile_count == 1 ? 0 : (width / 4 + tile_count - 1) / tile_count;
    for_balanced_tiles(a.rows, kMaxRows, [&](int64_t row, int rows) {
      const Block block{row, first, rows, channels, width};
      if (far) prefetch_block(a, block, ahead);
      int32_t* sums = buffers[buffer];
      tiles[rows - 1](a.codes + row * a.ld_codes, a.ld_codes, panel, a.k_padded, sums, a, before, ahead);
      if (!late_here) return finish_tile(a, sums, block);
      before = {.sums = sums, .vectors = 4 * rows, .row = row, .first = first, .gate = gate};
      buffer ^= 1;
    });
  });
  finish_before();
}

REGISTER_KERNEL(int8_gemm_table, int8_gemm);

}  // namespace
}  // namespace lamina::LAMINA_ISA
