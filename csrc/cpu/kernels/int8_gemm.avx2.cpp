// int8_gemm for AVX2, exact: bytes widen to 16 bits, vpmaddwd adds pairs of products.
//
// vpmaddubsw would multiply bytes directly, but it saturates pair sums at 16 bits, which is wrong for codes up to 255
// (255 * 127 * 2 > 32767); 32 bits hold every pair. The codes of six rows are widened once per 256 k, so that one
// 64-bit broadcast brings four k of a row, and a vector of weights, [4 channels][4 k], is widened by its load. Per 192
// multiply-adds that makes 12 vpmaddwd, 12 additions and two loads that widen. The two pair sums of a channel are added
// once, at the end.
#include "cpu/kernels/int8_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kMaxRows = 6;
constexpr int kFewRows = 2;   // so few leave registers for four vectors of weights instead of two
constexpr int kPieceK = 256;  // of 64 channels a piece is 16 KiB of weights, half of L1, beside 3 KiB of codes

constexpr int vectors(int rows) { return rows <= kFewRows ? 4 : 2; }  // of four channels

// pairs [MR][8 NR] += codes [MR][k] times weights [k / 4][4 NR, row stride w_stride][4]
template <int MR, int NR = vectors(MR)>
void tile(const int16_t* x, const int8_t* w, int64_t w_stride, int k, int32_t* pairs, int64_t ld_pairs) {
  __m256i acc[MR][NR];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) {
      acc[i][j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs + i * ld_pairs + 8 * j));
    }
  }
  for (; k > 0; k -= 4, x += 4, w += w_stride) {
    __m256i b[NR];
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) {
      b[j] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * j)));
    }
    LAMINA_UNROLL
    for (int i = 0; i < MR; ++i) {
      int64_t four;
      memcpy(&four, x + i * kPieceK, 8);
      const __m256i a = _mm256_set1_epi64x(four);
      LAMINA_UNROLL
      for (int j = 0; j < NR; ++j) acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(a, b[j]));
    }
  }
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + i * ld_pairs + 8 * j), acc[i][j]);
    }
  }
}

using Tile = void (*)(const int16_t*, const int8_t*, int64_t, int, int32_t*, int64_t);
constexpr Tile kTiles[kMaxRows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

void widen(const uint8_t* codes, int k, int16_t* wide) {
  int i = 0;
  for (; i + 16 <= k; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(wide + i), _mm256_cvtepu8_epi16(bytes));
  }
  for (; i < k; ++i) wide[i] = codes[i];
}

// pairs [.., 2 width] -> sums [.., width]; eight channels at a time, in their order.
void add_pairs(const int32_t* pairs, int width, int32_t* sums) {
  for (int n = 0; n < width; n += 8) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs + 2 * n));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs + 2 * n + 8));
    const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + n), sum);
  }
}

void int8_gemm(const Int8GemmArgs& a) {
  alignas(64) int16_t wide[kMaxRows * kPieceK];
  alignas(64) int32_t pairs[kMaxRows * 2 * tuning::kInt8PanelChannels];
  for_each_panel(a, 0, [&](const int8_t* panel, int64_t first, int channels, int width) {
    for_balanced_tiles(a.rows, kMaxRows, [&](int64_t row, int rows) {
      memset(pairs, 0, size_t(rows) * 2 * width * sizeof(int32_t));
      for (int64_t k = 0; k < a.k_padded; k += kPieceK) {
        const int count = int(a.k_padded - k < kPieceK ? a.k_padded - k : kPieceK);
        for (int r = 0; r < rows; ++r) widen(a.codes + (row + r) * a.ld_codes + k, count, wide + r * kPieceK);
        for (int n = 0; n < width; n += 4 * vectors(rows)) {
          kTiles[rows - 1](wide, panel + k * width + 4 * n, 4 * width, count, pairs + 2 * n, 2 * width);
        }
      }
      int32_t sums[kMaxRows * tuning::kInt8PanelChannels];
      add_pairs(pairs, rows * width, sums);
      finish_tile(a, sums, {row, first, rows, channels, width});
    });
  });
}

REGISTER_KERNEL(int8_gemm_table, int8_gemm);

}  // namespace
}  // namespace lamina::LAMINA_ISA
