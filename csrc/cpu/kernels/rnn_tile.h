// The tiles of rnn_step: a tile of sums, and while they are still in the first-level cache the cells they belong to.
//
// The product of one row is bound by reading weights, the cells by arithmetic: in turns, the processor overlaps the end
// of one with the beginning of the other.
//
// With e = e^-x, sigmoid is 1 / (1 + e) and tanh is (1 - e) / (1 + e) (of e^-2x), so a whole LSTM cell is five
// exponentials and two divisions, a GRU cell three and two: terms are brought over one denominator instead of being
// divided one by one. Where gates are kept for a gradient they are divided singly.
#pragma once

#include "cpu/kernels/rnn_step.h"

#include "cpu/kernels/panel_tile.h"
#include "cpu/vec/gates.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kPanel = kPanelLanes;

// Where a register of units lies: its first gate of the input and of the state, and so on; n of its lanes exist.
struct Place {
  const float *x, *s, *before;
  float *c, *h, *saved;
  int n;
};

template <bool kSaves>
LAMINA_INLINE void lstm_cell(const Place& p) {
  const F32 one = set1(1.0f);
  const F32 i = sigmoid_exp(load(p.x) + load(p.s));
  const F32 f = sigmoid_exp(load(p.x + kPanel) + load(p.s + kPanel));
  const F32 g = tanh_exp(load(p.x + 2 * kPanel) + load(p.s + 2 * kPanel));
  const F32 o = sigmoid_exp(load(p.x + 3 * kPanel) + load(p.s + 3 * kPanel));
  // c / (1 + f) + (1 - g) / ((1 + i) (1 + g))
  const F32 forget = one + f, input = (one + i) * (one + g);
  const F32 c = fmadd(load(p.c), input, (one - g) * forget) / (forget * input);
  store(p.c, c);
  const F32 t = tanh_exp(c);
  store_up_to(p.h, (one - t) / ((one + o) * (one + t)), p.n);
  if constexpr (kSaves) {
    store(p.saved, one / (one + i));
    store(p.saved + kPanel, one / forget);
    store(p.saved + 2 * kPanel, (one - g) / (one + g));
    store(p.saved + 3 * kPanel, one / (one + o));
    store(p.saved + 4 * kPanel, c);
  }
}

template <bool kSaves>
LAMINA_INLINE void gru_cell(const Place& p) {
  const F32 one = set1(1.0f);
  const F32 r = sigmoid(load(p.x) + load(p.s));
  const F32 z = sigmoid_exp(load(p.x + kPanel) + load(p.s + kPanel));
  const F32 of_state = load(p.s + 2 * kPanel);
  const F32 n = tanh_exp(fmadd(r, of_state, load(p.x + 2 * kPanel)));
  // With 1 - sigmoid = z / (1 + z): (z (1 - n) + h (1 + n)) / ((1 + z) (1 + n))
  const F32 h = fmadd(load_up_to(p.before, p.n), one + n, z * (one - n)) / ((one + z) * (one + n));
  store_up_to(p.h, h, p.n);
  if constexpr (kSaves) {
    store(p.saved, r);
    store(p.saved + kPanel, one / (one + z));
    store(p.saved + 2 * kPanel, (one - n) / (one + n));
    store(p.saved + 3 * kPanel, of_state);
  }
}

template <RnnCell kCell, bool kSaves>
LAMINA_INLINE void cell(const Place& p) {
  if constexpr (kCell == RnnCell::lstm) return lstm_cell<kSaves>(p);
  if constexpr (kCell == RnnCell::gru) return gru_cell<kSaves>(p);
  const F32 sum = load(p.x) + load(p.s);
  if constexpr (kCell == RnnCell::tanh) {
    const F32 t = tanh_exp(sum);
    store_up_to(p.h, (set1(1.0f) - t) / (set1(1.0f) + t), p.n);
  } else {
    store_up_to(p.h, max(zero(), sum), p.n);  // in this order a NaN stays
  }
}

template <RnnCell kCell, bool kSaves, class Weight>
void step(const RnnStepArgs<Weight>& a) {
  constexpr int kGates = gates_of(kCell), kSaved = saved_of(kCell), kRow = kGates * kPanel;
  alignas(64) float sums[kMaxSums];
  PanelGemmArgs<Weight> product = a.product;
  product.out_row = kRow;
  for_each_tile<kGates>(product, [&](auto tile, int64_t first, int64_t panels, int64_t row, int64_t rows) {
    product.out_panel = rows * kRow;
    tile(product, first, row, sums);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t panel = first + p;
      for (int lane = 0; lane < kPanel && panel * kPanel + lane < a.units; lane += F32::lanes) {
        const int64_t unit = panel * kPanel + lane;
        const int n = int(a.units - unit < F32::lanes ? a.units - unit : F32::lanes);
        for (int64_t r = 0; r < rows; ++r) {
          cell<kCell, kSaves>({
              .x = a.x_gates + panel * a.x_panel + (row + r) * a.x_row + lane,
              .s = sums + (p * rows + r) * kRow + lane,
              .before = kCell == RnnCell::gru ? a.h_before + (row + r) * a.ld_before + unit : nullptr,
              .c = kCell == RnnCell::lstm ? a.c + (row + r) * a.ldc + unit : nullptr,
              .h = a.h + (row + r) * a.ldh + unit,
              .saved = kSaves ? a.saved + panel * a.saved_panel + (row + r) * kSaved * kPanel + lane : nullptr,
              .n = n,
          });
        }
      }
    }
  });
}

template <class Weight>
void rnn_step(const RnnStepArgs<Weight>& a) {
  switch (a.cell) {
    case RnnCell::lstm: return a.saved ? step<RnnCell::lstm, true>(a) : step<RnnCell::lstm, false>(a);
    case RnnCell::gru: return a.saved ? step<RnnCell::gru, true>(a) : step<RnnCell::gru, false>(a);
    case RnnCell::tanh: return step<RnnCell::tanh, false>(a);
    case RnnCell::relu: return step<RnnCell::relu, false>(a);
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
