// weight_only_gemm on vpdpbusd: floats as 24-bit fixed point, three bytes that multiply the codes exactly.
//
// The instruction does 64 byte products a cycle and needs no conversion of weights, where float32 FMA does 16 and needs
// three more instructions for each register of weights. So a row of x is scaled by the power of two that brings its
// largest value just below 2^23 and rounded to integers q, an error of at most 2^-23 of that largest value: what a
// float32 sum of such products may lose anyway. q is split into three signed digits, q = 65536 d2 + 256 d1 + d0, all
// products are summed exactly in int32, and the three sums of an output meet in the epilogue.
//
// int8: three digit rows are three rows of an ordinary int8 product, with an offset of 128 as in int8_gemm.h.
// int4: the instruction's unsigned operand is the weight, code + 8 as it lies in memory, so the offset of 8 costs one
//   addition of -8 sum(q) for a block of 32 inputs, known per row. |sum q code| <= 8355711 * 8 * 32 < 2^31: the sum of
//   a block fits int32 with all three digits in it, and only then becomes a float, times the scale of its group.
#include "cpu/kernels/weight_only_gemm.h"
#include "cpu/kernels/weight_only_tile.h"
#include "cpu/tuning/weight_only_gemm.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kPanel = tuning::kInt8PanelChannels;
constexpr int kDigits = 3;
// The largest integer of three digits in [-128, 127] whose negative has three as well: 0x7f7f7f.
constexpr float kLargest = 8355711.0f;

// A prepared row: a record for each block of 32 inputs, then the row's scale. A record has the block's digits, from the
// highest to the lowest, 32 bytes each, and -8 sum(q) as int32. All that a step reads is at a constant distance from
// one pointer a row: eight rows would have too many pointers otherwise.
constexpr int kRecord = 128;
constexpr int kDigitStep = kInt4Block;
constexpr int kSumAt = kDigits * kDigitStep;

LAMINA_INLINE int64_t blocks_of(int64_t k) { return (k + kInt4Block - 1) / kInt4Block; }

// acc += a (unsigned bytes) . b (signed bytes), four at a time. Inline assembly, since GCC 12 spills the accumulators
// of a large tile when they pass through the intrinsic.
LAMINA_INLINE void dot4(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}
LAMINA_INLINE void dot4(__m512i& acc, __m512i a, const char* four_bytes) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(a), "m"(*reinterpret_cast<const int32_t*>(four_bytes)));
}
LAMINA_INLINE __m512i broadcast4(const char* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}
LAMINA_INLINE float load_float(const char* p) {
  float x;
  memcpy(&x, p, 4);
  return x;
}

// 2^e with the largest e up to 127 for which largest * 2^e <= kLargest, and its inverse.
LAMINA_INLINE void fixed_point(float largest, float& factor, float& inverse) {
  uint32_t bits;
  memcpy(&bits, &largest, 4);
  const int exponent = int(bits >> 23) - 127;
  int e = 22 - exponent;
  if (e > 126) e = 126;
  const uint32_t factor_bits = uint32_t(e + 127) << 23, inverse_bits = uint32_t(127 - e) << 23;
  memcpy(&factor, &factor_bits, 4);
  memcpy(&inverse, &inverse_bits, 4);
  if (largest * factor > kLargest) {
    factor *= 0.5f;
    inverse *= 2.0f;
  }
}

template <class T>
float row_abs_max(const T* x, int64_t k) {
  I32 m[4] = {set1_i32(0), set1_i32(0), set1_i32(0), set1_i32(0)};
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    LAMINA_UNROLL
    for (int c = 0; c < 4; ++c) m[c] = max(m[c], abs_bits(load(x + i + 16 * c)));
  }
  for (; i < k; i += 16) m[0] = max(m[0], abs_bits(load_up_to(x + i, int(k - i < 16 ? k - i : 16))));
  const int32_t bits = reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <class T>
void weight_only_rows(const WeightOnlyRowsArgs<T>& a) {
  // 0x80 in each digit makes them unsigned: for int8 they stay so, for int4 they become signed again.
  const __m512i offset = _mm512_set1_epi32(0x808080);
  const __m512i flip = _mm512_set1_epi32(a.group ? 0x808080 : 0);
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = a.x + row * a.ldx;
    char* to = a.prepared + row * weight_only_row_bytes(a.k);
    const float largest = row_abs_max(x, a.k);
    const bool finite = largest - largest == 0.0f;
    float factor, inverse;
    fixed_point(finite ? largest : 1.0f, factor, inverse);
    for (int64_t i = 0; i < a.k; i += kInt4Block, to += kRecord) {
      __m512i total = _mm512_setzero_si512();
      LAMINA_UNROLL
      for (int half = 0; half < kInt4Block; half += 16) {
        const int64_t left = a.k - i - half;
        const F32 v = left > 0 ? load_up_to(x + i + half, int(left < 16 ? left : 16)) : zero();
        const __m512i q = _mm512_cvtps_epi32((v * set1(factor)).r);
        total = _mm512_add_epi32(total, q);
        __m512i digits = _mm512_xor_si512(_mm512_add_epi32(q, offset), flip);
        LAMINA_UNROLL
        for (int d = kDigits - 1; d >= 0; --d, digits = _mm512_srli_epi32(digits, 8)) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d * kDigitStep + half), _mm512_cvtepi32_epi8(digits));
        }
      }
      const int32_t sum = -8 * _mm512_reduce_add_epi32(total);
      memcpy(to + kSumAt, &sum, 4);
    }
    // A row that holds NaN or infinity comes out as NaN, not as numbers of some sign.
    const float scale = finite ? inverse : largest - largest;
    memcpy(to, &scale, 4);
  }
}

