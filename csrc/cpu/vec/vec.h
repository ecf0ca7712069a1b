// The vector vocabulary: one register of floats (F32), one of int32 (I32), one of lane choices (Mask).
//
// A portable kernel is written once on these names and compiled once per ISA; this header picks the register width
// from the flags of that compilation. Everything is forced inline and lives in a namespace named after the ISA, so that
// no copy compiled with AVX-512 can be linked into code for a smaller machine.
//
//   load / store / load_n / store_n   of float, bf16, f16 and (load only) int8; unaligned; _n touches the first
//                                     n < lanes elements only and fills with zero
//   round_even, to_codes              round half to even, the one rounding rule of the library
//   join_codes                        codes of four registers as the bytes of words
//   max, min                          return the second operand when either is NaN
//   transpose, reduce_add_each        of as many registers as one has lanes
//   shift_left, shift_right(I32)      by n < 32 bits; to the right the sign comes in
//   max(I32), abs_bits                order floats by their bits: exact, and a NaN wins over everything
//   multiply_wide, bits_below(I32)    unsigned
//   bits_of_lanes, lanes_of_bits      lane i is bit i
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cpu/dtype.h"

#define LAMINA_INLINE inline __attribute__((always_inline))

// Unrolls a loop over registers, so that an array of them stays in registers.
#define LAMINA_UNROLL _Pragma("GCC unroll 64")

#if defined(__AVX512F__)
#include "cpu/vec/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/vec/vec_avx2.h"
#else
#include "cpu/vec/vec_generic.h"
#endif

namespace lamina::LAMINA_ISA {
namespace {

// -- what every register width shares, built on its header

LAMINA_INLINE F32 operator-(F32 a) { return set1(0.0f) - a; }

// Bits of a bfloat16 nearest to a float, ties to even; a NaN stays a NaN.
LAMINA_INLINE uint16_t bf16_bits(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  if ((b & 0x7fffffffu) > 0x7f800000u) return uint16_t((b >> 16) | 0x40);
  return uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

LAMINA_INLINE float bf16_to_float(bf16 x) {
  const uint32_t b = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &b, 4);
  return f;
}

LAMINA_INLINE float f16_to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  uint32_t b;
  if (rest >= 0x7c00) {
    b = 0x7f800000 | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000 : 0);
  } else if (rest >= 0x400) {
    b = (rest << 13) + (112u << 23);
  } else {
    const float subnormal = float(rest) * 0x1p-24f;
    memcpy(&b, &subnormal, 4);
  }
  b |= sign;
  float f;
  memcpy(&f, &b, 4);
  return f;
}

// Bits of a float16 nearest to a float, ties to even; too large ones become infinite, a NaN stays a NaN.
LAMINA_INLINE uint16_t f16_bits(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  const uint32_t sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00 | (rest >> 13 & 0x3ff));
  if (rest >= 0x47800000) return uint16_t(sign | 0x7c00);
  if (rest < 0x38800000) {
    // Subnormal: adding 0.5 leaves the multiples of 2^-24, rounded to even.
    float f;
    memcpy(&f, &rest, 4);
    f += 0.5f;
    memcpy(&b, &f, 4);
    return uint16_t(sign | (b - 0x3f000000));
  }
  return uint16_t(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

// First n elements, n in [0, lanes]; the rest is zero.
template <class T>
LAMINA_INLINE F32 load_up_to(const T* p, int n) {
  return n >= F32::lanes ? load(p) : load_n(p, n);
}

template <class T>
LAMINA_INLINE void store_up_to(T* p, F32 x, int n) {
  if (n >= F32::lanes) {
    store(p, x);
  } else {
    store_n(p, x, n);
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
