// pool: maxima and means over windows. Where the channels of a pixel lie together they are in the lanes, and a window
// is a sum in registers. Where they do not (NCHW), pixels are: the rows of a window become one, which lies between
// values that change nothing, and the windows of an output row are sums of that line shifted against itself.
#include "cpu/kernels/pool.h"

#include "cpu/vec/pairs.h"
#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;

template <bool kLargest>
LAMINA_INLINE F32 start() {
  return kLargest ? set1(-__builtin_inff()) : zero();
}

// A NaN in v wins by the order of the operands, one that was found before by the choice.
template <bool kLargest>
LAMINA_INLINE F32 joined(F32 sum, F32 v) {
  return kLargest ? select(is_nan(sum), sum, max(sum, v)) : sum + v;
}

LAMINA_INLINE float as_float(float x) { return x; }
LAMINA_INLINE float as_float(bf16 x) { return bf16_to_float(x); }
LAMINA_INLINE void put(float& to, float x) { to = x; }
LAMINA_INLINE void put(bf16& to, float x) { to.bits = bf16_bits(x); }

// -- channels in the lanes

// kVectors registers of channels of one output pixel; n <= lanes of the last one.
template <bool kLargest, int kVectors, class T>
LAMINA_INLINE void pool_pixel(const PoolArgs& a, const T* image, T* to, const PoolWindow& row, const PoolWindow& column,
                              F32 divisor, int n) {
  F32 sum[kVectors];
  LAMINA_UNROLL
  for (int i = 0; i < kVectors; ++i) sum[i] = start<kLargest>();
  // Column by column, as pixels in the lanes are summed, so that both layouts give the same bits.
  const T* top = image + row.first * a.x.row + column.first * a.x.column;
  for (int kx = 0; kx < column.count; ++kx, top += a.step_x * a.x.column) {
    F32 part[kVectors];
    LAMINA_UNROLL
    for (int i = 0; i < kVectors; ++i) part[i] = kLargest ? sum[i] : zero();
    const T* x = top;
    for (int ky = 0; ky < row.count; ++ky, x += a.step_y * a.x.row) {
      LAMINA_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        part[i] = joined<kLargest>(part[i], i + 1 < kVectors ? load(x + i * kLanes) : load_up_to(x + i * kLanes, n));
      }
    }
    LAMINA_UNROLL
    for (int i = 0; i < kVectors; ++i) sum[i] = kLargest ? part[i] : sum[i] + part[i];
  }
  LAMINA_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const F32 y = kLargest ? sum[i] : sum[i] / divisor;
    if (i + 1 < kVectors) {
      store(to + i * kLanes, y);
    } else {
      store_up_to(to + i * kLanes, y, n);
    }
  }
}

template <bool kLargest, class T>
void pool_pixels(const PoolArgs& a) {
  constexpr int together = 4;
  for (int64_t r = a.begin; r < a.end; ++r) {
    const int64_t image = r / a.out_height, y = r % a.out_height;
    const PoolWindow& row = a.rows[y];
    const T* x = static_cast<const T*>(a.x.data) + image * a.x.image;
    for (int64_t ox = 0; ox < a.out_width; ++ox) {
      const PoolWindow& column = a.columns[ox];
      const F32 divisor = set1(a.divisor ? float(a.divisor) : float(row.divisor) * float(column.divisor));
      T* to = static_cast<T*>(a.out.data) + image * a.out.image + y * a.out.row + ox * a.out.column;
      int64_t c = 0;
      for (; c + together * kLanes <= a.channels; c += together * kLanes) {
        pool_pixel<kLargest, together>(a, x + c, to + c, row, column, divisor, kLanes);
      }
      for (; c < a.channels; c += kLanes) {
        const int n = int(a.channels - c < kLanes ? a.channels - c : kLanes);
        pool_pixel<kLargest, 1>(a, x + c, to + c, row, column, divisor, n);
      }
    }
  }
}

// -- pixels in the lanes

// The rows of a window as one: line[x] of every column.
template <bool kLargest, class T>
LAMINA_INLINE void join_rows(const PoolArgs& a, const T* channel, const PoolWindow& row, float* line) {
  const T* x = channel + row.first * a.x.row;
  const int64_t step = a.step_y * a.x.row;
  if (a.x.column != 1) {
    for (int64_t i = 0; i < a.width; ++i) {
      F32 sum = start<kLargest>();
      for (int ky = 0; ky < row.count; ++ky) {
        sum = joined<kLargest>(sum, set1(as_float(x[ky * step + i * a.x.column])));
      }
      store_n(line + i, sum, 1);
    }
    return;
  }
  for (int64_t i = 0; i < a.width; i += kLanes) {
    const int n = int(a.width - i < kLanes ? a.width - i : kLanes);
    F32 sum = start<kLargest>();
    for (int ky = 0; ky < row.count; ++ky) sum = joined<kLargest>(sum, load_up_to(x + ky * step + i, n));
    store_up_to(line + i, sum, n);
  }
}

// Lane i is the window of output column ox + i. kStride 0: any.
template <bool kLargest, int kStride>
LAMINA_INLINE F32 join_columns(const PoolArgs& a, int64_t ox) {
  F32 sum = start<kLargest>();
  const float* x = a.line + ox * a.stride_x;
  for (int64_t kx = 0; kx < a.taps; ++kx, x += a.step_x) {
    F32 v;
    if constexpr (kStride == 1) {
      v = load(x);
    } else if constexpr (kStride == 2) {
      v = even_lanes(load(x), load(x + kLanes));
    } else {
      alignas(64) float apart[kLanes];
      for (int i = 0; i < kLanes; ++i) apart[i] = x[i * a.stride_x];
      v = load(apart);
    }
    sum = joined<kLargest>(sum, v);
  }
  return sum;
}

