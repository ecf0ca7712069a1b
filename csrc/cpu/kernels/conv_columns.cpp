// Convolution with the columns of a row in the lanes: a panel of 16 output channels would be mostly empty where a layer
// has six. Up to six channels x two registers of columns keep their sums over all taps; each pixel is loaded once for
// the channels and each weight broadcast once for the columns. The pool follows while those channels lie in L1.
#include "cpu/kernels/conv_columns.h"

#include "cpu/kernels/conv_tile.h"
#include "cpu/vec/pairs.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kChannels = kConvColumnsChannels;

// Keeps a value in its register. Compilers would rather load it again for each product, and most of these loads cross a
// cache line.
LAMINA_INLINE F32 kept(F32 value) {
  __asm__("" : "+x"(value.r));
  return value;
}

// kWide registers of columns, from one place on, of kCount channels; kOne input channel or any number.
template <int kCount, int kWide, bool kOne>
LAMINA_INLINE void tile(const ConvColumnsArgs& a, const float* x, int64_t channel, float* out, int64_t out_channel,
                        int left) {
  F32 sums[kCount][kWide];
  LAMINA_UNROLL for (int i = 0; i < kCount; ++i) {
    LAMINA_UNROLL for (int j = 0; j < kWide; ++j) sums[i][j] = set1(a.bias ? a.bias[channel + i] : 0.0f);
  }
  const float* w = a.weights + channel;
  for (int ky = 0; ky < a.taps_y; ++ky) {
    for (int kx = 0; kx < a.taps_x; ++kx) {
      const float* from = x + ky * a.dilation_y * a.x_row + kx * a.dilation_x;
      const int64_t channels = kOne ? 1 : a.channels;
      for (int64_t c = 0; c < channels; ++c, from += a.x_channel, w += a.width) {
        F32 pixels[kWide];
        LAMINA_UNROLL for (int j = 0; j < kWide; ++j) pixels[j] = kept(load(from + j * F32::lanes));
        LAMINA_UNROLL for (int i = 0; i < kCount; ++i) {
          const F32 weight = set1(w[i]);
          LAMINA_UNROLL for (int j = 0; j < kWide; ++j) sums[i][j] = fmadd(pixels[j], weight, sums[i][j]);
        }
      }
    }
  }
  LAMINA_UNROLL for (int i = 0; i < kCount; ++i) {
    LAMINA_UNROLL for (int j = 0; j < kWide; ++j) {
      const F32 y = a.activation == Activation::none ? sums[i][j] : activated(a.activation, sums[i][j]);
      const int n = left - j * F32::lanes;
      store_up_to(out + i * out_channel + j * F32::lanes, y, n < F32::lanes ? n : F32::lanes);
    }
  }
}

// All rows of kCount channels.
template <int kCount, bool kOne>
void rows_of(const ConvColumnsArgs& a, int64_t channel, float* out, int64_t out_channel, int64_t out_row) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const float* x = a.x + row * a.stride_y * a.x_row;
    float* to = out + row * out_row;
    for (int64_t column = 0; column < a.columns; column += 2 * F32::lanes) {
      const int left = int(a.columns - column < 2 * F32::lanes ? a.columns - column : 2 * F32::lanes);
      if (left > F32::lanes) {
        tile<kCount, 2, kOne>(a, x + column, channel, to + column, out_channel, left);
      } else {
        tile<kCount, 1, kOne>(a, x + column, channel, to + column, out_channel, left);
      }
    }
  }
}

template <bool kOne>
void rows_of(const ConvColumnsArgs& a, int count, int64_t channel, float* out, int64_t out_channel, int64_t out_row) {
  static_assert(kChannels == 6);
  if (count == 6) return rows_of<6, kOne>(a, channel, out, out_channel, out_row);
  if (count == 5) return rows_of<5, kOne>(a, channel, out, out_channel, out_row);
  if (count == 4) return rows_of<4, kOne>(a, channel, out, out_channel, out_row);
  if (count == 3) return rows_of<3, kOne>(a, channel, out, out_channel, out_row);
  if (count == 2) return rows_of<2, kOne>(a, channel, out, out_channel, out_row);
  rows_of<1, kOne>(a, channel, out, out_channel, out_row);
}

void rows_of(const ConvColumnsArgs& a, int count, int64_t channel, float* out, int64_t out_channel, int64_t out_row) {
  if (a.channels == 1) return rows_of<true>(a, count, channel, out, out_channel, out_row);
  rows_of<false>(a, count, channel, out, out_channel, out_row);
}

// A NaN wins, whichever came first.
LAMINA_INLINE float larger(float most, float value) { return most != most || value <= most ? most : value; }

