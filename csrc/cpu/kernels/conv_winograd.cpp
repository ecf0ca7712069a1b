// Winograd's minimal filtering for 3 x 3 kernels ("Fast Algorithms for Convolutional Neural Networks", Lavin & Gray,
// 2015): tiles of (m + 2)^2 inputs and the weights are transformed, multiplied point by point, which is a matrix
// product over the channels for each of the (m + 2)^2 points, and transformed back to m x m outputs.
//
// F(2x2) takes 16 multiplications where the direct sum takes 36, and is about as exact; F(4x4) takes 36 instead of 144
// and loses about a digit. A block of tiles goes through all three steps before the next one, so that transformed
// inputs stay in L2, and the products of 16 output channels in L1. The sums of a whole row of points are in registers
// together: one dimension of the output transform finds them there, and only m of m + 2 vectors are stored. Inputs lie
// in the order the product reads them, at constant distances from one pointer.
#include "cpu/kernels/conv_winograd.h"

#include "cpu/kernels/conv_tile.h"
#include "cpu/tuning/conv.h"

namespace lamina::LAMINA_ISA {
namespace {

// One dimension of the input transform, B^T d.
LAMINA_INLINE void transform_input(const F32 (&d)[4], F32 (&r)[4]) {
  r[0] = d[0] - d[2];
  r[1] = d[1] + d[2];
  r[2] = d[2] - d[1];
  r[3] = d[1] - d[3];
}

LAMINA_INLINE void transform_input(const F32 (&d)[6], F32 (&r)[6]) {
  const F32 four = set1(4.0f), two = set1(2.0f), less_four = set1(-4.0f), less_five = set1(-5.0f);
  const F32 even = fmadd(less_four, d[2], d[4]), odd = fmadd(less_four, d[1], d[3]);
  r[1] = even + odd;
  r[2] = even - odd;
  const F32 even2 = d[4] - d[2], odd2 = d[3] - d[1];
  r[3] = fmadd(two, odd2, even2);
  r[4] = fmadd(set1(-2.0f), odd2, even2);
  r[0] = fmadd(four, d[0], fmadd(less_five, d[2], d[4]));
  r[5] = fmadd(four, d[1], fmadd(less_five, d[3], d[5]));
}

// One dimension of the output transform, A^T m.
LAMINA_INLINE void transform_output(const F32 (&m)[4], F32 (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

LAMINA_INLINE void transform_output(const F32 (&m)[6], F32 (&y)[4]) {
  const F32 s = m[1] + m[2], d = m[1] - m[2], p = m[3] + m[4], q = m[3] - m[4];
  y[0] = m[0] + s + p;
  y[1] = fmadd(set1(2.0f), q, d);
  y[2] = fmadd(set1(4.0f), p, s);
  y[3] = fmadd(set1(8.0f), q, d) + m[5];
}

// Tiles of a register tile: with 32 registers it has all points of a row, else one point.
template <int M>
constexpr int kGroup = F32::registers < 32 ? kTileRows : (M == 2 ? 7 : 5);

// sums: [M + 2] of one tile and vector of channels; to: [M][16].
template <int M>
LAMINA_INLINE void store_row(const F32 (&sums)[M + 2], float* to) {
  F32 half[M];
  transform_output(sums, half);
  LAMINA_UNROLL
  for (int m = 0; m < M; ++m) store(to + m * 16, half[m]);
}

// The products of TR tiles at the M + 2 points of a row, summed over the channels, for 16 output channels; then the
// first half of the output transform.
//
// x: [channels / 16][TR][M + 2][16]; w: [channels / 16][M + 2][16 channels][16]; to: [TR][M + 2][M][16], of which one
// row of points.
template <int M, int TR>
__attribute__((noinline)) void row_of_points(const float* x, int64_t channels, const float* w, float* to) {
  constexpr int T = M + 2, NV = 16 / F32::lanes, kStep = T * M * 16;
  if constexpr (F32::registers >= 32) {
    F32 acc[TR][T];
    LAMINA_UNROLL
    for (int r = 0; r < TR; ++r) {
      LAMINA_UNROLL
      for (int j = 0; j < T; ++j) acc[r][j] = zero();
    }
    for (int64_t c = 0; c < channels; c += 16, x += TR * T * 16, w += T * 256) {
      const int n = int(channels - c < 16 ? channels - c : 16);
      for (int k = 0; k < n; ++k) {
        LAMINA_UNROLL
        for (int j = 0; j < T; ++j) {
          const F32 b = load(w + (j * 16 + k) * 16);
          __builtin_prefetch(w + (tuning::kConvWinogradAhead * T * 16 + k * T + j) * 16, 0, 2);
          LAMINA_UNROLL
          for (int r = 0; r < TR; ++r) acc[r][j] = fmadd(set1(x[(r * T + j) * 16 + k]), b, acc[r][j]);
        }
      }
    }
    LAMINA_UNROLL
    for (int r = 0; r < TR; ++r) store_row<M>(acc[r], to + r * kStep);
  } else {
    F32 sums[TR][NV][T];
    for (int j = 0; j < T; ++j) {
      F32 acc[TR][NV];
      LAMINA_UNROLL
      for (int r = 0; r < TR; ++r) {
        LAMINA_UNROLL
        for (int v = 0; v < NV; ++v) acc[r][v] = zero();
      }
      const float *p = x + j * 16, *q = w + j * 256;
      for (int64_t c = 0; c < channels; c += 16, p += TR * T * 16, q += T * 256) {
        const int n = int(channels - c < 16 ? channels - c : 16);
        // The lines of a point lie apart, where no hardware prefetcher follows.
        LAMINA_UNROLL
        for (int r = 0; r < TR; ++r) __builtin_prefetch(p + (TR + r) * T * 16);
        for (int k = 0; k < n; ++k) {
          F32 b[NV];
          LAMINA_UNROLL
          for (int v = 0; v < NV; ++v) b[v] = load(q + k * 16 + v * F32::lanes);
          __builtin_prefetch(q + (tuning::kConvWinogradAhead * T * 16 + k) * 16, 0, 2);
          LAMINA_UNROLL
          for (int r = 0; r < TR; ++r) {
            const F32 a = set1(p[r * T * 16 + k]);
            LAMINA_UNROLL
            for (int v = 0; v < NV; ++v) acc[r][v] = fmadd(a, b[v], acc[r][v]);
          }
        }
      }
      LAMINA_UNROLL
      for (int r = 0; r < TR; ++r) {
        LAMINA_UNROLL
        for (int v = 0; v < NV; ++v) sums[r][v][j] = acc[r][v];
      }
    }
    for (int r = 0; r < TR; ++r) {
      for (int v = 0; v < NV; ++v) store_row<M>(sums[r][v], to + r * kStep + v * F32::lanes);
    }
  }
}

using RowOfPoints = void (*)(const float*, int64_t, const float*, float*);

template <int M, int TR>
constexpr RowOfPoints row_if_it_fits() {
  if constexpr (TR <= kGroup<M>) {
    return row_of_points<M, TR>;
  } else {
    return nullptr;  // never asked for
  }
}

template <int M>
constexpr RowOfPoints kRows[7] = {row_if_it_fits<M, 1>(), row_if_it_fits<M, 2>(), row_if_it_fits<M, 3>(),
                                  row_if_it_fits<M, 4>(), row_if_it_fits<M, 5>(), row_if_it_fits<M, 6>(),
                                  row_if_it_fits<M, 7>()};

alignas(64) constexpr float kZeros[16] = {};

// What becomes of at most kWinogradBlock tiles, one block after the other.
template <int M>
class Tiles {
 public:
  Tiles(const ConvWinogradArgs& a)
      : a_(a),
        across_((a.columns + M - 1) / M),
        of_image_((a.rows + M - 1) / M * across_),
        blocks_((a.channels + 15) / 16),
        row_(kWinogradBlock * blocks_ * T * 16),
        inputs_(a.scratch),
        products_(a.scratch + T * row_) {}

  // Tiles [first, first + count) of all; meanwhile the pixels of the `next` tiles behind them are on their way into L2.
  void run(int64_t first, int count, int next) {
    groups_ = (count + kGroup<M> - 1) / kGroup<M>;
    count_ = count;
    place(first, count, tiles_);
    place(first + count, next, next_);
    fetched_ = debt_ = 0;
    next_count_ = next;
    steps_ = groups_ * T * int((a_.end_channel - a_.first_channel + 15) / 16);
    transform_inputs();
    for (int64_t c = a_.first_channel; c < a_.end_channel; c += 16) {
      multiply(c);
      for (int v = 0; v < 16 && c + v < a_.end_channel; v += F32::lanes) finish_pixels(c + v, v);
    }
  }

 private:
  static constexpr int T = M + 2;
  static constexpr int kProducts = T * M * 16;  // floats of a tile

  struct Tile {
    int64_t image, y, x;  // of the first output
  };

  void place(int64_t first, int count, Tile* tiles) const {
    for (int t = 0; t < count; ++t) {
      const int64_t image = (first + t) / of_image_, tile = (first + t) % of_image_;
      tiles[t] = {image, tile / across_ * M, tile % across_ * M};
    }
  }

  // Calls body(first, count) for the tiles of each group: 16 as 5 + 5 + 6, not as 7 + 7 + 2.
  template <class Body>
  LAMINA_INLINE void each_group(const Body& body) const {
    for (int g = 0, first = 0; g < groups_; ++g) {
      const int end = count_ * (g + 1) / groups_;
      body(first, end - first);
      first = end;
    }
  }

  template <bool Whole>
  LAMINA_INLINE void read(const float* from, int64_t y, int64_t x, int n, float* to) const {
    F32 half[T][T];
    LAMINA_UNROLL
    for (int j = 0; j < T; ++j) {
      F32 d[T], r[T];
      LAMINA_UNROLL
      for (int i = 0; i < T; ++i) {
        const float* p = from + i * a_.x_row + j * a_.x_pixel;
        if constexpr (Whole) {
          d[i] = load(p);
        } else {
          const bool inside = y + i >= 0 && y + i < a_.height && x + j >= 0 && x + j < a_.width;
          d[i] = load_up_to(inside ? p : kZeros, n);
        }
      }
      transform_input(d, r);
      LAMINA_UNROLL
      for (int i = 0; i < T; ++i) half[i][j] = r[i];
    }
    LAMINA_UNROLL
    for (int i = 0; i < T; ++i) {
      F32 r[T];
      transform_input(half[i], r);
      LAMINA_UNROLL
      for (int j = 0; j < T; ++j) store(to + i * row_ + j * 16, r[j]);
    }
  }

  void transform_inputs() const {
    each_group([&](int first, int n) {
      for (int t = 0; t < n; ++t) {
        const Tile& tile = tiles_[first + t];
        const int64_t y = tile.y - a_.pad_top, x = tile.x - a_.pad_left, step = n * T * 16;
        const bool inside = y >= 0 && x >= 0 && y + T <= a_.height && x + T <= a_.width;
        const float* from = a_.x + tile.image * a_.x_image + y * a_.x_row + x * a_.x_pixel;
        float* to = inputs_ + (first * blocks_ + t) * T * 16;
        int64_t c = 0;
        if (inside) {
          for (; c + F32::lanes <= a_.channels; c += F32::lanes) {
            read<true>(from + c, y, x, F32::lanes, to + c / 16 * step + c % 16);
          }
        }
        for (; c < a_.channels; c += F32::lanes) {
          const int64_t left = a_.channels - c;
          read<false>(from + c, y, x, int(left < F32::lanes ? left : F32::lanes), to + c / 16 * step + c % 16);
        }
      }
    });
  }

  // The products of 16 output channels from c on.
  void multiply(int64_t c) {
    const int64_t tile = blocks_ * T * 16;
    for (int i = 0; i < T; ++i) {
      const float* w = a_.weights + (c / 16 * T + i) * blocks_ * T * 256;
      const float* x = inputs_ + i * row_;
      float* to = products_ + i * M * 16;
      each_group([&](int first, int n) {
        for (debt_ += next_count_; debt_ >= steps_; debt_ -= steps_) fetch(next_[fetched_++]);
        const RowOfPoints row = kRows<M>[n - 1];
        row(x + first * tile, a_.channels, w, to + first * kProducts);
      });
    }
  }

  // Asks for the pixels of a tile of the next block: for those that it reads and no tile above it has read, and those
  // that it writes, since stores that miss hold up everything behind them. Inline, or g++ takes it for a function
  // without effect and drops the calls.
  LAMINA_INLINE void fetch(const Tile& tile) const {
    const int64_t y = tile.y - a_.pad_top + 2, x = tile.x - a_.pad_left + 2;
    const float* from = a_.x + tile.image * a_.x_image + y * a_.x_row + x * a_.x_pixel;
    const float* to = static_cast<const float*>(a_.to.out) + tile.image * a_.out_image + tile.y * a_.to.out_row +
                      tile.x * a_.to.out_pixel;
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < M; ++j) {
        const float *read = from + i * a_.x_row + j * a_.x_pixel,
                    *written = to + i * a_.to.out_row + j * a_.to.out_pixel;
        for (int64_t c = 0; c < a_.channels; c += 16) __builtin_prefetch(read + c, 0, 2);
        for (int64_t c = a_.first_channel; c < a_.end_channel; c += 16) __builtin_prefetch(written + c, 0, 2);
      }
    }
  }

  // Vector v of the products in `products_` becomes channels from c on of finished pixels.
  void finish_pixels(int64_t c, int v) const {
    const int64_t left = a_.end_channel - c;
    const int n = int(left < F32::lanes ? left : F32::lanes);
    const bool relu = a_.to.activation == Activation::relu, plain = relu || a_.to.activation == Activation::none;
    if (!plain || a_.to.out_is_bf16 || a_.to.residual_is_bf16) return finish_any(c, v, n);
    if (a_.to.residual) return relu ? finish_floats<true, true>(c, v, n) : finish_floats<true, false>(c, v, n);
    return relu ? finish_floats<false, true>(c, v, n) : finish_floats<false, false>(c, v, n);
  }

  // What finish() makes of float32, with no question left to a pixel.
  template <bool Residual, bool Relu>
  void finish_floats(int64_t c, int v, int n) const {
    const F32 bias = a_.to.bias ? load_up_to(a_.to.bias + c, n) : set1(-0.0f);  // which changes no sum
    const int64_t out_row = a_.to.out_row, out_pixel = a_.to.out_pixel;
    const int64_t residual_row = a_.to.residual_row, residual_pixel = a_.to.residual_pixel;
    for (int t = 0; t < count_; ++t) {
      const Tile& tile = tiles_[t];
      F32 out[M][M];
      transform_back(t, v, out);
      const int64_t rows = a_.rows - tile.y, columns = a_.columns - tile.x;
      float* to =
          static_cast<float*>(a_.to.out) + tile.image * a_.out_image + tile.y * out_row + tile.x * out_pixel + c;
      const float* joins = static_cast<const float*>(a_.to.residual) + tile.image * a_.residual_image +
                           tile.y * residual_row + tile.x * residual_pixel + c;
      LAMINA_UNROLL
      for (int i = 0; i < M; ++i) {
        LAMINA_UNROLL
        for (int j = 0; j < M; ++j) {
          F32 y = out[i][j] + bias;
          if (i >= rows || j >= columns) continue;
          if constexpr (Residual) y = y + load_up_to(joins + i * residual_row + j * residual_pixel, n);
          if constexpr (Relu) y = activate<Activation::relu>(y);
          store_up_to(to + i * out_row + j * out_pixel, y, n);
        }
      }
    }
  }

  void finish_any(int64_t c, int v, int n) const {
    ConvOutput to = a_.to;
    const int64_t out_size = to.out_is_bf16 ? 2 : 4, residual_size = to.residual_is_bf16 ? 2 : 4;
    for (int t = 0; t < count_; ++t) {
      const Tile& tile = tiles_[t];
      F32 out[M][M];
      transform_back(t, v, out);
      to.out = static_cast<char*>(a_.to.out) + tile.image * a_.out_image * out_size;
      if (to.residual) {
        to.residual = static_cast<const char*>(a_.to.residual) + tile.image * a_.residual_image * residual_size;
      }
      for (int i = 0; i < M && tile.y + i < a_.rows; ++i) {
        for (int j = 0; j < M && tile.x + j < a_.columns; ++j) finish(to, out[i][j], tile.y + i, tile.x + j, c, n);
      }
    }
  }

  // The second half of the output transform.
  LAMINA_INLINE void transform_back(int t, int v, F32 (&out)[M][M]) const {
    const float* from = products_ + t * kProducts + v;
    LAMINA_UNROLL
    for (int j = 0; j < M; ++j) {
      F32 m[T], r[M];
      LAMINA_UNROLL
      for (int i = 0; i < T; ++i) m[i] = load(from + (i * M + j) * 16);
      transform_output(m, r);
      LAMINA_UNROLL
      for (int i = 0; i < M; ++i) out[i][j] = r[i];
    }
  }

  const ConvWinogradArgs& a_;
  const int64_t across_, of_image_;  // tiles in a row of an image, and in an image
  const int64_t blocks_;             // of 16 input channels
  const int64_t row_;                // floats of `inputs_` from a row of points to the next
  float* const inputs_;              // [T] x the groups, each [blocks][tiles of the group][T][16]
  float* const products_;            // [tiles][T][M][16], of 16 output channels
  Tile tiles_[kWinogradBlock], next_[kWinogradBlock];
  int count_ = 0, groups_ = 0, next_count_ = 0;
  int steps_ = 0, fetched_ = 0, debt_ = 0;  // of `next_`, next_count_ / steps_ tiles are fetched at every step
};

template <int M>
void run(const ConvWinogradArgs& a) {
  Tiles<M> tiles(a);
  const int64_t count = a.end_tile - a.first_tile, blocks = (count + kWinogradBlock - 1) / kWinogradBlock;
  const auto start = [&](int64_t b) { return a.first_tile + count * (b < blocks ? b : blocks) / blocks; };
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = start(b + 1);
    tiles.run(start(b), int(end - start(b)), a.far ? int(start(b + 2) - end) : 0);
  }
}

void conv_winograd(const ConvWinogradArgs& a) { a.tile == 2 ? run<2>(a) : run<4>(a); }

REGISTER_KERNEL(conv_winograd_table, conv_winograd);

}  // namespace
}  // namespace lamina::LAMINA_ISA
