// The last step of a convolution whose output is pooled or is not NHWC: maxima or means over windows of a band of
// finished rows while it lies in L2, stored in any strides. Channels lie in the lanes; where the output's pixels are
// adjacent instead (NCHW), squares of pixels x channels are transposed in registers.
#include "cpu/kernels/conv_pool.h"
#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

// One pooled pixel, n <= lanes channels from c on.
LAMINA_INLINE F32 pooled(const ConvPoolArgs& a, int64_t row, int64_t column, int64_t c, int n) {
  const int64_t top = row * a.stride_h - a.pad_h, left = column * a.stride_w - a.pad_w;
  const int64_t y0 = top > a.first ? top : a.first, x0 = left > 0 ? left : 0;
  const int64_t bottom = top + a.window_h, right = left + a.window_w, end = a.first + a.height;
  const int64_t y1 = bottom < end ? bottom : end, x1 = right < a.columns ? right : a.columns;
  F32 sum = a.max ? set1(-__builtin_inff()) : zero();
  for (int64_t y = y0; y < y1; ++y) {
    for (int64_t x = x0; x < x1; ++x) {
      const F32 v = load_up_to(a.x + (y - a.first) * a.x_row + x * a.x_pixel + c, n);
      // A NaN in v wins by the order of the operands, one that was found before by the choice.
      sum = a.max ? select(is_nan(sum), sum, max(sum, v)) : sum + v;
    }
  }
  return a.max ? sum : sum * set1(1.0f / float(a.window_h * a.window_w));
}

template <class Out>
void pool_rows(const ConvPoolArgs& a) {
  constexpr int lanes = F32::lanes;
  const bool adjacent = a.out_channel == 1 || a.channels == 1;
  for (int64_t row = 0; row < a.rows; ++row) {
    Out* out = static_cast<Out*>(a.out) + row * a.out_row;
    for (int64_t column = 0; column < a.out_columns; column += lanes) {
      const int pixels = int(a.out_columns - column < lanes ? a.out_columns - column : lanes);
      for (int64_t c = 0; c < a.channels; c += lanes) {
        const int n = int(a.channels - c < lanes ? a.channels - c : lanes);
        F32 r[lanes];
        for (int p = 0; p < lanes; ++p) r[p] = p < pixels ? pooled(a, a.first_row + row, column + p, c, n) : zero();
        if (adjacent) {
          for (int p = 0; p < pixels; ++p) store_up_to(out + (column + p) * a.out_pixel + c, r[p], n);
          continue;
        }
        transpose(r);
        Out* to = out + column * a.out_pixel + c * a.out_channel;
        for (int i = 0; i < n; ++i) {
          if (a.out_pixel == 1) {
            store_up_to(to + i * a.out_channel, r[i], pixels);
          } else {
            Out values[lanes];
            store(values, r[i]);
            for (int p = 0; p < pixels; ++p) to[i * a.out_channel + p * a.out_pixel] = values[p];
          }
        }
      }
    }
  }
}

void conv_pool(const ConvPoolArgs& a) { a.out_is_bf16 ? pool_rows<bf16>(a) : pool_rows<float>(a); }

REGISTER_KERNEL(conv_pool_table, conv_pool);

}  // namespace
}  // namespace lamina::LAMINA_ISA
