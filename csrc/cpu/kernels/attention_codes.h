// Scores from int8 codes, four times the rate of float32: the way of SageAttention (Zhang et al. 2024).
//
// Every row of Q and of K has a scale of its own, and K is quantized less its mean over the keys: what keys have in
// common would take up most of the codes, and moves all scores of a row alike. That part, q . mean, is added to the
// scores in float32, so they are what they would be without it. The first operand of vpdpbusd is unsigned: Q is stored
// + 128, and accumulators start at -128 times the sum of the key's codes.
#pragma once

#include "cpu/kernels/attention_rows.h"

namespace lamina::LAMINA_ISA {
namespace {

// A row less `mean` as codes, zero up to the next multiple of 64; gives its scale, NaN where the row is not finite, and
// the sum of the codes.
template <class T>
LAMINA_INLINE float quantize_row(const T* row, int64_t col, int n, const float* mean, uint8_t zero_code, uint8_t* codes,
                                 float* code_sum) {
  float x[tuning::kAttentionMaxHeadSize + kLanes];
  F32 largest = zero(), watch = zero();
  for (int c = 0; c < n; c += kLanes) {
    const F32 e = row_elements(row + c * col, col, smaller(kLanes, n - c)) - load(mean + c);
    largest = max(and_bits(e, 0x7fffffffu), largest);
    watch = fmadd(e, zero(), watch);
    store(x + c, e);
  }
  const float most = reduce_max(largest);
  const F32 inverse = set1(most > 0.0f ? 127.0f / most : 0.0f);
  F32 sum = zero();
  for (int c = 0; c < round_up(n, 64); c += kLanes) {
    const F32 code = c < n ? round_even(load(x + c) * inverse) : zero();
    sum = sum + code;
    store_codes(codes + c, code, zero_code, kLanes);
  }
  const float watched = reduce_add(watch);
  *code_sum = watched == watched ? reduce_add(sum) : 0.0f;
  return most / 127.0f + watched;
}

// K as codes: of all keys of a head, kept in the room for packed keys.
struct Int8Keys {
  explicit Int8Keys(const AttentionArgs& a)
      : stride(round_up(a.head_size, 64)),
        mean(a.packed->k),
        scale(mean + tuning::kAttentionMaxHeadSize),
        start(reinterpret_cast<int32_t*>(scale + a.keys)),
        codes(reinterpret_cast<uint8_t*>(start + a.keys)) {}

  template <class T>
  void pack(const AttentionArgs& a) {
    const T* k = static_cast<const T*>(a.k);
    const int d = a.head_size;
    for (int c = 0; c < tuning::kAttentionMaxHeadSize; c += kLanes) store(mean + c, zero());
    for (int64_t j = 0; j < a.keys; ++j) {
      for (int c = 0; c < d; c += kLanes) {
        const F32 x = row_elements(k + j * a.k_row + c * a.k_col, a.k_col, smaller(kLanes, d - c));
        const Mask finite = less(and_bits(x, 0x7fffffffu), set1(kInfinity));  // padding may hold anything
        store(mean + c, load(mean + c) + select(finite, x, zero()));
      }
    }
    const F32 share = set1(1.0f / float(a.keys));
    for (int c = 0; c < d; c += kLanes) store(mean + c, load(mean + c) * share);
    for (int64_t j = 0; j < a.keys; ++j) {
      float sum;
      scale[j] = quantize_row(k + j * a.k_row, a.k_col, d, mean, 0, codes + j * stride, &sum);
      start[j] = -128 * int32_t(sum);
    }
  }

  const int stride;  // of codes, in bytes
  float *const mean, *const scale;
  int32_t* const start;  // of an accumulator
  uint8_t* const codes;
};

}  // namespace
}  // namespace lamina::LAMINA_ISA
