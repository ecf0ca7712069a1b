// Winograd's minimal filtering for 3 x 3 kernels ("Fast Algorithms for Convolutional Neural Networks", Lavin & Gray,
// 2015): tiles of (m + 2)^2 inputs and the weights are transformed, multiplied point by point, which is a matrix
// product over the channels for each of the (m + 2)^2 points, and transformed back to m x m outputs.
//
// F(2x2) takes 16 multiplications where the direct sum takes 36, and is about as exact; F(4x4) takes 36 instead of 144
// and loses about a digit. A block of tiles goes through all three steps before the next one: transformed inputs and
// products stay in L2. The rows of a point are padded by a line, or points would lie 4096 bytes apart and fight for the
// same sets of L1.
#include "cpu/kernels/conv_winograd.h"

#include "cpu/kernels/conv_tile.h"

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

alignas(64) constexpr float kZeros[16] = {};

// A block of at most kWinogradBlock tiles of the grid, in the order of the output.
template <int M>
struct Block {
  static constexpr int T = M + 2;

  const ConvWinogradArgs& a;
  int64_t across;        // tiles in a row of the grid
  int64_t row, product;  // floats from a tile to the next, in `inputs` and in `products`
  float* inputs;         // [T * T][tiles][row], a line between points
  float* products;       // [T * T][tiles][product]

  int64_t input_point() const { return kWinogradBlock * row + 16; }
  int64_t product_point() const { return kWinogradBlock * product + 16; }

  template <bool Whole>
  LAMINA_INLINE void read(int64_t y, int64_t x, int64_t c, int n, float* to) const {
    const float* from = a.x + y * a.x_row + x * a.x_pixel + c;
    F32 half[T][T];
    LAMINA_UNROLL
    for (int j = 0; j < T; ++j) {
      F32 d[T], r[T];
      LAMINA_UNROLL
      for (int i = 0; i < T; ++i) {
        if constexpr (Whole) {
          d[i] = load(from + i * a.x_row + j * a.x_pixel);
        } else {
          const bool inside = y + i >= 0 && y + i < a.height && x + j >= 0 && x + j < a.width;
          d[i] = inside ? load_up_to(from + i * a.x_row + j * a.x_pixel, n) : load(kZeros);
        }
      }
      transform_input(d, r);
      LAMINA_UNROLL
      for (int i = 0; i < T; ++i) half[i][j] = r[i];
    }
    const int64_t point = input_point();
    LAMINA_UNROLL
    for (int i = 0; i < T; ++i) {
      F32 r[T];
      transform_input(half[i], r);
      LAMINA_UNROLL
      for (int j = 0; j < T; ++j) store(to + (i * T + j) * point, r[j]);
    }
  }

  void transform_inputs(int64_t first, int count) const {
    for (int t = 0; t < count; ++t) {
      const int64_t y = (first + t) / across * M - a.pad_top, x = (first + t) % across * M - a.pad_left;
      const bool inside = y >= 0 && x >= 0 && y + T <= a.height && x + T <= a.width;
      float* to = inputs + t * row;
      int64_t c = 0;
      if (inside) {
        for (; c + F32::lanes <= a.channels; c += F32::lanes) read<true>(y, x, c, F32::lanes, to + c);
      }
      for (; c < a.channels; c += F32::lanes) {
        const int64_t left = a.channels - c;
        read<false>(y, x, c, int(left < F32::lanes ? left : F32::lanes), to + c);
      }
    }
  }

  void multiply(int count) const {
    const int64_t start = 0, padded = conv_panel_floats(a.out_channels);
    for (int point = 0; point < T * T; ++point) {
      for (int64_t c = a.first_channel; c < a.end_channel; c += kConvPanel) {
        const int width = a.out_channels - c > 16 ? kConvPanel : 16;
        const float* w = a.weights + (point * padded + c) * a.channels;
        const float* x = inputs + point * input_point();
        float* sums = products + point * product_point() + c - a.first_channel;
        balanced(count, [&](int64_t t, int rows) {
          panel_tile(rows, x + t * row, row, 1, &start, a.channels, w, width, sums + t * product, product);
        });
      }
    }
  }

  void transform_outputs(int64_t first, int count) const {
    const int64_t point = product_point();
    for (int t = 0; t < count; ++t) {
      const int64_t y = (first + t) / across * M, x = (first + t) % across * M;
      const int rows = int(a.rows - y < M ? a.rows - y : M), columns = int(a.columns - x < M ? a.columns - x : M);
      for (int64_t c = a.first_channel; c < a.end_channel; c += F32::lanes) {
        const float* from = products + t * product + c - a.first_channel;
        F32 half[M][T], out[M][M];
        LAMINA_UNROLL
        for (int j = 0; j < T; ++j) {
          F32 m[T], r[M];
          LAMINA_UNROLL
          for (int i = 0; i < T; ++i) m[i] = load(from + (i * T + j) * point);
          transform_output(m, r);
          LAMINA_UNROLL
          for (int i = 0; i < M; ++i) half[i][j] = r[i];
        }
        LAMINA_UNROLL
        for (int i = 0; i < M; ++i) transform_output(half[i], out[i]);
        const int64_t left = a.end_channel - c;
        const int n = int(left < F32::lanes ? left : F32::lanes);
        for (int i = 0; i < rows; ++i) {
          for (int j = 0; j < columns; ++j) finish(a.to, out[i][j], y + i, x + j, c, n);
        }
      }
    }
  }
};

template <int M>
void run(const ConvWinogradArgs& a) {
  constexpr int T = M + 2;
  Block<M> block = {.a = a,
                    .across = (a.columns + M - 1) / M,
                    .row = conv_winograd_row(a.channels),
                    .product = conv_winograd_row(a.end_channel - a.first_channel),
                    .inputs = a.scratch,
                    .products = nullptr};
  block.products = a.scratch + T * T * block.input_point();
  const int64_t tiles = (a.rows + M - 1) / M * block.across;
  const int64_t blocks = (tiles + kWinogradBlock - 1) / kWinogradBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = tiles * b / blocks;
    const int count = int(tiles * (b + 1) / blocks - first);
    block.transform_inputs(first, count);
    block.multiply(count);
    block.transform_outputs(first, count);
  }
}

void conv_winograd(const ConvWinogradArgs& a) { a.tile == 2 ? run<2>(a) : run<4>(a); }

REGISTER_KERNEL(conv_winograd_table, conv_winograd);

}  // namespace
}  // namespace lamina::LAMINA_ISA
