// Contract of sparse_int8: rows of unsigned codes times a block-sparse int8 weight, with the epilogue of int8_gemm.
//
// A block is `height` output channels (1, 2 or 4) x four neighbouring inputs; only blocks with a nonzero weight are
// there. Channels come in units of 16, each of 16 / height rows of blocks. Inputs are cut into spans of so many groups
// of four that the codes of a span fit the first-level cache; what is stored lies span by span, unit by unit, row of
// blocks by row of blocks:
//
//   starts   [spans][units + 1]            the first block of each unit, and behind the last
//   counts   [spans][units][16 / height]   blocks of each row of blocks
//   groups   [blocks]                      which group of four inputs: k / 4
//   weights  [blocks][height][4]
//
// The sums, and with them the outputs, are those of int8_gemm with the dense weight: exact, in any order.
#pragma once

#include <stdint.h>

#include "cpu/kernels/int8_gemm.h"

namespace lamina {

struct SparseInt8Weight {
  int height;
  int64_t spans, units;
  const int64_t* starts;
  const uint16_t* counts;
  const uint16_t* groups;
  const int8_t* weights;
};

// Tokens of a panel: codes of that many rows as [k / 4][tokens][4].
inline constexpr int kSparsePanel = 32;
inline constexpr int kSparseUnit = 16;

struct SparseInt8Args {
  SparseInt8Weight weight;
  int64_t unit_begin, unit_end;
  const int32_t* panel;  // [k / 4][width] groups of four codes; width is 16 or 32
  int width;
  int32_t* sums;  // room for [units of a chunk][16][width]
  // rows (at most width), x_scales, and from the first channel of unit_begin on: channels, compensation, w_scales,
  // bias, residual, activation, out, out_inverse.
  Int8GemmArgs epilogue;
};

// Sums are kept for so many units at a time.
inline constexpr int kSparseChunkUnits = 8;

struct SparseInt8RowsArgs {
  SparseInt8Weight weight;
  int64_t unit_begin, unit_end;
  Int8GemmArgs epilogue;  // the same, and codes with ld_codes; rows is at most kSparseFewRows
};

// Rows up to which each is multiplied by itself: the lanes hold channels and blocks instead of tokens.
inline constexpr int kSparseFewRows = 4;

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

}  // namespace lamina
