// int8_gemm for AVX-512 without VNNI: bytes widen to 16 bits, vpmaddwd adds pairs of products.
//
// vpmaddubsw would multiply bytes directly, but it saturates pair sums at 16 bits and gives wrong results; 255 * 127 *
// 2 in 32 bits cannot. The codes of six rows are widened once per 256 k, so that one 64-bit broadcast brings four k of
// a row, and a vector of weights, [8 channels][4 k], is widened by its load. A tile of 6 rows x 32 channels keeps 24
// accumulators in registers; the two pair sums of a channel are added once, at the end.
#include "cpu/kernels/int8_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kMaxRows = 6;
constexpr int kPieceK = 256;  // of 64 channels a piece is 16 KiB of weights, half of L1, beside 3 KiB of codes

// pairs [MR][16 NR] += codes [MR][k] times weights [k / 4][8 NR, row stride w_stride][4]
template <int MR, int NR>
void tile(const int16_t* x, const int8_t* w, int64_t w_stride, int k, int32_t* pairs, int64_t ld_pairs) {
  __m512i acc[MR][NR];
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) acc[i][j] = _mm512_loadu_si512(pairs + i * ld_pairs + 16 * j);
  }
  for (; k > 0; k -= 4, x += 4, w += w_stride) {
    __m512i b[NR];
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) {
      b[j] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * j)));
    }
    LAMINA_UNROLL
    for (int i = 0; i < MR; ++i) {
      int64_t four;
      memcpy(&four, x + i * kPieceK, 8);
      const __m512i a = _mm512_set1_epi64(four);
      LAMINA_UNROLL
      for (int j = 0; j < NR; ++j) acc[i][j] = _mm512_add_epi32(acc[i][j], _mm512_madd_epi16(a, b[j]));
    }
  }
  LAMINA_UNROLL
  for (int i = 0; i < MR; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < NR; ++j) _mm512_storeu_si512(pairs + i * ld_pairs + 16 * j, acc[i][j]);
  }
}

using Tile = void (*)(const int16_t*, const int8_t*, int64_t, int, int32_t*, int64_t);

template <int NR>
constexpr Tile kTiles[kMaxRows] = {tile<1, NR>, tile<2, NR>, tile<3, NR>, tile<4, NR>, tile<5, NR>, tile<6, NR>};

void widen(const uint8_t* codes, int k, int16_t* wide) {
  int i = 0;
  for (; i + 32 <= k; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    _mm512_storeu_si512(wide + i, _mm512_cvtepu8_epi16(bytes));
  }
  for (; i < k; ++i) wide[i] = codes[i];
}

// pairs [.., 2 width] -> sums [.., width]
void add_pairs(const int32_t* pairs, int width, int32_t* sums) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int n = 0; n < width; n += 16) {
    const __m512i low = _mm512_loadu_si512(pairs + 2 * n), high = _mm512_loadu_si512(pairs + 2 * n + 16);
    const __m512i sum =
        _mm512_add_epi32(_mm512_permutex2var_epi32(low, even, high), _mm512_permutex2var_epi32(low, odd, high));
    _mm512_storeu_si512(sums + n, sum);
  }
}

void int8_gemm(const Int8GemmArgs& a) {
  alignas(64) int16_t wide[kMaxRows * kPieceK];
  alignas(64) int32_t pairs[kMaxRows * 2 * tuning::kInt8PanelChannels];
  alignas(64) int32_t sums[kMaxRows * tuning::kInt8PanelChannels];
  for_each_panel(a, 0, [&](const int8_t* panel, int64_t first, int channels, int width) {
    for_balanced_tiles(a.rows, kMaxRows, [&](int64_t row, int rows) {
      memset(pairs, 0, size_t(rows) * 2 * width * sizeof(int32_t));
      for (int64_t k = 0; k < a.k_padded; k += kPieceK) {
        const int count = int(a.k_padded - k < kPieceK ? a.k_padded - k : kPieceK);
        for (int r = 0; r < rows; ++r) widen(a.codes + (row + r) * a.ld_codes + k, count, wide + r * kPieceK);
        for (int n = 0; n < width;) {
          const bool four = width - n >= 32;
          const Tile run = four ? kTiles<4>[rows - 1] : kTiles<2>[rows - 1];
          run(wide, panel + k * width + 4 * n, 4 * width, count, pairs + 2 * n, 2 * width);
          n += four ? 32 : 16;
        }
      }
      add_pairs(pairs, rows * width, sums);
      finish_tile(a, sums, {row, first, rows, channels, width});
    });
  });
}

REGISTER_KERNEL(int8_gemm_table, int8_gemm);

}  // namespace
}  // namespace lamina::LAMINA_ISA
