// int8_gemm for AVX-512 without VNNI: bytes widen to 16 bits, vpmaddwd adds exact pairs.
//
// vpmaddubsw would do bytes directly, but it saturates pair sums at 16 bits and gives wrong results; 255 * 127 * 2 in
// 32 bits cannot. One vector holds 8 channels x 4 k; the two pair sums of a channel are added once, at the end.
#include "cpu/kernels/int8_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kMaxRows = 6;
constexpr int kVectors = 2;  // of 8 channels: one panel step of 16 channels

template <int MR>
void tile(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t w_stride, int64_t k_padded, int32_t* sums,
          int64_t ld_sums) {
  __m512i acc[MR][kVectors];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_si512();
  for (int64_t k = 0; k < k_padded; k += 4, x += 4, w += w_stride) {
    __m512i b[kVectors];
    LAMINA_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      b[j] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * j)));
    }
    LAMINA_UNROLL
    for (int i = 0; i < MR; ++i) {
      int32_t four;
      memcpy(&four, x + i * ldx, 4);
      const __m512i a = _mm512_cvtepu8_epi16(_mm256_set1_epi32(four));
      LAMINA_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_add_epi32(acc[i][j], _mm512_madd_epi16(a, b[j]));
    }
  }
  // Even and odd int32 of the two vectors, in channel order.
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    const __m512i sum = _mm512_add_epi32(_mm512_permutex2var_epi32(acc[i][0], even, acc[i][1]),
                                         _mm512_permutex2var_epi32(acc[i][0], odd, acc[i][1]));
    _mm512_storeu_si512(sums + i * ld_sums, sum);
  }
}

using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int64_t, int32_t*, int64_t);
constexpr Tile kTiles[kMaxRows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

void int8_gemm(const Int8GemmArgs& a) {
  int32_t sums[kMaxRows * tuning::kInt8PanelChannels];
  for_each_panel(a, 0, [&](const int8_t* panel, int64_t first, int channels, int width) {
    for_balanced_tiles(a.rows, kMaxRows, [&](int64_t row, int rows) {
      for (int n = 0; n < width; n += 16) {
        kTiles[rows - 1](a.codes + row * a.ld_codes, a.ld_codes, panel + 4 * n, 4 * width, a.k_padded, sums + n, width);
      }
      finish_tile(a, sums, {row, first, rows, channels, width});
    });
  });
}

REGISTER_KERNEL(int8_gemm_table, int8_gemm);

}  // namespace
}  // namespace lamina::LAMINA_ISA
