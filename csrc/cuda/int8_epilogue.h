// The end of the int8 GEMMs on GPUs: a few exact sums of one row, channels side by side, to outputs.
//
// The same operations in the same order as on the CPU (cpu/kernels/int8_gemm.h), each rounded once: products and sums
// are spelled so that no compiler contracts them. What comes before the activation, none, relu, relu6 and hardswish,
// and with them the codes of an int8 output, are therefore the same bits on both. The other activations are within the
// error that the op documents.
//
// Compiled by C++ compilers too, for tests without a GPU. Operands' formats and the activation are branches that all
// threads take alike, and not templates: a GEMM takes most of a minute to compile.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cpu/activation.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LAMINA_HOST_DEVICE __host__ __device__ __forceinline__
#define LAMINA_LOOP _Pragma("unroll")
#else
#define LAMINA_HOST_DEVICE inline
#define LAMINA_LOOP
#endif

namespace lamina::cuda {

enum class Format : int { f32, b16, f16, int8 };

constexpr int bytes_of(Format format) { return format == Format::f32 ? 4 : format == Format::int8 ? 1 : 2; }

// Rows of `ld` elements; data is null where there is none.
struct EpilogueMatrix {
  void* data = nullptr;
  int64_t ld = 0;
  Format format = Format::f32;
};

// All pointers are the device's, scalars' too: no launch waits for a value.
struct Int8Epilogue {
  const float* x_scale;  // of row m at m * x_scale_step
  int64_t x_scale_step;  // 0: one for all rows
  const float* w_scale;  // [channels]
  const void* bias;      // [channels] or null
  Format bias_format;
  EpilogueMatrix residual;  // f32, b16 or f16
  Activation activation;
  const float* out_scale;  // of int8 outputs
  EpilogueMatrix out;
};

LAMINA_HOST_DEVICE float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

LAMINA_HOST_DEVICE float sum(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

LAMINA_HOST_DEVICE float inverse_of(float scale) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(1.0f, scale);
#else
  return 1.0f / scale;
#endif
}

// 1 / x to 1 ulp, and 0 where x is above 2^126.
LAMINA_HOST_DEVICE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}

// As the CPU's instructions have it: of two zeros, and of a NaN and a number, the second.
LAMINA_HOST_DEVICE float larger(float a, float b) { return a > b ? a : b; }
LAMINA_HOST_DEVICE float smaller(float a, float b) { return a < b ? a : b; }

constexpr float kLog2E = 1.4426950408889634f;

// x / (1 + 2^-z). For x far below 0 the power is infinite and the result 0.
LAMINA_HOST_DEVICE float gated(float x, float z) { return x * reciprocal(1.0f + exp2f(-z)); }

template <Activation A>
LAMINA_HOST_DEVICE float activate(float x) {
  if constexpr (A == Activation::relu) return larger(0.0f, x);
  if constexpr (A == Activation::relu6) return smaller(6.0f, larger(0.0f, x));
  if constexpr (A == Activation::hardswish) {
    return product(product(larger(-3.0f, x), smaller(6.0f, larger(0.0f, sum(x, 3.0f)))), 1.0f / 6.0f);
  }
  if constexpr (A == Activation::tanh) return 1.0f - 2.0f * reciprocal(1.0f + exp2f(x * (2.0f * kLog2E)));
  // From here on, gates are 0 long before this, and minus infinity times 0 would be NaN.
  const float low = larger(-127.0f, x);
  if constexpr (A == Activation::gelu) return 0.5f * low * (1.0f + erff(low * 0.70710678f));
  if constexpr (A == Activation::gelu_tanh) return gated(low, low * (2.3022082f + 0.10294324f * low * low));
  if constexpr (A == Activation::quick_gelu) return gated(low, low * (1.702f * kLog2E));
  if constexpr (A == Activation::silu) return gated(low, low * kLog2E);
  return x;
}

template <Activation A, int kCount>
LAMINA_HOST_DEVICE void activate_all(float (&y)[kCount]) {
  LAMINA_LOOP
  for (int i = 0; i < kCount; ++i) y[i] = activate<A>(y[i]);
}

