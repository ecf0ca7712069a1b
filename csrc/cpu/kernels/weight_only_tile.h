// The part of weight_only_gemm that every variant shares: bias, activation and the output of one tile.
#pragma once

#include "cpu/kernels/row_tiles.h"
#include "cpu/kernels/weight_only_gemm.h"
#include "cpu/tuning/int8_gemm.h"
#include "cpu/vec/activate.h"

namespace lamina::LAMINA_ISA {
namespace {

template <Activation A, class Out>
void finish_values(const WeightOnlyGemmArgs<Out>& a, const float* values, int64_t row, int rows) {
  for (int c = 0; c < a.channels; c += F32::lanes) {
    const int n = a.channels - c < F32::lanes ? a.channels - c : F32::lanes;
    const F32 bias = a.bias ? load_up_to(a.bias + c, n) : zero();
    for (int r = 0; r < rows; ++r) {
      const F32 y = load(values + r * tuning::kInt8PanelChannels + c) + bias;
      store_up_to(a.out + (row + r) * a.ldo + c, activate<A>(y), n);
    }
  }
}

// values [rows, 64], already scaled, of the rows from `row` on -> out.
template <class Out>
void finish_values(const WeightOnlyGemmArgs<Out>& a, const float* values, int64_t row, int rows) {
  with_activation(a.activation, [&]<Activation A>() { finish_values<A>(a, values, row, rows); });
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