// -- int8: a tile of up to 2 rows (6 rows of digits) x 64 channels, sums in registers over the whole of K

template <int R, int NV>
LAMINA_INLINE void step_int8(__m512i (&acc)[kDigits * R][NV], const char* x, int64_t row_bytes, const uint8_t* w) {
  __m512i b[NV];
  LAMINA_UNROLL
  for (int j = 0; j < NV; ++j) b[j] = _mm512_loadu_si512(w + 64 * j);
  LAMINA_UNROLL
  for (int i = 0; i < kDigits * R; ++i) {
    const __m512i a = broadcast4(x + i / kDigits * row_bytes + i % kDigits * kDigitStep);
    LAMINA_UNROLL
    for (int j = 0; j < NV; ++j) dot4(acc[i][j], a, b[j]);
  }
}

// values [R, 16 NV], row stride kPanel: scaled by the row and the channel. `stream`: the panel is not in L2 yet.
template <int R, int NV>
__attribute__((noinline)) void tile_int8(const char* x, int64_t k, const uint8_t* w, const int32_t* compensation,
                                         const float* w_scales, int channels, float* values, bool stream) {
  const int64_t row_bytes = weight_only_row_bytes(k);
  const char* scales = x + blocks_of(k) * kRecord;
  __m512i acc[kDigits * R][NV];
  LAMINA_UNROLL
  for (int i = 0; i < kDigits * R; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_setzero_si512();
  }
  int64_t left = k;
  for (; left >= kInt4Block; left -= kInt4Block, x += kRecord) {
    LAMINA_UNROLL
    for (int u = 0; u < kInt4Block / 4; ++u, w += 64 * NV) {
      if (stream) {
        LAMINA_UNROLL
        for (int line = 0; line < NV; ++line) {
          _mm_prefetch(reinterpret_cast<const char*>(w) + tuning::kWeightOnlyAhead + 64 * line, _MM_HINT_T1);
        }
      }
      step_int8<R, NV>(acc, x + 4 * u, row_bytes, w);
    }
  }
  for (; left > 0; left -= 4, x += 4, w += 64 * NV) step_int8<R, NV>(acc, x, row_bytes, w);
  LAMINA_UNROLL
  for (int j = 0; j < NV; ++j) {
    const __m512i offset = _mm512_loadu_si512(compensation + 16 * j);
    const int n = channels - 16 * j;
    const __m512 w_scale = (n > 0 ? load_up_to(w_scales + 16 * j, n < 16 ? n : 16) : zero()).r;
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      __m512 sum = _mm512_setzero_ps();
      LAMINA_UNROLL
      for (int d = 0; d < kDigits; ++d) {
        const __m512i exact = _mm512_sub_epi32(acc[kDigits * r + d][j], offset);
        sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(exact));
      }
      // The row's scale first: the product of the two scales might be too small for float32.
      const __m512 scale = _mm512_set1_ps(load_float(scales + r * row_bytes));
      _mm512_storeu_ps(values + r * kPanel + 16 * j, _mm512_mul_ps(_mm512_mul_ps(sum, scale), w_scale));
    }
  }
}

using TileInt8 = void (*)(const char*, int64_t, const uint8_t*, const int32_t*, const float*, int, float*, bool);
constexpr TileInt8 kTilesInt8[2][4] = {{tile_int8<1, 1>, tile_int8<1, 2>, tile_int8<1, 3>, tile_int8<1, 4>},
                                       {tile_int8<2, 1>, tile_int8<2, 2>, tile_int8<2, 3>, tile_int8<2, 4>}};

// -- int4: a tile of one row x 4 slices, or two rows x 2 slices; a register for each digit, row and slice

