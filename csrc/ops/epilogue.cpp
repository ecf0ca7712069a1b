#include "ops/epilogue.h"

#include <cstring>

#include "ops/checks.h"

namespace lamina {

Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "relu6") return Activation::relu6;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "quick_gelu") return Activation::quick_gelu;
  if (name == "silu") return Activation::silu;
  if (name == "hardswish") return Activation::hardswish;
  if (name == "tanh") return Activation::tanh;
  fail(op, "activation '", name,
       "' is unknown; use none, relu, relu6, gelu, gelu_tanh, quick_gelu, silu, hardswish or tanh");
}

const float* float_bias(const char* op, const TensorView& bias, int64_t n, WorkspaceFrame& frame) {
  check_dtype(op, "bias", bias, {DType::float32, DType::bfloat16});
  check_shape(op, "bias", bias, {n});
  if (bias.dtype == DType::float32 && bias.is_contiguous()) return bias.as<float>();
  float* copy = frame.take<float>(n);
  for (int64_t i = 0; i < n; ++i) {
    if (bias.dtype == DType::float32) {
      copy[i] = bias.as<float>()[i * bias.stride(0)];
    } else {
      const uint32_t bits = uint32_t(bias.as<bf16>()[i * bias.stride(0)].bits) << 16;
      std::memcpy(&copy[i], &bits, 4);
    }
  }
  return copy;
}

EpilogueMatrix epilogue_matrix(const char* op, const char* what, const TensorView& t, int64_t rows, int64_t n) {
  check_shape(op, what, t, {rows, n});
  check(n <= 1 || t.stride(1) == 1, op, "the rows of ", what, " must be contiguous");
  const auto format = t.dtype == DType::float32    ? EpilogueMatrix::f32
                      : t.dtype == DType::bfloat16 ? EpilogueMatrix::b16
                                                   : EpilogueMatrix::int8;
  return {t.data, t.stride(0), format};
}

EpilogueMatrix part_of(const EpilogueMatrix& m, int64_t row, int64_t column) {
  if (!m.data) return m;
  return {static_cast<char*>(m.data) + (row * m.ld + column) * m.format, m.ld, m.format};
}

}  // namespace lamina
