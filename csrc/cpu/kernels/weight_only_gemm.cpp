// weight_only_gemm on the vector vocabulary: a piece of the panel becomes floats in L1, and all rows multiply by it.
//
// A prepared row is the row as float32. Per piece of 64 inputs the 64 channels take 16 KiB: turned to floats once, they
// serve every row. Sums wait in a buffer between pieces. Each sum takes its products in the order of k, whatever the
// tile, so a row's result does not depend on the rows beside it.
#include "cpu/kernels/weight_only_gemm.h"

#include "cpu/kernels/weight_only_tile.h"
#include "cpu/tuning/weight_only_gemm.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
constexpr int kPanel = tuning::kInt8PanelChannels;
constexpr int kPiece = tuning::kWeightOnlyPiece;
constexpr int kMaxRows = 6;
// Rows whose sums are held at once: 16 KiB, half of a small L1.
constexpr int64_t kRowBlock = 64;

template <class T>
void weight_only_rows(const WeightOnlyRowsArgs<T>& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = a.x + row * a.ldx;
    float* to = reinterpret_cast<float*>(a.prepared + row * weight_only_row_bytes(a.k));
    for (int64_t i = 0; i < a.k; i += kLanes) {
      const int n = a.k - i < kLanes ? int(a.k - i) : kLanes;
      store_up_to(to + i, load_up_to(x + i, n), n);
    }
  }
}

// Inputs [k, k + count) of all channels as floats [count, 64]. `count` may run over a.k to the layout's padding.
template <class Out>
void widen_int8(const WeightOnlyGemmArgs<Out>& a, int64_t k, int count, float* to) {
  for (int i = 0; i < count; i += 4, to += 4 * kPanel) {
    const int32_t* codes = reinterpret_cast<const int32_t*>(a.panel + (k + i) * a.width);
    for (int c = 0; c < a.width; c += kLanes) {
      const I32 four = load_i32(codes + c);
      store(to + c, to_float(shift_right(shift_left(four, 24), 24)));
      store(to + kPanel + c, to_float(shift_right(shift_left(four, 16), 24)));
      store(to + 2 * kPanel + c, to_float(shift_right(shift_left(four, 8), 24)));
      store(to + 3 * kPanel + c, to_float(shift_right(four, 24)));
    }
  }
}

template <class Out>
void widen_int4(const WeightOnlyGemmArgs<Out>& a, int64_t k, int count, float* to) {
  const int64_t blocks = (a.k + kInt4Block - 1) / kInt4Block, group_blocks = a.group / kInt4Block;
  const int64_t groups = (blocks + group_blocks - 1) / group_blocks;
  const int64_t slice_bytes = groups * kInt4ScaleBytes + blocks * kInt4BlockBytes;
  for (int s = 0; s < a.width; s += kInt4Slice) {
    const uint8_t* slice = a.panel + s / kInt4Slice * slice_bytes;
    for (int i = 0; i < count; i += kInt4Block) {
      const int64_t block = (k + i) / kInt4Block, group = block / group_blocks;
      const uint8_t* scales = slice + group * (kInt4ScaleBytes + group_blocks * kInt4BlockBytes);
      const uint8_t* codes = scales + kInt4ScaleBytes + (block - group * group_blocks) * kInt4BlockBytes;
      for (int c = 0; c < kInt4Slice; c += kLanes) {
        const F32 scale = load(reinterpret_cast<const bf16*>(scales) + c);
        const F32 offset = set1(-8.0f) * scale;
        for (int j = 0; j < 4; ++j) {
          const I32 eight = load_i32(reinterpret_cast<const int32_t*>(codes) + j * kInt4Slice + c);
          float* rows = to + (i + 8 * j) * kPanel + s + c;
          LAMINA_UNROLL
          for (int b = 0; b < 8; ++b) {
            const I32 code = shift_right(eight, 8 * (b % 4) + 4 * (b / 4)) & set1_i32(15);
            store(rows + b * kPanel, fmadd(to_float(code), scale, offset));
          }
        }
      }
    }
  }
}

// sums [MR, NV registers] += x [MR, count] w [count, NV registers].
template <int MR, int NV>
void tile(const float* x, int64_t ldx, const float* w, int count, float* sums) {
  F32 acc[MR][NV];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = load(sums + i * kPanel + j * kLanes);
  }
  for (int k = 0; k < count; ++k, w += kPanel) {
    F32 b[NV];
    LAMINA_UNROLL
    for (int j = 0; j < NV; ++j) b[j] = load(w + j * kLanes);
    LAMINA_UNROLL
    for (int i = 0; i < MR; ++i) {
      const F32 v = set1(x[i * ldx + k]);
      LAMINA_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] = fmadd(v, b[j], acc[i][j]);
    }
  }
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < NV; ++j) store(sums + i * kPanel + j * kLanes, acc[i][j]);
  }
}

using Tile = void (*)(const float*, int64_t, const float*, int, float*);

// With 16 registers, six rows leave room for two vectors of each; with 32 for the whole panel at 16 lanes.
constexpr int kTileVectors = F32::registers >= 32 ? 4 : 2;
constexpr Tile kTiles[kMaxRows] = {tile<1, kTileVectors>, tile<2, kTileVectors>, tile<3, kTileVectors>,
                                   tile<4, kTileVectors>, tile<5, kTileVectors>, tile<6, kTileVectors>};
// One row has no other rows to hide the latency of its sums behind: as many vectors as there are.
constexpr int kRowVectors = kPanel / kLanes < 8 ? kPanel / kLanes : 8;

template <class Out>
void weight_only_gemm(const WeightOnlyGemmArgs<Out>& a) {
  float weights[kPiece * kPanel], sums[kRowBlock * kPanel];
  // A narrow panel leaves columns that the tiles multiply all the same.
  if (a.width < kPanel) memset(weights, 0, sizeof weights);
  const int64_t row_bytes = weight_only_row_bytes(a.k);
  for (int64_t first = 0; first < a.rows; first += kRowBlock) {
    const int rows = int(a.rows - first < kRowBlock ? a.rows - first : kRowBlock);
    for (int i = 0; i < rows * kPanel; ++i) sums[i] = 0.0f;
    for (int64_t k = 0; k < a.k; k += kPiece) {
      const int count = int(a.k - k < kPiece ? a.k - k : kPiece);
      a.group ? widen_int4(a, k, count, weights) : widen_int8(a, k, count, weights);
      for_balanced_tiles(rows, kMaxRows, [&](int64_t row, int m) {
        const char* x = a.prepared + (first + row) * row_bytes + 4 * k;
        const int vectors = rows == 1 ? kRowVectors : kTileVectors;
        for (int c = 0; c < a.width; c += vectors * kLanes) {
          const Tile run = rows == 1 ? tile<1, kRowVectors> : kTiles[m - 1];
          run(reinterpret_cast<const float*>(x), row_bytes / 4, weights + c, count, sums + row * kPanel + c);
        }
      });
    }
    if (!a.group) {
      for (int row = 0; row < rows; ++row) {
        for (int c = 0; c < a.channels; ++c) sums[row * kPanel + c] *= a.w_scales[c];
      }
    }
    finish_values(a, sums, first, rows);
  }
}

REGISTER_KERNEL(weight_only_rows_f32_table, weight_only_rows<float>);
REGISTER_KERNEL(weight_only_rows_bf16_table, weight_only_rows<bf16>);
REGISTER_KERNEL(weight_only_gemm_f32_table, weight_only_gemm<float>);
REGISTER_KERNEL(weight_only_gemm_bf16_table, weight_only_gemm<bf16>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
