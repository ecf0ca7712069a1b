// int8_gemm for AVX2, exact: vpmaddubsw on |x| and sign(x) w.
//
// vpmaddubsw multiplies unsigned by signed bytes and saturates each pair sum at 16 bits, which is wrong for codes up to
// 255 (255 * 127 * 2 > 32767). Both operands are symmetric, though: |x| <= 127 and |w| <= 127, and 127 * 127 * 2 =
// 32258 fits. So the offset of the codes is taken off again, the sign of x moves to w, and nothing can saturate. The
// sums then lack what the offset adds; it is put back per channel, so that the epilogue is the same for all.
#include "cpu/kernels/int8_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kMaxRows = 4;
constexpr int kVectors = 2;  // of 8 channels: one panel step of 16 channels

template <int MR>
void tile(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t w_stride, int64_t k_padded,
          const int32_t* compensation, int32_t* sums, int64_t ld_sums) {
  __m256i acc[MR][kVectors];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      acc[i][j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(compensation + 8 * j));
    }
  }
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t k = 0; k < k_padded; k += 4, x += 4, w += w_stride) {
    __m256i b[kVectors];
    LAMINA_UNROLL
    for (int j = 0; j < kVectors; ++j) b[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * j));
    LAMINA_UNROLL
    for (int i = 0; i < MR; ++i) {
      uint32_t four;
      memcpy(&four, x + i * ldx, 4);
      const __m256i a = _mm256_set1_epi32(int32_t(four ^ 0x80808080u));
      const __m256i magnitude = _mm256_abs_epi8(a);
      LAMINA_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(b[j], a));
        acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + i * ld_sums + 8 * j), acc[i][j]);
    }
  }
}

using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int64_t, const int32_t*, int32_t*, int64_t);
constexpr Tile kTiles[kMaxRows] = {tile<1>, tile<2>, tile<3>, tile<4>};

void int8_gemm(const Int8GemmArgs& a) {
  int32_t sums[kMaxRows * tuning::kInt8PanelChannels];
  for_each_panel(a, 0, [&](const int8_t* panel, int64_t first, int channels, int width) {
    for_balanced_tiles(a.rows, kMaxRows, [&](int64_t row, int rows) {
      for (int n = 0; n < width; n += 16) {
        kTiles[rows - 1](a.codes + row * a.ld_codes, a.ld_codes, panel + 4 * n, 4 * width, a.k_padded,
                         a.compensation + first + n, sums + n, width);
      }
      finish_tile(a, sums, {row, first, rows, channels, width});
    });
  });
}

REGISTER_KERNEL(int8_gemm_table, int8_gemm);

}  // namespace
}  // namespace lamina::LAMINA_ISA