template <int kCount>
LAMINA_HOST_DEVICE void activate_all(Activation activation, float (&y)[kCount]) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return activate_all<Activation::relu>(y);
    case Activation::relu6: return activate_all<Activation::relu6>(y);
    case Activation::gelu: return activate_all<Activation::gelu>(y);
    case Activation::gelu_tanh: return activate_all<Activation::gelu_tanh>(y);
    case Activation::quick_gelu: return activate_all<Activation::quick_gelu>(y);
    case Activation::silu: return activate_all<Activation::silu>(y);
    case Activation::hardswish: return activate_all<Activation::hardswish>(y);
    case Activation::tanh: return activate_all<Activation::tanh>(y);
  }
}

// An absent bias counts as 0, as on the CPU: a sum of -0 becomes 0.
LAMINA_HOST_DEVICE float scaled(int32_t total, float w_scale, float x_scale, float bias) {
  return sum(product(product(float(total), w_scale), x_scale), bias);
}

LAMINA_HOST_DEVICE int8_t code_of(float y, float inverse) {
  return int8_t(int(rintf(smaller(larger(product(y, inverse), -127.0f), 127.0f))));
}

#ifdef __CUDACC__

// Whether vectors of `count` elements that start at multiples of it in rows of `ld` can be loaded whole.
LAMINA_HOST_DEVICE bool loads_whole(const void* data, int64_t ld, Format format, int count) {
  const int bytes = bytes_of(format);
  const int vector = bytes * count < 16 ? bytes * count : 16;  // a power of two
  return ((reinterpret_cast<uintptr_t>(data) | uintptr_t(ld * bytes)) & uintptr_t(vector - 1)) == 0;
}

template <int kCount, class Element, int kVectors>
LAMINA_HOST_DEVICE void load_elements(const void* data, const int64_t (&at)[kVectors], bool whole,
                                      Element (&to)[kVectors * kCount]) {
  constexpr int kStep = kCount * sizeof(Element) < 16 ? kCount : 16 / sizeof(Element);
  struct alignas(kStep * sizeof(Element)) Vector {
    Element element[kStep];
  };
  const Element* from = static_cast<const Element*>(data);
  // The branch is around the loops, so that all loads of either are under way at once.
  if (whole) {
    LAMINA_LOOP
    for (int i = 0; i < kVectors * kCount; i += kStep) {
      const Vector some = *reinterpret_cast<const Vector*>(from + at[i / kCount] + i % kCount);
      LAMINA_LOOP
      for (int j = 0; j < kStep; ++j) to[i + j] = some.element[j];
    }
  } else {
    LAMINA_LOOP
    for (int i = 0; i < kVectors * kCount; ++i) to[i] = from[at[i / kCount] + i % kCount];
  }
}

// Vectors of kCount elements, from at[0], at[1], ... on, as floats. whole: loads_whole.
template <int kCount, int kVectors>
LAMINA_HOST_DEVICE void load_floats(const void* data, Format format, const int64_t (&at)[kVectors], bool whole,
                                    float (&to)[kVectors * kCount]) {
  if (format == Format::f32) return load_elements<kCount>(data, at, whole, to);
  uint16_t bits[kVectors * kCount];
  load_elements<kCount>(data, at, whole, bits);
  if (format == Format::b16) {
    LAMINA_LOOP
    for (int i = 0; i < kVectors * kCount; ++i) to[i] = __bfloat162float(__ushort_as_bfloat16(bits[i]));
  } else {
    LAMINA_LOOP
    for (int i = 0; i < kVectors * kCount; ++i) to[i] = __half2float(__ushort_as_half(bits[i]));
  }
}

// Two floats in a 16-bit format, the first in the lower half.
LAMINA_HOST_DEVICE uint32_t packed(float first, float second, Format format) {
  if (format == Format::b16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return uint32_t(__bfloat16_as_ushort(pair.x)) | uint32_t(__bfloat16_as_ushort(pair.y)) << 16;
  }
  const __half2 pair = __floats2half2_rn(first, second);
  return uint32_t(__half_as_ushort(pair.x)) | uint32_t(__half_as_ushort(pair.y)) << 16;
}

#endif

}  // namespace lamina::cuda
