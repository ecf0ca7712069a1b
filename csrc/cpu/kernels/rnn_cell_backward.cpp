// rnn_cell_backward on the vector vocabulary, one register of units at a time: a few products each, bound by memory.
#include "cpu/kernels/rnn_cell_backward.h"

#include "cpu/vec/gates.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kPanel = kPanelLanes;

template <RnnCell kCell>
void backward(const RnnCellBackwardArgs& a) {
  constexpr int kGates = gates_of(kCell), kSaved = saved_of(kCell);
  const F32 one = set1(1.0f);
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t unit = 0; unit < a.units; unit += F32::lanes) {
      const int64_t panel = unit / kPanel, lane = unit % kPanel, state = row * a.ld_state + unit;
      const int n = int(a.units - unit < F32::lanes ? a.units - unit : F32::lanes);
      const float* saved = kSaved ? a.saved + panel * a.saved_panel + row * kSaved * kPanel + lane : nullptr;
      const auto kept = [&](int i) { return load(saved + i * kPanel); };
      float* d_x = a.d_x + row * kGates * a.hidden + unit;
      F32 dh = load(a.d_h + state);
      if (a.d_output) dh = dh + load_up_to(a.d_output + row * a.ld_output + unit, n);
      if constexpr (kCell == RnnCell::lstm) {
        const F32 i = kept(0), f = kept(1), g = kept(2), o = kept(3), e = tanh_exp(kept(4));
        const F32 tanh_c = (one - e) / (one + e);
        const F32 before = a.c_before ? load_up_to(a.c_before + panel * a.c_panel + row * a.c_row + lane, n) : zero();
        const F32 dc = fmadd(dh * o, one - tanh_c * tanh_c, load(a.d_c + state));
        store_up_to(d_x, dc * g * i * (one - i), n);
        store_up_to(d_x + a.hidden, dc * before * f * (one - f), n);
        store_up_to(d_x + 2 * a.hidden, dc * i * (one - g * g), n);
        store_up_to(d_x + 3 * a.hidden, dh * tanh_c * o * (one - o), n);
        store(a.d_c + state, dc * f);
      } else if constexpr (kCell == RnnCell::gru) {
        dh = dh + load(a.direct + state);
        const F32 r = kept(0), z = kept(1), new_gate = kept(2), of_state = kept(3);
        const F32 before = a.h_before ? load_up_to(a.h_before + row * a.ld_before + unit, n) : zero();
        const F32 dn = dh * (one - z) * (one - new_gate * new_gate);
        const F32 dr = dn * of_state * r * (one - r), dz = dh * (before - new_gate) * z * (one - z);
        float* d_of_state = a.d_of_state + row * kGates * a.hidden + unit;
        store_up_to(d_x, dr, n);
        store_up_to(d_of_state, dr, n);
        store_up_to(d_x + a.hidden, dz, n);
        store_up_to(d_of_state + a.hidden, dz, n);
        store_up_to(d_x + 2 * a.hidden, dn, n);
        store_up_to(d_of_state + 2 * a.hidden, dn * r, n);
        store(a.direct + state, dh * z);
      } else {
        const F32 h = load_up_to(a.h + row * a.ldh + unit, n);
        const F32 slope = kCell == RnnCell::tanh ? one - h * h : select(less(zero(), h), one, zero());
        store_up_to(d_x, dh * slope, n);
      }
    }
  }
}

void rnn_cell_backward(const RnnCellBackwardArgs& a) {
  switch (a.cell) {
    case RnnCell::lstm: return backward<RnnCell::lstm>(a);
    case RnnCell::gru: return backward<RnnCell::gru>(a);
    case RnnCell::tanh: return backward<RnnCell::tanh>(a);
    case RnnCell::relu: return backward<RnnCell::relu>(a);
  }
}

REGISTER_KERNEL(rnn_cell_backward_table, rnn_cell_backward);

}  // namespace
}  // namespace lamina::LAMINA_ISA
