// int8_pool in plain loops over channels, which compilers vectorize: a maximum of bytes, a sum of bytes in 32 bits. The
// loops over whole blocks have a fixed length, and those of the maximum take up to three pixels of a row in one go.
#include "cpu/kernels/int8_pool.h"

#include "cpu/kernels/epilogue.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kBlock = 64;  // channels at a time

template <int kPixels>
LAMINA_INLINE void take_largest(int8_t* __restrict most, const int8_t* __restrict x, int64_t step, int n) {
  for (int c = 0; c < n; ++c) {
    int8_t largest = most[c];
    for (int i = 0; i < kPixels; ++i) largest = x[i * step + c] > largest ? x[i * step + c] : largest;
    most[c] = largest;
  }
}

// The largest codes of a window, one row of it after the other.
LAMINA_INLINE void take_window(const Int8PoolArgs& a, const int8_t* image, const PoolWindow& row,
                               const PoolWindow& column, int8_t* most, int n) {
  const int64_t step = a.step_x * a.x.column;
  for (int ky = 0; ky < row.count; ++ky) {
    const int8_t* x = image + (row.first + ky * a.step_y) * a.x.row + column.first * a.x.column;
    int left = column.count;
    for (; left >= 3; left -= 3, x += 3 * step) take_largest<3>(most, x, step, n);
    if (left == 2) take_largest<2>(most, x, step, n);
    if (left == 1) take_largest<1>(most, x, step, n);
  }
}

LAMINA_INLINE void add(int32_t* __restrict sums, const int8_t* __restrict x, int n) {
  for (int c = 0; c < n; ++c) sums[c] += x[c];
}

// Calls body(pixel) for the pixels of a window.
template <class Body>
LAMINA_INLINE void for_each_pixel(const Int8PoolArgs& a, const int8_t* image, const PoolWindow& row,
                                  const PoolWindow& column, const Body& body) {
  for (int ky = 0; ky < row.count; ++ky) {
    const int8_t* x = image + (row.first + ky * a.step_y) * a.x.row + column.first * a.x.column;
    for (int kx = 0; kx < column.count; ++kx, x += a.step_x * a.x.column) body(x);
  }
}

void int8_pool(const Int8PoolArgs& a) {
  alignas(64) int8_t most[kBlock];
  alignas(64) int32_t sums[kBlock];
  for (int64_t r = a.row_begin; r < a.row_end; ++r) {
    const int64_t image = r / a.out_height, y = r % a.out_height;
    const PoolWindow& row = a.rows[y];
    for (int64_t ox = 0; ox < a.out_width; ++ox) {
      const PoolWindow& column = a.columns[ox];
      const int64_t at = image * a.out.image + y * a.out.row + ox * a.out.column;
      for (int64_t first = 0; first < a.channels; first += kBlock) {
        const int n = int(a.channels - first < kBlock ? a.channels - first : kBlock);
        const int8_t* x = static_cast<const int8_t*>(a.x.data) + image * a.x.image + first;
        if (a.largest) {
          int8_t* to = static_cast<int8_t*>(a.out.data) + at + first;
          memset(most, -128, sizeof most);
          if (n == kBlock) {
            take_window(a, x, row, column, most, kBlock);
            memcpy(to, most, kBlock);
          } else {
            take_window(a, x, row, column, most, n);
            memcpy(to, most, size_t(n));
          }
          continue;
        }
        memset(sums, 0, sizeof sums);
        for_each_pixel(a, x, row, column, [&](const int8_t* pixel) {
          if (n == kBlock) {
            add(sums, pixel, kBlock);
          } else {
            add(sums, pixel, n);
          }
        });
        const int divisor = a.divisor ? a.divisor : row.divisor * column.divisor;
        const F32 factor = set1(a.factor / float(divisor));
        for (int c = 0; c < n; c += F32::lanes) {
          const F32 mean = to_float(load_i32(sums + c)) * factor;
          store_to(a.out.data, a.out.format, at + first + c, mean, set1(1.0f), n - c < F32::lanes ? n - c : F32::lanes);
        }
      }
    }
  }
}

REGISTER_KERNEL(int8_pool_table, int8_pool);

}  // namespace
}  // namespace lamina::LAMINA_ISA
