// Depthwise convolution: channels in the lanes, a few neighbouring pixels at once, so that a weight is loaded once for
// all of them.
#include "cpu/kernels/conv_depthwise.h"

#include "cpu/kernels/conv_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kPixels = F32::registers >= 32 ? 14 : 7;

template <int P>
LAMINA_INLINE void pixels(const ConvDepthwiseArgs& a, int64_t row, int64_t column, int64_t c, int n) {
  const int64_t padded = (a.channels + 15) / 16 * 16;
  const float* x = a.x + row * a.x_row + column * a.x_pixel + c;
  F32 acc[P];
  LAMINA_UNROLL
  for (int p = 0; p < P; ++p) acc[p] = zero();
  for (int t = 0; t < a.taps; ++t) {
    const F32 w = load(a.weights + t * padded + c);
    const float* from = x + a.tap_starts[t];
    if (n == F32::lanes) {
      LAMINA_UNROLL
      for (int p = 0; p < P; ++p) acc[p] = fmadd(load(from + p * a.x_pixel), w, acc[p]);
    } else {
      LAMINA_UNROLL
      for (int p = 0; p < P; ++p) acc[p] = fmadd(load_n(from + p * a.x_pixel, n), w, acc[p]);
    }
  }
  for (int p = 0; p < P; ++p) finish(a.to, acc[p], row, column + p, c, n);
}

void conv_depthwise(const ConvDepthwiseArgs& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    int64_t column = 0;
    const auto along = [&]<int P>() {
      for (; column + P <= a.columns; column += P) {
        for (int64_t c = a.first_channel; c < a.end_channel; c += F32::lanes) {
          const int64_t left = a.end_channel - c;
          pixels<P>(a, row, column, c, int(left < F32::lanes ? left : F32::lanes));
        }
      }
    };
    along.template operator()<kPixels>();
    along.template operator()<4>();
    along.template operator()<1>();
  }
}

REGISTER_KERNEL(conv_depthwise_table, conv_depthwise);

}  // namespace
}  // namespace lamina::LAMINA_ISA