// values [R, 16 S], row stride kPanel: scaled by the group and the row. `stream`: the slices are not in L2 yet.
template <int R, int S>
__attribute__((noinline)) void tile_int4(const char* x, int64_t k, int group, const uint8_t* slice, int64_t slice_bytes,
                                         float* values, bool stream) {
  const int64_t row_bytes = weight_only_row_bytes(k), blocks = blocks_of(k), group_blocks = group / kInt4Block;
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 acc[R][S];
  LAMINA_UNROLL
  for (int i = 0; i < R * S; ++i) acc[i / S][i % S] = _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks;) {
    const uint8_t* scales = slice;
    slice += kInt4ScaleBytes;
    const int64_t end = block + group_blocks < blocks ? block + group_blocks : blocks;
    for (; block < end; ++block, slice += kInt4BlockBytes, x += kRecord) {
      if (stream) {
        LAMINA_UNROLL
        for (int line = 0; line < 5 * S; ++line) {
          const uint8_t* ahead = slice + line / 5 * slice_bytes + line % 5 * 64 + tuning::kWeightOnlyAheadInt4;
          _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
        }
      }
      __m512i sums[R][kDigits][S];
      LAMINA_UNROLL
      for (int i = 0; i < R * kDigits * S; ++i) sums[i / S / kDigits][i / S % kDigits][i % S] = _mm512_setzero_si512();
      LAMINA_UNROLL
      for (int j = 0; j < kInt4Block / 4; ++j) {
        __m512i w[S];
        LAMINA_UNROLL
        for (int s = 0; s < S; ++s) {
          const __m512i two = _mm512_loadu_si512(slice + s * slice_bytes + 64 * (j / 2));
          w[s] = _mm512_and_si512(j % 2 ? _mm512_srli_epi16(two, 4) : two, nibble);
        }
        LAMINA_UNROLL
        for (int i = 0; i < R * kDigits; ++i) {
          const __m512i v = broadcast4(x + i / kDigits * row_bytes + i % kDigits * kDigitStep + 4 * j);
          LAMINA_UNROLL
          for (int s = 0; s < S; ++s) dot4(sums[i / kDigits][i % kDigits][s], w[s], v);
        }
      }
      LAMINA_UNROLL
      for (int s = 0; s < S; ++s) {
        const __m512 scale = load(reinterpret_cast<const bf16*>(scales + s * slice_bytes)).r;
        LAMINA_UNROLL
        for (int r = 0; r < R; ++r) {
          __m512i sum = broadcast4(x + r * row_bytes + kSumAt);
          sum = _mm512_add_epi32(sum, sums[r][2][s]);
          sum = _mm512_add_epi32(sum, _mm512_slli_epi32(sums[r][1][s], 8));
          sum = _mm512_add_epi32(sum, _mm512_slli_epi32(sums[r][0][s], 16));
          acc[r][s] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[r][s]);
        }
      }
    }
  }
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) {
    const __m512 scale = _mm512_set1_ps(load_float(x + r * row_bytes));
    LAMINA_UNROLL
    for (int s = 0; s < S; ++s) {
      _mm512_storeu_ps(values + r * kPanel + kInt4Slice * s, _mm512_mul_ps(acc[r][s], scale));
    }
  }
}

using TileInt4 = void (*)(const char*, int64_t, int, const uint8_t*, int64_t, float*, bool);
constexpr TileInt4 kRowInt4[4] = {tile_int4<1, 1>, tile_int4<1, 2>, tile_int4<1, 3>, tile_int4<1, 4>};
constexpr TileInt4 kTwoRowsInt4[2] = {tile_int4<2, 1>, tile_int4<2, 2>};

constexpr int kMaxRows = 2;

template <class Out>
void weight_only_gemm(const WeightOnlyGemmArgs<Out>& a) {
  alignas(64) float values[kMaxRows * kPanel];
  const int64_t row_bytes = weight_only_row_bytes(a.k);
  const int64_t blocks = blocks_of(a.k), group_blocks = a.group ? a.group / kInt4Block : 1;
  const int64_t groups = (blocks + group_blocks - 1) / group_blocks;
  const int64_t slice_bytes = groups * kInt4ScaleBytes + blocks * kInt4BlockBytes;
  const int slices = a.width / kInt4Slice;
  for_balanced_tiles(a.rows, kMaxRows, [&](int64_t row, int rows) {
    const char* x = a.prepared + row * row_bytes;
    // The first tile waits for memory; the others find the panel in L2.
    const bool stream = row == 0;
    if (!a.group) {
      kTilesInt8[rows - 1][slices - 1](x, a.k, a.panel, a.compensation, a.w_scales, a.channels, values, stream);
    } else if (rows == 1) {
      kRowInt4[slices - 1](x, a.k, a.group, a.panel, slice_bytes, values, stream);
    } else {
      for (int s = 0; s < slices; s += 2) {
        const TileInt4 tile = kTwoRowsInt4[slices - s > 1];
        tile(x, a.k, a.group, a.panel + s * slice_bytes, slice_bytes, values + s * kInt4Slice, stream);
      }
    }
    finish_values(a, values, row, rows);
  });
}

REGISTER_KERNEL(weight_only_rows_f32_table, weight_only_rows<float>);
REGISTER_KERNEL(weight_only_rows_bf16_table, weight_only_rows<bf16>);
REGISTER_KERNEL(weight_only_gemm_f32_table, weight_only_gemm<float>);
REGISTER_KERNEL(weight_only_gemm_bf16_table, weight_only_gemm<bf16>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
