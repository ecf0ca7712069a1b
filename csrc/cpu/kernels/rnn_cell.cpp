// rnn_cell on the vector vocabulary. With e = e^-x, sigmoid is 1 / (1 + e) and tanh is (1 - e) / (1 + e) (of e^-2x), so
// a whole LSTM cell is five exponentials and two divisions, a GRU cell three and two: terms are brought over one
// denominator instead of being divided one by one.
#include "cpu/kernels/rnn_cell.h"

#include "cpu/vec/gates.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kPanel = 16;

// Calls body(row, offset in its gates, first unit, how many) for every register of units.
template <class Body>
LAMINA_INLINE void for_registers(const RnnCellArgs& a, const Body& body) {
  for (int64_t unit = 0; unit < a.units; unit += F32::lanes) {
    const int64_t panel = unit / kPanel, lane = unit % kPanel;
    const int n = int(a.units - unit < F32::lanes ? a.units - unit : F32::lanes);
    for (int64_t row = 0; row < a.rows; ++row) {
      body(row, a.x_gates + panel * a.x_panel + row * a.x_row + lane,
           a.h_gates + panel * a.h_panel + row * a.h_row + lane, unit, n);
    }
  }
}

void lstm_cell(const RnnCellArgs& a) {
  const F32 one = set1(1.0f);
  for_registers(a, [&](int64_t row, const float* x, const float* s, int64_t unit, int n) {
    const F32 i = sigmoid_exp(load(x) + load(s));
    const F32 f = sigmoid_exp(load(x + kPanel) + load(s + kPanel));
    const F32 g = tanh_exp(load(x + 2 * kPanel) + load(s + 2 * kPanel));
    const F32 o = sigmoid_exp(load(x + 3 * kPanel) + load(s + 3 * kPanel));
    // c / (1 + f) + (1 - g) / ((1 + i) (1 + g))
    float* state = a.c + row * a.ldc + unit;
    const F32 forget = one + f, input = (one + i) * (one + g);
    const F32 c = fmadd(load(state), input, (one - g) * forget) / (forget * input);
    store(state, c);
    const F32 t = tanh_exp(c);
    store_up_to(a.h + row * a.ldh + unit, (one - t) / ((one + o) * (one + t)), n);
  });
}

void gru_cell(const RnnCellArgs& a) {
  const F32 one = set1(1.0f);
  for_registers(a, [&](int64_t row, const float* x, const float* s, int64_t unit, int n) {
    const F32 r = sigmoid(load(x) + load(s));
    const F32 z = sigmoid_exp(load(x + kPanel) + load(s + kPanel));
    const F32 c = tanh_exp(fmadd(r, load(s + 2 * kPanel), load(x + 2 * kPanel)));
    // With 1 - sigmoid = z / (1 + z): (z (1 - c) + h (1 + c)) / ((1 + z) (1 + c))
    const F32 before = load_up_to(a.h_before + row * a.ld_before + unit, n);
    const F32 h = fmadd(before, one + c, z * (one - c)) / ((one + z) * (one + c));
    store_up_to(a.h + row * a.ldh + unit, h, n);
  });
}

REGISTER_KERNEL(lstm_cell_table, lstm_cell);
REGISTER_KERNEL(gru_cell_table, gru_cell);

}  // namespace
}  // namespace lamina::LAMINA_ISA
