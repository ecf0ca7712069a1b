// Direct convolution: a tile of pixels x 32 output channels keeps its sums in registers over all taps and channels.
//
// In padded NHWC the inputs of a tap, and of a whole row of taps where the groups are one, are adjacent, so the product
// is that of a matrix whose rows overlap: nothing is unfolded. A panel of weights stays in L2 while all pixels of the
// band pass over it.
#include "cpu/kernels/conv_direct.h"

#include "cpu/kernels/conv_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

void conv_direct(const ConvDirectArgs& a) {
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
