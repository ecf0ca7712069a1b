#include "ops/conv_pixels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/interleave_codes.h"
#include "cpu/kernels/quantize_rows.h"
#include "cpu/tuning/int8_conv.h"
#include "ops/checks.h"
#include "ops/parallel.h"

namespace lamina {

constinit const KernelTable<void(const InterleaveCodesArgs&)> interleave_codes_table;

namespace {

// [channels][width] -> [width][channels], in squares that stay in L1.
void transpose_codes(const int8_t* from, int64_t channels, int64_t width, int8_t* to) {
  if (channels == 3) {
    interleave_codes_table.get()({.planes = {from, from + width, from + 2 * width}, .pixels = width, .to = to});
    return;
  }
  constexpr int64_t kSquare = 32;
  for (int64_t x0 = 0; x0 < width; x0 += kSquare) {
    const int64_t x1 = std::min(width, x0 + kSquare);
    for (int64_t c0 = 0; c0 < channels; c0 += kSquare) {
      const int64_t c1 = std::min(channels, c0 + kSquare);
      for (int64_t x = x0; x < x1; ++x) {
        for (int64_t c = c0; c < c1; ++c) to[x * channels + c] = from[c * width + x];
      }
    }
  }
}

template <class T>
float abs_max(const T* x, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    return abs_max_f32_table.get()(x, n);
  } else {
    return abs_max_bf16_table.get()(x, n);
  }
}

// The lines of values that lie together, of which an image consists: `lines(image)` of `length` values.
struct Lines {
  int64_t outer, outer_stride, inner, inner_stride, length;

  explicit Lines(const TensorView& x) {
    const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
    if (channels == 1 || x.stride(1) == 1) {
      outer = height, outer_stride = x.stride(2), inner = width, inner_stride = x.stride(3), length = channels;
    } else {
      outer = channels, outer_stride = x.stride(1), inner = height, inner_stride = x.stride(2), length = width;
    }
    if (inner_stride == length || inner == 1) length *= inner, inner = 1;
    if (inner == 1 && (outer_stride == length || outer == 1)) {
      // One line; cut so that threads can share it.
      inner = outer, inner_stride = outer_stride, outer = 1, outer_stride = 0;
      if (inner_stride == 0) inner_stride = length;
    }
  }
};

template <class T>
void find_scales(const TensorView& x, float* scales) {
  const Lines lines(x);
  const int64_t images = x.size(0), per_image = lines.outer * lines.inner;
  const int64_t grain = std::max<int64_t>(1, tuning::kInt8ConvPixelsPerThread / std::max<int64_t>(lines.length, 1));
  for (int64_t image = 0; image < images; ++image) {
    const T* base = x.as<T>() + image * x.stride(0);
    std::atomic<float> largest{0};
    std::atomic<bool> bad{false};
    parallel_ranges(per_image, grain, [&](int64_t begin, int64_t end) {
      float mine = 0;
      for (int64_t i = begin; i < end; ++i) {
        const T* line = base + i / lines.inner * lines.outer_stride + i % lines.inner * lines.inner_stride;
        const float m = abs_max(line, lines.length);
        if (!std::isfinite(m)) bad = true;
        mine = std::max(mine, m);
      }
      float seen = largest;
      while (seen < mine && !largest.compare_exchange_weak(seen, mine)) {
      }
    });
    // Below 1e-36 the inverse of a scale would overflow; such an image counts as zero, an error of 1e-36.
    scales[image] = bad ? NAN : largest < 127e-36f ? 0.0f : largest / 127.0f;
  }
}

// `count` lines of `length` values, `stride` apart -> codes `stride_codes` apart. Returns false if one is not finite.
template <class T>
bool quantize_lines(const T* x, int64_t stride, int64_t count, int64_t length, float scale, int8_t* codes,
                    int64_t stride_codes, float* line_scales) {
  if constexpr (std::is_same_v<T, int8_t>) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(codes + i * stride_codes, x + i * stride, size_t(length));
    return true;
  } else {
    const QuantizeRowsArgs<T> args{.x = x,
                                   .ldx = stride,
                                   .rows = count,
                                   .k = length,
                                   .codes = reinterpret_cast<uint8_t*>(codes),
                                   .ld_codes = stride_codes,
                                   .k_padded = length,
                                   .zero = 0,
                                   .scale = scale,
                                   .scales = line_scales};
    if constexpr (std::is_same_v<T, float>) {
      quantize_rows_f32_table.get()(args);
    } else {
      quantize_rows_bf16_table.get()(args);
    }
    return std::all_of(line_scales, line_scales + count, [](float s) { return s == s; });
  }
}

// Rows of x -> rows [left | width | right] of codes.
template <class T>
class RowReader {
 public:
  RowReader(const TensorView& x, int64_t left, int64_t right)
      : x_(x), channels_(x.size(1)), width_(x.size(3)), left_(left), right_(right) {
    scales_ = frame_.take<float>(std::max(channels_, width_));
    planes_ = together() ? nullptr : frame_.take<int8_t>(channels_ * width_);
  }

  bool read(int64_t image, int64_t y, float scale, int8_t* to) {
    const T* from = x_.as<T>() + image * x_.stride(0) + y * x_.stride(2);
    std::memset(to, 0, size_t(left_ * channels_));
    to += left_ * channels_;
    std::memset(to + width_ * channels_, 0, size_t(right_ * channels_));
    if (!(scale > 0)) {  // nothing but zeros, or not finite
      std::memset(to, 0, size_t(width_ * channels_));
      return true;
    }
    if (!together()) {
      const bool good = quantize_lines(from, x_.stride(1), channels_, width_, scale, planes_, width_, scales_);
      transpose_codes(planes_, channels_, width_, to);
      return good;
    }
    if (x_.stride(3) == channels_ || width_ == 1) {
      return quantize_lines(from, 0, 1, width_ * channels_, scale, to, 0, scales_);
    }
    return quantize_lines(from, x_.stride(3), width_, channels_, scale, to, channels_, scales_);
  }

