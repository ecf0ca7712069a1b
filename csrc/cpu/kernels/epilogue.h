// What the ends of all products have in common: values in the formats of a residual and of an output.
#pragma once

#include "cpu/kernels/int8_gemm.h"
#include "cpu/vec/activate.h"

namespace lamina::LAMINA_ISA {
namespace {

// Formats are branches and not templates: they never change within a call, and ten activations times five instruction
// sets are copies enough.
LAMINA_INLINE F32 load_from(const void* data, EpilogueMatrix::Format format, int64_t at, int n) {
  if (format == EpilogueMatrix::f32) return load_up_to(static_cast<const float*>(data) + at, n);
  if (format == EpilogueMatrix::b16) return load_up_to(static_cast<const bf16*>(data) + at, n);
  return load_up_to(static_cast<const int8_t*>(data) + at, n);
}

// data[at, at + n) = y; int8 as codes of y * inverse.
LAMINA_INLINE void store_to(void* data, EpilogueMatrix::Format format, int64_t at, F32 y, F32 inverse, int n) {
  if (format == EpilogueMatrix::f32) return store_up_to(static_cast<float*>(data) + at, y, n);
  if (format == EpilogueMatrix::b16) return store_up_to(static_cast<bf16*>(data) + at, y, n);
  const F32 code = min(max(y * inverse, set1(-127.0f)), set1(127.0f));
  store_codes(static_cast<uint8_t*>(data) + at, code, 0, n);
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
