// The part of int8_gemm that every ISA shares: its panels, and the epilogue of one tile.
#pragma once

#include "cpu/kernels/epilogue.h"
#include "cpu/kernels/int8_gemm.h"
#include "cpu/kernels/row_tiles.h"
#include "cpu/tuning/int8_gemm.h"

namespace lamina::LAMINA_ISA {
namespace {

// Where a block of sums [rows, width] belongs: rows from `row` on, channels from `first` on, `channels` of them.
struct Block {
  int64_t row, first;
  int rows, channels, width;
};

// kPlain: outputs are floats in whole vectors, and there is no residual.
template <Activation A, bool kPlain>
void finish_rows(const Int8GemmArgs& a, const int32_t* sums, const Block& b) {
  // By value: a store of floats may change anything that is only referred to.
  const EpilogueMatrix out = a.out, residual = a.residual;
  const float* const x_scales = a.x_scales + b.row;
  const F32 inverse = set1(a.out_inverse);
  const int rows = b.rows, width = b.width, channels = b.channels;
  for (int c = 0; c < channels; c += F32::lanes) {
    const int n = kPlain || channels - c >= F32::lanes ? F32::lanes : channels - c;
    const int64_t channel = b.first + c;
    const I32 compensation = load_i32(a.compensation + channel);
    const F32 w_scale = load_up_to(a.w_scales + channel, n);
    const F32 bias = a.bias ? load_up_to(a.bias + channel, n) : zero();
    int64_t at = b.row * out.ld + channel, residual_at = b.row * residual.ld + channel;
    const int32_t* sum = sums + c;
    for (int r = 0; r < rows; ++r) {
      F32 y = to_float(load_i32(sum) - compensation) * w_scale * set1(x_scales[r]) + bias;
      if constexpr (kPlain) {
        store(static_cast<float*>(out.data) + at, activate<A>(y));
      } else {
        if (residual.data) y = y + load_from(residual.data, residual.format, residual_at, n);
        store_to(out.data, out.format, at, activate<A>(y), inverse, n);
      }
      sum += width;
      at += out.ld;
      residual_at += residual.ld;
    }
  }
}

// sums [b.rows, b.width] -> out.
void finish_tile(const Int8GemmArgs& a, const int32_t* sums, const Block& b) {
  const bool plain = a.out.format == EpilogueMatrix::f32 && !a.residual.data && b.channels % F32::lanes == 0;
  with_activation(a.activation, [&]<Activation A>() {
    if (plain) {
      finish_rows<A, true>(a, sums, b);
    } else {
      finish_rows<A, false>(a, sums, b);
    }
  });
}

// Calls body(panel's weights, first channel, channels, width) for every panel from channel `start` on.
template <class Body>
LAMINA_INLINE void for_each_panel(const Int8GemmArgs& a, int64_t start, const Body& body) {
  for (int64_t first = start; first < a.channels; first += tuning::kInt8PanelChannels) {
    const int64_t left = a.channels - first;
    const int channels = int(left < tuning::kInt8PanelChannels ? left : tuning::kInt8PanelChannels);
    body(a.panels + first * a.k_padded, first, channels, (channels + 15) / 16 * 16);
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
