// Rows to panels and back by transposes of as many registers as one has lanes, and the quantization of a panel: that of
// quantize_rows, bit for bit, with a token in every lane. Nothing in it is horizontal.
#include "cpu/kernels/token_panels.h"

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;

LAMINA_INLINE int smaller(int64_t a, int64_t b) { return int(a < b ? a : b); }

template <class T>
void panel_of_rows(const PanelOfRowsArgs<T>& a) {
  for (int64_t k = 0; k < a.features; k += kLanes) {
    const int count = smaller(kLanes, a.features - k);
    for (int t = 0; t < kPanelTokens; t += kLanes) {
      F32 r[kLanes];
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) r[i] = t + i < a.rows ? load_up_to(a.x + (t + i) * a.ldx + k, count) : zero();
      transpose(r);
      float* to = a.panel + k * kPanelTokens + t;
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        if (i < count) store(to + i * kPanelTokens, r[i]);
      }
    }
  }
}

void rows_of_panel(const RowsOfPanelArgs& a) {
  for (int64_t k = 0; k < a.features; k += kLanes) {
    const int count = smaller(kLanes, a.features - k);
    for (int t = 0; t < a.rows; t += kLanes) {
      const float* from = a.panel + k * kPanelTokens + t;
      F32 r[kLanes];
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) r[i] = i < count ? load(from + i * kPanelTokens) : zero();
      transpose(r);
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        if (t + i < a.rows) store_up_to(a.out + (t + i) * a.ld + k, r[i], count);
      }
    }
  }
}

// Registers of tokens at once, so that the maximum runs in independent chains.
constexpr int kTogether = kPanelTokens / kLanes < 4 ? kPanelTokens / kLanes : 4;

void quantize_panel(const QuantizePanelArgs& a) {
  bool finite = true;
  for (int t = 0; t < kPanelTokens; t += kTogether * kLanes) {
    const float* x = a.panel + t;
    F32 inverse[kTogether];
    I32 largest[kTogether];
    LAMINA_UNROLL
    for (int v = 0; v < kTogether; ++v) largest[v] = a.largest ? load_i32(a.largest + t + v * kLanes) : set1_i32(0);
    if (!a.largest) {
      for (int64_t k = 0; k < a.features; ++k) {
        LAMINA_UNROLL
        for (int v = 0; v < kTogether; ++v) {
          largest[v] = max(largest[v], abs_bits(load(x + k * kPanelTokens + v * kLanes)));
        }
      }
    }
    LAMINA_UNROLL
    for (int v = 0; v < kTogether; ++v) {
      const F32 most = floats_of(largest[v]);
      // Below 1e-36 the inverse would overflow; such a token counts as zero.
      const Mask tiny = less(most, set1(1e-36f));
      inverse[v] = select(tiny, zero(), set1(127.0f) / most);
      const F32 nan_or_zero = most - most;
      finite = finite && all(less(nan_or_zero, set1(1.0f)));
      store(a.scales + t + v * kLanes, select(tiny, zero(), most / set1(127.0f)) + nan_or_zero);
    }
    int32_t* codes = reinterpret_cast<int32_t*>(a.codes) + t;
    int64_t k = 0;
    for (; k + 4 <= a.features; k += 4) {
      LAMINA_UNROLL
      for (int v = 0; v < kTogether; ++v) {
        const float* four = x + k * kPanelTokens + v * kLanes;
        F32 scaled[4];
        LAMINA_UNROLL
        for (int i = 0; i < 4; ++i) scaled[i] = load(four + i * kPanelTokens) * inverse[v];
        store_i32(codes + k / 4 * kPanelTokens + v * kLanes, join_codes(scaled[0], scaled[1], scaled[2], scaled[3]));
      }
    }
    if (k == a.features) continue;
    for (int v = 0; v < kTogether; ++v) {
      F32 scaled[4] = {zero(), zero(), zero(), zero()};
      for (int i = 0; k + i < a.features; ++i) scaled[i] = load(x + (k + i) * kPanelTokens + v * kLanes) * inverse[v];
      store_i32(codes + k / 4 * kPanelTokens + v * kLanes, join_codes(scaled[0], scaled[1], scaled[2], scaled[3]));
    }
  }
  if (finite) return;
  for (int t = 0; t < kPanelTokens; ++t) {
    if (a.scales[t] == a.scales[t]) continue;
    for (int64_t g = 0; g < (a.features + 3) / 4; ++g) memset(a.codes + (g * kPanelTokens + t) * 4, 128, 4);
  }
}

REGISTER_KERNEL(panel_of_rows_f32_table, panel_of_rows<float>);
REGISTER_KERNEL(panel_of_rows_bf16_table, panel_of_rows<bf16>);
REGISTER_KERNEL(rows_of_panel_table, rows_of_panel);
REGISTER_KERNEL(quantize_panel_table, quantize_panel);

}  // namespace
}  // namespace lamina::LAMINA_ISA
