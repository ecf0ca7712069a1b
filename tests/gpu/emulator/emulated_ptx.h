// csrc/cuda/ptx.h on the emulator: the same functions, lane by lane.
#pragma once

#include <cuda_runtime.h>

namespace lamina::cuda {

inline float exp2_approx(float x) { return std::exp2(x); }

inline float bf16_to_float(uint32_t bits) { return __uint_as_float(bits << 16); }
inline uint32_t float_to_bf16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = __float_as_uint(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline float f16_to_float(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400) {
    const float x = float(magnitude) * 0x1p-24f;
    return sign ? -x : x;
  }
  return __uint_as_float(sign | ((magnitude << 13) + 0x38000000));
}
inline uint32_t float_to_f16(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | uint32_t(std::nearbyint(size * 0x1p24f));
  const uint32_t magnitude = bits & 0x7fffffff;
  return sign | ((magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13);
}
inline uint32_t pack_bf16(float low, float high) { return float_to_bf16(low) | float_to_bf16(high) << 16; }
inline uint32_t pack_f16(float low, float high) { return float_to_f16(low) | float_to_f16(high) << 16; }

template <int kBytes>
void copy_async(void* shared, const void* global, bool valid) {
  emulator::start_copy(shared, global, kBytes, valid);
}
inline void copy_async_commit() { emulator::commit_copies(); }
inline void copy_async_wait(int pending) { emulator::wait_for_copies(pending); }

inline void wait_for_the_kernel_before() {}
inline void let_the_next_kernel_start() {}

namespace emulated {

inline const char* row_of(const char (*slots)[emulator::kSlot], int matrix, int row) {
  const char* address;
  memcpy(&address, slots[8 * matrix + row], sizeof address);
  return address;
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  if (uintptr_t(row) % 16) emulator::stop("a row of a matrix is misaligned");
  const auto slots = emulator::exchange(emulator::kLoadMatrix, &row, sizeof row);
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int at_row = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
      memcpy(&pair[i], row_of(slots, m, at_row) + 2 * column, 2);
    }
    r[m] = pair[0] | uint32_t(pair[1]) << 16;
  }
}

template <float (*kToFloat)(uint32_t)>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float as[4][32][2], bs[2][32][2];
  const auto slots = emulator::exchange(emulator::kMultiply, a, sizeof a);
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t words[4];
    memcpy(words, slots[lane], sizeof words);
    for (int i = 0; i < 4; ++i) {
      as[i][lane][0] = kToFloat(words[i] & 0xffff);
      as[i][lane][1] = kToFloat(words[i] >> 16);
    }
  }
  const uint32_t b[2] = {b0, b1};
  const auto others = emulator::exchange(emulator::kMultiply, b, sizeof b);
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t words[2];
    memcpy(words, others[lane], sizeof words);
    for (int i = 0; i < 2; ++i) {
      bs[i][lane][0] = kToFloat(words[i] & 0xffff);
      bs[i][lane][1] = kToFloat(words[i] >> 16);
    }
  }
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row_half = i / 2, column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int half = k / 8, owner = k % 8 / 2;
      sum += double(as[row_half + 2 * half][4 * g + owner][k % 2]) * bs[half][4 * column + owner][k % 2];
    }
    c[i] = float(sum);
  }
}

}  // namespace emulated

inline void load_matrices(uint32_t (&r)[4], const void* row) { emulated::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulated::load_matrices(r, row, true); }

inline uint32_t transpose_matrix(uint32_t x) {
  const auto slots = emulator::exchange(emulator::kMoveMatrix, &x, sizeof x);
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    uint32_t word;
    memcpy(&word, slots[4 * (2 * t + i) + g / 2], sizeof word);
    result |= (g % 2 ? word >> 16 : word & 0xffff) << (16 * i);
  }
  return result;
}

inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::multiply<bf16_to_float>(c, a, b0, b1);
}
inline void multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::multiply<f16_to_float>(c, a, b0, b1);
}

}  // namespace lamina::cuda
