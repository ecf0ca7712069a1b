// Contract of sparse_int8: rows of unsigned codes times a block-sparse int8 weight, with the epilogue of int8_gemm.
//
// A block is `height` output channels (1, 2 or 4) x four neighbouring inputs; only blocks with a nonzero weight are
// there, as ops/sparse_format.h packs them: in slabs of 16 channels, and in spans of inputs so long that the codes of a
// span stay in the first-level cache. The blocks of a group of channels are filled up to a multiple of
// sparse_int8_step with blocks of zeros.
//
// The sums, and with them the outputs, are those of int8_gemm with the dense weight: exact, in any order.
#pragma once

#include <stdint.h>

#include "cpu/kernels/int8_gemm.h"
#include "cpu/kernels/sparse_group.h"
#include "cpu/kernels/token_panels.h"

namespace lamina {

constexpr int sparse_int8_step(int height) { return height == 1 ? 4 : 2; }

// A packed weight; see SparseForm in ops/sparse_format.h.
struct SparseInt8Weight {
  int height;
  int64_t spans, slabs, span_groups;  // groups of four inputs of a span
  const uint32_t *chunk_first, *group_first;
  const SparseGroup* groups;
  const uint16_t* index;
  const int8_t* values;
};

// Channels of a slab.
inline constexpr int kSparseInt8Slab = 16;

struct SparseInt8Args {
  SparseInt8Weight weight;
  int64_t slab_begin, slab_end;
  const int32_t* panel;  // [k / 4][width] groups of four codes; width is kPanelTokens or half of it
  int width;
  int32_t* sums;  // room for [kSparseHeldSlabs][16][width]
  // rows (at most width), x_scales, and from the first channel of slab_begin on: channels, compensation, w_scales,
  // bias, residual, activation, out, out_inverse.
  Int8GemmArgs epilogue;
};

// Sums are kept for so many slabs at a time where there are several spans.
inline constexpr int kSparseHeldSlabs = 8;

struct SparseInt8RowsArgs {
  SparseInt8Weight weight;
  int64_t slab_begin, slab_end;
  Int8GemmArgs epilogue;  // the same, and codes with ld_codes; rows is at most kSparseFewRows
};

// Rows up to which each is multiplied by itself: the lanes hold channels and blocks instead of tokens. A panel of 16
// tokens takes as long as that for the heights 1, 2 and 4.
constexpr int sparse_few_rows(int height) { return height == 4 ? 3 : height; }
inline constexpr int kSparseFewRows = 3;

// The product whose outputs stay a panel: see token_panels.h. Pointers to channels begin at the first of slab_begin.
struct SparseInt8ToPanelArgs {
  SparseInt8Weight weight;
  int64_t slab_begin, slab_end;
  const int32_t* panel;   // [k / 4][32]
  int32_t* sums;          // room for [kSparseHeldSlabs][16][32]
  const float* x_scales;  // [32]
  int64_t channels;
  const int32_t* compensation;  // rounded up to 16
  const float* w_scales;
  const float* bias;      // or null
  const float* residual;  // [channels][32] or null
  Activation activation;
  float* out;        // [channels][32]
  int32_t* largest;  // [32]: raised to the bits of each token's max |out|
};

struct SparsePanelArgs {
  const uint8_t* codes;  // [rows, 4 groups], row stride ld
  int64_t ld;
  int64_t rows, groups;
  int32_t* panel;  // [groups][width]; what lies behind the rows is zero
  int width;
};

extern const KernelTable<void(const SparsePanelArgs&)> sparse_int8_panel_table;
extern const KernelTable<void(const SparseInt8Args&)> sparse_int8_table;
extern const KernelTable<void(const SparseInt8RowsArgs&)> sparse_int8_rows_table;
extern const KernelTable<void(const SparseInt8ToPanelArgs&)> sparse_int8_to_panel_table;

}  // namespace lamina
