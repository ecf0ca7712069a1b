// Four floats at a time, whatever the register width: F4 is a register of four, Repeated the same four over and over in
// one register of F32, of which one() gives a lane of each four to all.
#pragma once

#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

typedef float floats4 __attribute__((vector_size(16)));

struct F4 {
  floats4 r;
};

LAMINA_INLINE F4 set1_four(float x) { return {floats4{x, x, x, x}}; }
LAMINA_INLINE F4 set_four(float a, float b, float c, float d) { return {floats4{a, b, c, d}}; }
LAMINA_INLINE F4 load_four(const float* p) {
  F4 x;
  memcpy(&x.r, p, 16);
  return x;
}
LAMINA_INLINE void store_four(float* p, F4 x) { memcpy(p, &x.r, 16); }
LAMINA_INLINE F4 operator+(F4 a, F4 b) { return {a.r + b.r}; }
LAMINA_INLINE F4 fmadd(F4 a, F4 b, F4 c) { return {a.r * b.r + c.r}; }

#if defined(__AVX512F__)

struct Repeated {
  __m512 r;
};
LAMINA_INLINE Repeated repeat_four(const float* p) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))}; }
template <int I>
LAMINA_INLINE F32 one(Repeated x) {
  return {_mm512_permute_ps(x.r, I * 0x55)};
}

#elif defined(__AVX2__)

struct Repeated {
  __m256 r;
};
LAMINA_INLINE Repeated repeat_four(const float* p) { return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))}; }
template <int I>
LAMINA_INLINE F32 one(Repeated x) {
  return {_mm256_permute_ps(x.r, I * 0x55)};
}

#else

struct Repeated {
  floats4 r;
};
LAMINA_INLINE Repeated repeat_four(const float* p) { return {load_four(p).r}; }
template <int I>
LAMINA_INLINE F32 one(Repeated x) {
  return set1(x.r[I]);
}

#endif

}  // namespace
}  // namespace lamina::LAMINA_ISA
