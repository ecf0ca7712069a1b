// int8_pool in plain loops over channels, which compilers vectorize: a maximum of bytes, a sum of bytes in 32 bits.
#include "cpu/kernels/int8_pool.h"

#include "cpu/kernels/epilogue.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kBlock = 128;  // channels at a time

LAMINA_INLINE void take_largest(int8_t* __restrict most, const int8_t* __restrict x, int n) {
  for (int c = 0; c < n; ++c) most[c] = x[c] > most[c] ? x[c] : most[c];
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
          memset(most, -128, sizeof most);
          for_each_pixel(a, x, row, column, [&](const int8_t* pixel) {
            if (n == kBlock) {
              take_largest(most, pixel, kBlock);
            } else {
              take_largest(most, pixel, n);
            }
          });
          memcpy(static_cast<int8_t*>(a.out.data) + at + first, most, size_t(n));
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
