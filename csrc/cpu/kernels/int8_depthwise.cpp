// int8_depthwise in plain C++, 32 channels at a time: what compilers vectorize.
#include "cpu/kernels/int8_depthwise.h"

#include "cpu/kernels/int8_conv_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

// sums[c] += x[c] w[c]
LAMINA_INLINE void add_products(int32_t* __restrict sums, const int8_t* __restrict x, const int8_t* __restrict w,
                                int channels) {
  for (int c = 0; c < channels; ++c) sums[c] += int32_t(x[c]) * w[c];
}

void int8_depthwise(const Int8DepthwiseArgs& a) {
  int32_t sums[kConvMaxPixels * kConvPanel];
  ConvTile tile;
  tile.tap_begin = tile.tap_end = 0;
  for (int64_t r = a.row_begin; r < a.row_end; ++r) {
    const int64_t image = r / a.out_height, y = r % a.out_height, top = y * a.stride_y - a.pad_y;
    tile.scale = a.end.scale + image * a.end.image_scale;
    for (int64_t column = 0; column < a.out_width; column += kConvMaxPixels) {
      tile.count = int(a.out_width - column < kConvMaxPixels ? a.out_width - column : kConvMaxPixels);
      for (int i = 0; i < tile.count; ++i) {
        tile.out[i] = image * a.end.out.image + y * a.end.out.row + (column + i) * a.end.out.column;
        tile.residual[i] = image * a.end.residual.image + y * a.end.residual.row + (column + i) * a.end.residual.column;
      }
      for (int64_t first = 0; first < a.channels; first += kConvPanel) {
        const int channels = int(a.channels - first < kConvPanel ? a.channels - first : kConvPanel);
        memset(sums, 0, sizeof sums);
        for (int ty = 0; ty < a.taps_y; ++ty) {
          const int64_t in = top + ty * a.dilation_y;
          if (in < 0 || in >= a.height) continue;
          for (int tx = 0; tx < a.taps_x; ++tx) {
            const int8_t* w = a.weights + (ty * a.taps_x + tx) * a.ld_weights + first;
            const int8_t* row = a.x + image * a.image + in * a.row + first;
            for (int i = 0; i < tile.count; ++i) {
              const int64_t at = (column + i) * a.stride_x - a.pad_x + tx * a.dilation_x;
              if (at < 0 || at >= a.width) continue;
              const int8_t* x = row + at * a.pixel;
              if (channels == kConvPanel) {
                add_products(sums + i * kConvPanel, x, w, kConvPanel);
              } else {
                add_products(sums + i * kConvPanel, x, w, channels);
              }
            }
          }
        }
        finish_conv_tile(a.end, tile, sums, first, channels);
      }
    }
  }
}

REGISTER_KERNEL(int8_depthwise_table, int8_depthwise);

}  // namespace
}  // namespace lamina::LAMINA_ISA
