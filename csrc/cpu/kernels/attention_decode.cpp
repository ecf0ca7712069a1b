// attention_decode in float32 arithmetic, for caches of every type, and the merge of the pieces (see
// attention_decode_block.h). Elements become floats as they are loaded; an int8 cache's scales are those of whole keys
// and multiply scores and weights instead.
#include "cpu/kernels/attention_decode_block.h"
#include "cpu/tuning/attention.h"

namespace lamina::LAMINA_ISA {
namespace {

LAMINA_INLINE float to_float(float x) { return x; }
LAMINA_INLINE float to_float(bf16 x) { return bf16_to_float(x); }
LAMINA_INLINE float to_float(f16 x) { return f16_to_float(x); }

template <class T>
struct FloatMath {
  using Storage = T;
  static constexpr int per_word = 1;
  static constexpr bool scales_query = true;

  static LAMINA_INLINE F32 load_words(const T* p, int n) { return load_up_to(p, n); }
  static LAMINA_INLINE void load_values(F32 (&x)[1], const T* const* rows, int column, int n) {
    x[0] = load_up_to(rows[0] + column, n);
  }
  static LAMINA_INLINE F32 multiply_add(F32 a, F32 b, F32 c) { return fmadd(a, b, c); }
  static LAMINA_INLINE F32 exp2(F32 x) { return bounded_exp2(x); }
  static LAMINA_INLINE void store_weights(float* to, F32 x) { store(to, x); }
  static LAMINA_INLINE uint32_t nonzero_bits(float word) { return word == 0.0f ? 0 : ~uint32_t{0}; }

  template <class Q>
  static void pack_row(const Q* q, int64_t col, int n, float factor, float* to) {
    for (int e = 0; e < n; ++e) to[e] = to_float(q[e * col]) * factor;
    for (int e = n; e < round_up(n, kLanes); ++e) to[e] = 0.0f;
  }
};

REGISTER_KERNEL(attention_decode_f32_table, attention_decode<FloatMath<float>>);
REGISTER_KERNEL(attention_decode_bf16_table, attention_decode<FloatMath<bf16>>);
REGISTER_KERNEL(attention_decode_f16_table, attention_decode<FloatMath<f16>>);
REGISTER_KERNEL(attention_decode_i8_table, attention_decode<FloatMath<int8_t>>);

// The weight of a piece, or of the sink, whose maximum is m, beside the largest.
LAMINA_INLINE float weight_of(float m, float largest) {
  alignas(64) float t[kLanes];
  store(t, bounded_exp2(set1(m - largest)));
  return t[0];
}

template <class T>
void merge(const DecodeMergeArgs& a) {
  const int columns = int(decode_columns(a.value_size));
  const int64_t record = decode_record_floats(a.rows, a.value_size);
  const float* maxima = a.partial + a.rows * columns;
  const float* totals = maxima + a.rows;
  alignas(64) float sums[tuning::kAttentionMaxHeadSize];
  for (int r = 0; r < a.rows; ++r) {
    const int64_t row = a.first_row + r, query = row / a.group, head = row % a.group;
    float largest = a.sinks ? a.sinks[head * a.sink_stride] * kLog2E : kLowest;
    float total = a.sinks ? 1.0f : 0.0f;
    for (int64_t p = 0; p < a.pieces; ++p) {
      const float m = maxima[p * record + r];
      if (!(m > largest)) continue;
      total *= weight_of(largest, m);
      largest = m;
    }
    for (int c = 0; c < a.value_size; c += kLanes) store(sums + c, zero());
    for (int64_t p = 0; p < a.pieces; ++p) {
      const float weight = weight_of(maxima[p * record + r], largest);
      const float* from = a.partial + p * record + r * columns;
      total += weight * totals[p * record + r];
      for (int c = 0; c < a.value_size; c += kLanes) {
        store(sums + c, fmadd(set1(weight), load(from + c), load(sums + c)));
      }
    }
    const float inverse = total < 1e-30f ? 0.0f : 1.0f / total;
    T* out = static_cast<T*>(a.out) + query * a.out_query + head * a.out_head;
    for (int c = 0; c < a.value_size; c += kLanes) {
      store_up_to(out + c, load(sums + c) * set1(inverse), smaller(kLanes, a.value_size - c));
    }
    if (a.lse) {
      constexpr float kLn2 = 0.6931471805599453f;
      a.lse[query * a.lse_query + head * a.lse_head] =
          total < 1e-30f ? -kInfinity : largest * kLn2 + __builtin_logf(total);
    }
  }
}

REGISTER_KERNEL(attention_decode_merge_f32_table, merge<float>);
REGISTER_KERNEL(attention_decode_merge_bf16_table, merge<bf16>);
REGISTER_KERNEL(attention_decode_merge_f16_table, merge<f16>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
