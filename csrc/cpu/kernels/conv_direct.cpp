// Direct convolution: a tile of pixels x 32 output channels keeps its sums in registers over all taps and channels.
//
// In padded NHWC the inputs of a tap, and of a whole row of taps where the groups are one, are adjacent, so the product
// is that of a matrix whose rows overlap: nothing is unfolded. A panel of weights stays in L2 while all pixels of the
// band pass over it.
#include "cpu/kernels/conv_direct.h"

#include "cpu/kernels/conv_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

// `rows` finished pixels of float32 without a residual, `channels` of them from `channel` on: what finish() makes of
// each, with what does not change kept in registers.
template <Activation A>
void finish_plain(const ConvOutput& to, const float* sums, int64_t row, int64_t column, int rows, int64_t channel,
                  int channels) {
  float* out = static_cast<float*>(to.out) + row * to.out_row + column * to.out_pixel + channel;
  for (int c = 0; c < channels; c += F32::lanes) {
    const int n = channels - c < F32::lanes ? channels - c : F32::lanes;
    const F32 bias = to.bias ? load_up_to(to.bias + channel + c, n) : zero();
    for (int r = 0; r < rows; ++r) {
      const F32 sum = load(sums + r * kConvPanel + c);
      store_up_to(out + r * to.out_pixel + c, activate<A>(to.bias ? sum + bias : sum), n);
    }
  }
}

using FinishPlain = void (*)(const ConvOutput&, const float*, int64_t, int64_t, int, int64_t, int);

void conv_direct(const ConvDirectArgs& a) {
  FinishPlain finish_all = nullptr;
  if (!a.to.residual && !a.to.out_is_bf16) {
    with_activation(a.to.activation, [&]<Activation A>() { finish_all = finish_plain<A>; });
  }
  const int64_t k = a.runs * a.run_length, panels = conv_panels(a.group_outputs);
  for (int64_t i = a.first_panel; i < a.end_panel; ++i) {
    const int64_t group = i / panels, first = i % panels * kConvPanel, left = a.group_outputs - first;
    const int width = left > 16 ? kConvPanel : 16, channels = int(left < kConvPanel ? left : kConvPanel);
    const float* w = a.weights + (group * conv_panel_floats(a.group_outputs) + first) * k;
    const float* x = a.x + group * a.group_inputs;
    const int64_t channel = group * a.group_outputs + first;
    for (int64_t row = 0; row < a.rows; ++row) {
      balanced(a.columns, [&](int64_t column, int count) {
        float sums[kTileRows * kConvPanel];
        panel_tile(count, x + row * a.x_row + column * a.x_pixel, a.x_pixel, a.runs, a.run_starts, a.run_length, w,
                   width, sums, kConvPanel);
        if (finish_all) return finish_all(a.to, sums, row, column, count, channel, channels);
        for (int r = 0; r < count; ++r) {
          for (int c = 0; c < channels; c += F32::lanes) {
            const int n = channels - c < F32::lanes ? channels - c : F32::lanes;
            finish(a.to, load(sums + r * kConvPanel + c), row, column + r, channel + c, n);
          }
        }
      });
    }
  }
}

REGISTER_KERNEL(conv_direct_table, conv_direct);

}  // namespace
}  // namespace lamina::LAMINA_ISA
