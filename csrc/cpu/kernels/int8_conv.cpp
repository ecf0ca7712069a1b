// int8_conv in plain C++: the variant that exists everywhere, and the one the others are compared with bit by bit.
#include "cpu/kernels/int8_conv_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

void int8_conv(const Int8ConvArgs& a) {
  int32_t sums[kConvPanel] = {0};
  for_each_conv_tile(a, 1, [&](const ConvTile& tile) {
    for_each_conv_panel(a, 0, a.channels, [&](const int8_t* panel, int64_t first, int channels, int width) {
      for (int n = 0; n < width; ++n) sums[n] = 0;
      const int8_t* w = panel + tile.tap_begin * a.taps_x * a.length * width;
      for (int ty = 0; ty < tile.tap_end - tile.tap_begin; ++ty) {
        for (int tx = 0; tx < a.taps_x; ++tx) {
          const int8_t* x = tile.x[0] + ty * a.dilation_y * a.row + tx * a.tap_x;
          for (int64_t k = 0; k < a.length; k += 4, x += 4, w += 4 * width) {
            for (int n = 0; n < width; ++n) {
              sums[n] += x[0] * w[4 * n] + x[1] * w[4 * n + 1] + x[2] * w[4 * n + 2] + x[3] * w[4 * n + 3];
            }
          }
        }
      }
      finish_conv_tile(a.end, tile, sums, first, channels);
    });
  });
}

REGISTER_KERNEL(int8_conv_table, int8_conv);

}  // namespace
}  // namespace lamina::LAMINA_ISA
