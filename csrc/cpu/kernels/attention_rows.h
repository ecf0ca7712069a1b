// What the attention kernels know of a block of query rows before they see a key: where each row lies, and which keys
// it takes.
#pragma once

#include "cpu/kernels/attention.h"
#include "cpu/vec/math.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
constexpr int kRowVectors = 4;
constexpr int kRows = kRowVectors * kLanes;  // query rows of a block
static_assert(kRows <= tuning::kAttentionTaskRows);

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 3.402823466e38f;
// Below every score that is not -inf; the maximum of a row that has seen no key.
constexpr float kLowest = -3.4e38f;

LAMINA_INLINE int smaller(int a, int b) { return a < b ? a : b; }
LAMINA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LAMINA_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
LAMINA_INLINE int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

LAMINA_INLINE float to_float(float x) { return x; }
LAMINA_INLINE float to_float(bf16 x) { return bf16_to_float(x); }
LAMINA_INLINE float to_float(f16 x) { return f16_to_float(x); }

// n <= lanes elements of a row, `stride` apart; zero behind them.
template <class T>
LAMINA_INLINE F32 row_elements(const T* p, int64_t stride, int n) {
  if (stride == 1) return load_up_to(p, n);
  float t[kLanes] = {0};
  for (int i = 0; i < n; ++i) t[i] = to_float(p[i * stride]);
  return load(t);
}

struct KeyRange {
  int64_t begin, end;
};

// The keys that a row takes, masks aside; an empty range is {keys, 0}, which widens no union.
LAMINA_INLINE KeyRange keys_of_position(const AttentionArgs& a, int64_t position) {
  const int64_t begin = larger(0, position - a.window_left);
  const int64_t end = smaller(a.keys, position + a.window_right + 1);
  return begin < end ? KeyRange{begin, end} : KeyRange{a.keys, 0};
}

// Rows [first_row, first_row + rows) of a task. Lanes behind the last row behave like it; nothing reads what they give.
struct RowBlock {
  RowBlock(const AttentionArgs& a, int64_t first_row, int rows)
      : first_row(first_row), rows(rows), vectors((rows + kLanes - 1) / kLanes), all{a.keys, 0}, shared{0, a.keys} {
    int64_t head = first_row / a.queries, query = first_row % a.queries;
    for (int r = 0; r < rows; ++r) {
      q_offset[r] = head * a.q_head + query * a.q_row;
      out_offset[r] = head * a.out_head + query * a.out_row;
      mask_offset[r] = head * a.mask_head + query * a.mask_row;
      same_mask = same_mask && mask_offset[r] == mask_offset[0];
      position[r] = query + a.shift;
      head_of[r] = head;
      taken[r] = keys_of_position(a, position[r]);
      if (++query == a.queries) {
        query = 0;
        ++head;
      }
    }
    for (int r = rows; r < vectors * kLanes; ++r) {
      position[r] = position[rows - 1];
      head_of[r] = head_of[rows - 1];
      taken[r] = taken[rows - 1];
    }
    for (int v = 0; v < vectors; ++v) {
      any_of[v] = all_of[v] = taken[v * kLanes];
      for (int i = 1; i < kLanes; ++i) {
        const KeyRange t = taken[v * kLanes + i];
        any_of[v] = {smaller(any_of[v].begin, t.begin), larger(any_of[v].end, t.end)};
        all_of[v] = {larger(all_of[v].begin, t.begin), smaller(all_of[v].end, t.end)};
      }
      all = {smaller(all.begin, any_of[v].begin), larger(all.end, any_of[v].end)};
      shared = {larger(shared.begin, all_of[v].begin), smaller(shared.end, all_of[v].end)};
    }
  }

  // The union of what rows [row, row + count) take.
  KeyRange taken_by(int row, int count) const {
    KeyRange range = taken[row];
    for (int r = row + 1; r < row + count; ++r) {
      range = {smaller(range.begin, taken[r].begin), larger(range.end, taken[r].end)};
    }
    return range;
  }

  // Whether every row of the vectors [v, v + count) takes the keys [begin, end).
  bool take_all(int v, int count, int64_t begin, int64_t end) const {
    for (int i = v; i < v + count; ++i) {
      if (begin < all_of[i].begin || end > all_of[i].end) return false;
    }
    return true;
  }

  const int64_t first_row;
  const int rows, vectors;
  KeyRange all;           // keys that any row takes
  KeyRange shared;        // keys that every row takes
  bool same_mask = true;  // whether all rows have one mask row
  int64_t q_offset[kRows], out_offset[kRows], mask_offset[kRows], position[kRows], head_of[kRows];
  KeyRange taken[kRows];
  KeyRange any_of[kRowVectors], all_of[kRowVectors];  // keys that any row and that every row of a vector takes
};

}  // namespace
}  // namespace lamina::LAMINA_ISA
