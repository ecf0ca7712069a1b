// Rows cut into tiles of nearly equal height.
#pragma once

#include <stdint.h>

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

// Calls tile(row, count) over [0, rows) with counts that differ by at most one: 8 rows as 4 + 4, not as 6 + 2.
template <class Tile>
LAMINA_INLINE void for_balanced_tiles(int64_t rows, int most, const Tile& tile) {
  const int64_t tiles = (rows + most - 1) / most;
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int count = int((rows - row + tiles - t - 1) / (tiles - t));
    tile(row, count);
    row += count;
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