 private:
  bool together() const { return channels_ == 1 ? x_.stride(3) != 1 || width_ == 1 : x_.stride(1) == 1; }

  const TensorView& x_;
  int64_t channels_, width_, left_, right_;
  WorkspaceFrame frame_;
  float* scales_;
  int8_t* planes_;
};

// Which rows of an image some tap of some output reads.
bool row_is_read(int64_t y, const ConvWindow& w) {
  for (int64_t ky = 0; ky < w.kh; ++ky) {
    const int64_t at = y + w.top - ky * w.dilation_y;
    if (at >= 0 && at % w.stride_y == 0 && at / w.stride_y < w.out_height) return true;
  }
  return false;
}

// Copies x into frame. `gather`: for each output the taps of a row one behind the other, instead of the padded row.
template <class T>
void copy_pixels(const TensorView& x, float scale, const ConvWindow& w, bool gather, ConvPixels& pixels,
                 WorkspaceFrame& frame) {
  const int64_t images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t padded = (w.left + width + w.right) * channels;
  const int64_t tap = channels, run = w.kw * channels;
  pixels.row = gather ? w.out_width * run : padded;
  pixels.image = height * pixels.row;
  pixels.pixel = channels;
  pixels.step = gather ? run : w.stride_x * channels;
  pixels.run = w.dilation_x == 1 || w.kw == 1 || gather;
  int8_t* codes = frame.take<int8_t>(images * pixels.image);
  pixels.codes = codes;
  std::atomic<bool>* bad = frame.take<std::atomic<bool>>(images);
  for (int64_t i = 0; i < images; ++i) bad[i] = false;
  const int64_t grain = std::max<int64_t>(1, tuning::kInt8ConvPixelsPerThread / std::max<int64_t>(pixels.row, 1));
  parallel_ranges(images * height, grain, [&](int64_t begin, int64_t end) {
    RowReader<T> reader(x, w.left, w.right);
    WorkspaceFrame own;
    int8_t* row = gather ? own.take<int8_t>(padded) : nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / height, y = i % height;
      if (!row_is_read(y, w)) continue;
      int8_t* to = codes + i * pixels.row;
      if (!reader.read(image, y, std::is_same_v<T, int8_t> ? 1.0f : pixels.scales[image], gather ? row : to)) {
        bad[image] = true;
      }
      if (!gather) continue;
      for (int64_t ox = 0; ox < w.out_width; ++ox) {
        for (int64_t kx = 0; kx < w.kw; ++kx) {
          const int64_t at = (ox * w.stride_x + kx * w.dilation_x) * channels;
          std::memcpy(to + ox * run + kx * tap, row + at, size_t(tap));
        }
      }
    }
  });
  if (scale == 0) return;  // an image that is not finite has no scale already
  for (int64_t i = 0; i < images; ++i) {
    if (bad[i]) {
      pixels.scales[i] = NAN;
      std::memset(codes + i * pixels.image, 0, size_t(pixels.image));
    }
  }
}

}  // namespace

ConvPixels conv_pixels(const TensorView& x, float scale, const ConvWindow& w, WorkspaceFrame& frame) {
  const int64_t images = x.size(0), channels = x.size(1), width = x.size(3);
  const bool together = channels == 1 || x.stride(1) == 1;
  check(together || width == 1 || x.stride(3) == 1, "int8_conv2d",
        "neither the channels of a pixel of x nor the columns of a row lie together; make it channels_last");
  ConvPixels pixels{};
  pixels.scales = frame.take<float>(images);
  std::fill_n(pixels.scales, images, scale);

  const bool ragged = w.quads && w.channels % 4 != 0;
  if (x.dtype == DType::int8 && together && w.left == 0 && w.right == 0 && !ragged) {
    pixels.codes = x.as<int8_t>();
    pixels.image = x.stride(0);
    pixels.row = x.stride(2);
    pixels.pixel = x.stride(3);
    pixels.step = w.stride_x * pixels.pixel;
    pixels.run = w.kw == 1 || (w.dilation_x == 1 && pixels.pixel == channels);
  } else {
    // Where the channels of a tap are no multiple of four, only a run of taps can be read four at a time.
    // And of a kernel one column wide that strides, only the pixels that it reads are kept.
    const bool gather = w.quads && w.groups == 1 && (w.kw == 1 ? w.stride_x > 1 : ragged && w.dilation_x > 1);
    switch (x.dtype) {
      case DType::int8: copy_pixels<int8_t>(x, scale, w, gather, pixels, frame); break;
      case DType::float32:
        if (scale == 0) find_scales<float>(x, pixels.scales);
        copy_pixels<float>(x, scale, w, gather, pixels, frame);
        break;
      default:
        if (scale == 0) find_scales<bf16>(x, pixels.scales);
        copy_pixels<bf16>(x, scale, w, gather, pixels, frame);
    }
  }
  if (!w.quads) {
    const int64_t bytes = channels + 64;
    int8_t* zeros = frame.take<int8_t>(bytes);
    std::memset(zeros, 0, size_t(bytes));
    pixels.zeros = zeros;
  }
  return pixels;
}

}  // namespace lamina
