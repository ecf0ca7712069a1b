// Rows of an image, whatever its strides, to float32 NHWC with a border of zeros: what direct convolution reads.
//
// Channels that are adjacent are copied; where pixels are adjacent instead (NCHW), squares of channels x pixels are
// transposed in registers.
#include "cpu/kernels/conv_pack.h"
#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

template <class In>
void copy_channels(const In* x, int64_t channels, float* to) {
  int64_t c = 0;
  for (; c + F32::lanes <= channels; c += F32::lanes) store(to + c, load(x + c));
  if (c < channels) store_n(to + c, load_n(x + c, int(channels - c)), int(channels - c));
}

// Up to lanes x lanes: x[channel][pixel] -> to[pixel][channel].
template <class In>
void transpose_square(const In* x, int64_t x_channel, int channels, int pixels, float* to, int64_t to_pixel) {
  F32 r[F32::lanes];
  for (int c = 0; c < F32::lanes; ++c) r[c] = c < channels ? load_up_to(x + c * x_channel, pixels) : zero();
  transpose(r);
  for (int p = 0; p < pixels; ++p) store_up_to(to + p * to_pixel, r[p], channels);
}

template <class In>
void copy_row(const ConvPackArgs& a, const In* x, float* to) {
  const int64_t lanes = F32::lanes;
  if (a.x_channel == 1 || a.channels == 1) {
    for (int64_t p = 0; p < a.columns; ++p) copy_channels(x + p * a.x_pixel, a.channels, to + p * a.to_pixel);
  } else if (a.x_pixel == 1) {
    for (int64_t p = 0; p < a.columns; p += lanes) {
      const int pixels = int(a.columns - p < lanes ? a.columns - p : lanes);
      for (int64_t c = 0; c < a.channels; c += lanes) {
        const int channels = int(a.channels - c < lanes ? a.channels - c : lanes);
        transpose_square(x + c * a.x_channel + p, a.x_channel, channels, pixels, to + p * a.to_pixel + c, a.to_pixel);
      }
    }
  } else {
    for (int64_t p = 0; p < a.columns; ++p) {
      for (int64_t c = 0; c < a.channels; ++c) {
        const In* from = x + p * a.x_pixel + c * a.x_channel;
        if constexpr (sizeof(In) == sizeof(float)) {
          to[p * a.to_pixel + c] = *from;
        } else {
          to[p * a.to_pixel + c] = bf16_to_float(*from);
        }
      }
    }
  }
}

void conv_pack(const ConvPackArgs& a) {
  const int64_t width = (a.left + a.columns + a.right) * a.to_pixel;
  const int64_t height = a.top + a.rows + a.bottom;
  for (int64_t row = 0; row < height; ++row) {
    float* to = a.to + row * a.to_row;
    const int64_t from = row - a.top;
    if (from < 0 || from >= a.rows) {
      memset(to, 0, size_t(width) * sizeof(float));
      continue;
    }
    memset(to, 0, size_t(a.left * a.to_pixel) * sizeof(float));
    memset(to + (a.left + a.columns) * a.to_pixel, 0, size_t(a.right * a.to_pixel) * sizeof(float));
    float* inside = to + a.left * a.to_pixel;
    if (a.is_bf16) {
      copy_row(a, static_cast<const bf16*>(a.x) + from * a.x_row, inside);
    } else {
      copy_row(a, static_cast<const float*>(a.x) + from * a.x_row, inside);
    }
  }
}

REGISTER_KERNEL(conv_pack_table, conv_pack);

}  // namespace
}  // namespace lamina::LAMINA_ISA