template <bool kLargest, int kStride, class T>
void pool_line(const PoolArgs& a, float row_divisor, T* to) {
  for (int64_t ox = 0; ox < a.out_width; ox += kLanes) {
    const int n = int(a.out_width - ox < kLanes ? a.out_width - ox : kLanes);
    F32 y = join_columns<kLargest, kStride>(a, ox);
    if constexpr (!kLargest) {
      y = y / (a.divisor ? set1(float(a.divisor)) : set1(row_divisor) * load_up_to(a.divisors + ox, n));
    }
    if (a.out.column == 1) {
      store_up_to(to + ox, y, n);
    } else {
      alignas(64) float values[kLanes];
      store(values, y);
      for (int i = 0; i < n; ++i) put(to[(ox + i) * a.out.column], values[i]);
    }
  }
}

// Windows of any widths: means only.
template <class T>
void pool_adaptive_line(const PoolArgs& a, float row_divisor, T* to) {
  for (int64_t ox = 0; ox < a.out_width; ++ox) {
    const PoolWindow& column = a.columns[ox];
    const float divisor = a.divisor ? float(a.divisor) : row_divisor * float(column.divisor);
    float sum = 0;
    for (int kx = 0; kx < column.count; ++kx) sum += a.line[column.first + kx];
    put(to[ox * a.out.column], sum / divisor);
  }
}

// One mean of each channel, kLanes channels at a time: their sums of columns become, transposed, columns of channels.
template <class T>
void pool_whole_planes(const PoolArgs& a) {
  const PoolWindow &row = a.rows[0], &column = a.columns[0];
  const float divisor = a.divisor ? float(a.divisor) : float(row.divisor) * float(column.divisor);
  for (int64_t first = a.begin; first < a.end; first += kLanes) {
    const int planes = int(a.end - first < kLanes ? a.end - first : kLanes);
    const T* x[kLanes];
    T* to[kLanes];
    int64_t image = first / a.channels, channel = first % a.channels;
    for (int i = 0; i < kLanes; ++i) {
      x[i] = static_cast<const T*>(a.x.data) + image * a.x.image + channel * a.x.channel;
      to[i] = static_cast<T*>(a.out.data) + image * a.out.image + channel * a.out.channel;
      if (i + 1 < planes && ++channel == a.channels) {
        channel = 0;
        ++image;
      }
    }
    F32 sum = zero();
    for (int64_t at = 0; at < a.width; at += kLanes) {
      const int n = int(a.width - at < kLanes ? a.width - at : kLanes);
      F32 part[kLanes];
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        part[i] = zero();
        for (int ky = 0; ky < row.count; ++ky) part[i] = part[i] + load_up_to(x[i] + ky * a.x.row + at, n);
      }
      transpose(part);
      LAMINA_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        if (i < n) sum = sum + part[i];
      }
    }
    alignas(64) float means[kLanes];
    store(means, sum / set1(divisor));
    for (int i = 0; i < planes; ++i) put(*to[i], means[i]);
  }
}

template <bool kLargest, class T>
void pool_planes(const PoolArgs& a) {
  if constexpr (!kLargest) {
    if (a.stride_x == 0 && a.out_height == 1 && a.out_width == 1 && a.x.column == 1) return pool_whole_planes<T>(a);
  }
  const F32 nothing = start<kLargest>();
  for (int64_t i = 0; i < a.line_size; i += kLanes) {
    store_up_to(a.line + i, nothing, int(a.line_size - i < kLanes ? a.line_size - i : kLanes));
  }
  for (int64_t r = a.begin; r < a.end; ++r) {
    const int64_t plane = r / a.out_height, y = r % a.out_height;
    const int64_t image = plane / a.channels, channel = plane % a.channels;
    const PoolWindow& row = a.rows[y];
    const T* x = static_cast<const T*>(a.x.data) + image * a.x.image + channel * a.x.channel;
    T* to = static_cast<T*>(a.out.data) + image * a.out.image + channel * a.out.channel + y * a.out.row;
    join_rows<kLargest>(a, x, row, a.line + a.left);
    const float divisor = float(row.divisor);
    switch (a.stride_x) {
      case 0: pool_adaptive_line(a, divisor, to); break;
      case 1: pool_line<kLargest, 1>(a, divisor, to); break;
      case 2: pool_line<kLargest, 2>(a, divisor, to); break;
      default: pool_line<kLargest, 0>(a, divisor, to);
    }
  }
}

template <bool kLargest, class T>
void pool_images(const PoolArgs& a) {
  a.channels_adjacent ? pool_pixels<kLargest, T>(a) : pool_planes<kLargest, T>(a);
}

void pool(const PoolArgs& a) {
  if (a.bfloat16) {
    a.largest ? pool_images<true, bf16>(a) : pool_images<false, bf16>(a);
  } else {
    a.largest ? pool_images<true, float>(a) : pool_images<false, float>(a);
  }
}

REGISTER_KERNEL(pool_table, pool);

}  // namespace
}  // namespace lamina::LAMINA_ISA
