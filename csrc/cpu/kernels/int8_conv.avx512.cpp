// int8_conv for AVX-512 without VNNI: bytes widen to 16 bits, vpmaddwd adds exact pairs.
#include "cpu/kernels/int8_conv_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kMaxPixels = 7;

// MR pixels x 16 channels -> sums [MR][32]. A vector holds 8 channels x 4 k; the two pair sums of a channel are added
// once, at the end.
template <int MR>
void tile_sums(const Int8ConvArgs& a, const ConvTile& tile, const int8_t* w, int64_t w_stride, int32_t* sums) {
  __m512i acc[MR][2];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_si512();
  w += tile.tap_begin * a.taps_x * (a.length / 4) * w_stride;
  for (int ty = 0; ty < tile.tap_end - tile.tap_begin; ++ty) {
    for (int tx = 0; tx < a.taps_x; ++tx) {
      const int64_t at = ty * a.dilation_y * a.row + tx * a.tap_x;
      for (int64_t k = at; k < at + a.length; k += 4, w += w_stride) {
        const __m512i b0 = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
        const __m512i b1 = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32)));
        LAMINA_UNROLL
        for (int i = 0; i < MR; ++i) {
          int32_t four;
          memcpy(&four, tile.x[i] + k, 4);
          const __m512i x = _mm512_cvtepi8_epi16(_mm256_set1_epi32(four));
          acc[i][0] = _mm512_add_epi32(acc[i][0], _mm512_madd_epi16(x, b0));
          acc[i][1] = _mm512_add_epi32(acc[i][1], _mm512_madd_epi16(x, b1));
        }
      }
    }
  }
  // Even and odd int32 of the two vectors, in channel order.
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    const __m512i sum = _mm512_add_epi32(_mm512_permutex2var_epi32(acc[i][0], even, acc[i][1]),
                                         _mm512_permutex2var_epi32(acc[i][0], odd, acc[i][1]));
    _mm512_storeu_si512(sums + i * kConvPanel, sum);
  }
}

using Sums = void (*)(const Int8ConvArgs&, const ConvTile&, const int8_t*, int64_t, int32_t*);
constexpr Sums kSums[kMaxPixels] = {tile_sums<1>, tile_sums<2>, tile_sums<3>, tile_sums<4>,
                                    tile_sums<5>, tile_sums<6>, tile_sums<7>};

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