LAMINA_INLINE void pool_columns(const float* __restrict from, float* __restrict to, int64_t columns, int window,
                                int stride, bool max, float factor) {
  for (int64_t x = 0; x < columns; ++x) {
    float y = from[x * stride];
    for (int k = 1; k < window; ++k) y = max ? larger(y, from[x * stride + k]) : y + from[x * stride + k];
    to[x] = max ? y : y * factor;
  }
}

LAMINA_INLINE F32 larger(F32 most, F32 value) { return select(is_nan(most), most, max(most, value)); }

// Whether each result is the largest of 2 x 2 values that are all there.
bool is_quarter(const ConvColumnsArgs& a, const ConvColumnsPool& p) {
  const bool twos = p.window_h == 2 && p.window_w == 2 && p.stride_h == 2 && p.stride_w == 2;
  return p.max && twos && p.pad_h == 0 && p.pad_w == 0 && 2 * (p.first_row + p.rows) <= a.first + a.rows;
}

// The same from register to register: what was just stored is not loaded again in other pieces.
void pool_quarter(const ConvColumnsArgs& a, const ConvColumnsPool& p, const float* x, int64_t x_row, float* out) {
  x += (2 * p.first_row - a.first) * x_row;
  for (int64_t y = 0; y < p.rows; ++y, x += 2 * x_row, out += a.out_row) {
    for (int64_t column = 0; column < p.out_columns; column += F32::lanes) {
      const float* from = x + 2 * column;
      const F32 low = larger(load(from), load(from + x_row));
      const F32 high = larger(load(from + F32::lanes), load(from + x_row + F32::lanes));
      const int64_t left = p.out_columns - column;
      const F32 most = larger(even_lanes(low, high), odd_lanes(low, high));
      store_up_to(out + column, most, left < F32::lanes ? int(left) : F32::lanes);
    }
  }
}

// Rows of one channel to their pooled rows: down the columns first, whole registers at a time, and then across.
void pool(const ConvColumnsArgs& a, const ConvColumnsPool& p, const float* x, int64_t x_row, float* row, float* out) {
  const float nothing = p.max ? -__builtin_inff() : 0.0f, factor = 1.0f / float(p.window_h * p.window_w);
  const int64_t padded = p.pad_w + x_row + p.window_w;
  for (int64_t i = 0; i < padded; ++i) row[i] = nothing;
  float* inside = row + p.pad_w;
  for (int64_t y = 0; y < p.rows; ++y, out += a.out_row) {
    const int64_t top = (p.first_row + y) * p.stride_h - p.pad_h - a.first, bottom = top + p.window_h;
    const int64_t first = top > 0 ? top : 0, last = bottom < a.rows ? bottom : a.rows;
    for (int64_t column = 0; column < a.columns; column += F32::lanes) {
      const int n = int(a.columns - column < F32::lanes ? a.columns - column : F32::lanes);
      F32 sum = load(x + first * x_row + column);
      for (int64_t i = first + 1; i < last; ++i) {
        const F32 v = load(x + i * x_row + column);
        sum = p.max ? larger(sum, v) : sum + v;
      }
      store_up_to(inside + column, sum, n);
    }
    pool_columns(row, out, p.out_columns, p.window_w, p.stride_w, p.max, factor);
  }
}

void conv_columns(const ConvColumnsArgs& a) {
  const int64_t whole = (a.columns + 31) / 32 * 32;
  // Groups of nearly equal size: 8 channels as 4 + 4, not as 6 + 2.
  int64_t groups = (a.out_channels + kChannels - 1) / kChannels;
  for (int64_t channel = 0; groups > 0; --groups) {
    const int count = int((a.out_channels - channel + groups - 1) / groups);
    float* out = a.out + channel * a.out_channel;
    if (!a.pool) {
      rows_of(a, count, channel, out, a.out_channel, a.out_row);
      channel += count;
      continue;
    }
    rows_of(a, count, channel, a.scratch, a.rows * whole, whole);
    float* row = a.scratch + kChannels * a.rows * whole;
    for (int i = 0; i < count; ++i) {
      const float* x = a.scratch + i * a.rows * whole;
      if (is_quarter(a, *a.pool)) {
        pool_quarter(a, *a.pool, x, whole, out + i * a.out_channel);
      } else {
        pool(a, *a.pool, x, whole, row, out + i * a.out_channel);
      }
    }
    channel += count;
  }
}

REGISTER_KERNEL(conv_columns_table, conv_columns);

}  // namespace
}  // namespace lamina::LAMINA_ISA
