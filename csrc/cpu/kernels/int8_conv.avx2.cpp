// int8_conv for AVX2, exact: vpmaddubsw on |x| and sign(x) w, as in int8_gemm; 128 * 127 * 2 fits 16 bits.
#include "cpu/kernels/int8_conv_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kMaxPixels = 4;
constexpr int kVectors = 2;  // of 8 channels

// MR pixels x 16 channels -> sums [MR][32].
template <int MR>
void tile_sums(const Int8ConvArgs& a, const ConvTile& tile, const int8_t* w, int64_t w_stride, int32_t* sums) {
  __m256i acc[MR][kVectors];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
  const __m256i ones = _mm256_set1_epi16(1);
  w += tile.tap_begin * a.taps_x * (a.length / 4) * w_stride;
  for (int ty = 0; ty < tile.tap_end - tile.tap_begin; ++ty) {
    for (int tx = 0; tx < a.taps_x; ++tx) {
      const int64_t at = ty * a.dilation_y * a.row + tx * a.tap_x;
      for (int64_t k = at; k < at + a.length; k += 4, w += w_stride) {
        __m256i b[kVectors];
        LAMINA_UNROLL
        for (int j = 0; j < kVectors; ++j) b[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * j));
        LAMINA_UNROLL
        for (int i = 0; i < MR; ++i) {
          int32_t four;
          memcpy(&four, tile.x[i] + k, 4);
          const __m256i x = _mm256_set1_epi32(four);
          const __m256i magnitude = _mm256_abs_epi8(x);
          LAMINA_UNROLL
          for (int j = 0; j < kVectors; ++j) {
            const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(b[j], x));
            acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(pairs, ones));
          }
        }
      }
    }
  }
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + i * kConvPanel + 8 * j), acc[i][j]);
    }
  }
}

using Sums = void (*)(const Int8ConvArgs&, const ConvTile&, const int8_t*, int64_t, int32_t*);
constexpr Sums kSums[kMaxPixels] = {tile_sums<1>, tile_sums<2>, tile_sums<3>, tile_sums<4>};

void int8_conv(const Int8ConvArgs& a) {
  int32_t sums[kMaxPixels * kConvPanel];
  for_each_conv_tile(a, kMaxPixels, [&](const ConvTile& tile) {
    for_each_conv_panel(a, 0, a.channels, [&](const int8_t* panel, int64_t first, int channels, int width) {
      for (int n = 0; n < width; n += 16) kSums[tile.count - 1](a, tile, panel + 4 * n, 4 * width, sums + n);
      finish_conv_tile(a.end, tile, sums, first, channels);
    });
  });
}

REGISTER_KERNEL(int8_conv_table, int8_conv);

}  // namespace
}  // namespace lamina::LAMINA_ISA
