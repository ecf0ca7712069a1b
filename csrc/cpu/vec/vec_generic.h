// Four lanes in GCC/Clang vector extensions: the baseline of any machine.
#pragma once

namespace lamina::LAMINA_ISA {
namespace {

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));

struct F32 {
  static constexpr int lanes = 4;
  static constexpr int registers = 16;  // how many an accumulator tile may count on
  f32x4 r;
};
struct I32 {
  i32x4 r;
};
struct Mask {
  i32x4 r;
};

LAMINA_INLINE F32 set1(float x) { return {f32x4{x, x, x, x}}; }
LAMINA_INLINE F32 zero() { return set1(0.0f); }
LAMINA_INLINE F32 iota() { return {f32x4{0, 1, 2, 3}}; }

LAMINA_INLINE F32 load(const float* p) {
  F32 x;
  memcpy(&x.r, p, sizeof x.r);
  return x;
}
LAMINA_INLINE F32 load_n(const float* p, int n) {
  F32 x = zero();
  for (int i = 0; i < n; ++i) x.r[i] = p[i];
  return x;
}
LAMINA_INLINE F32 load_n(const bf16* p, int n) {
  i32x4 b = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) b[i] = int32_t(uint32_t(p[i].bits) << 16);
  return {(f32x4)b};
}
LAMINA_INLINE F32 load(const bf16* p) { return load_n(p, 4); }

LAMINA_INLINE float f16_to_float(f16 x);
LAMINA_INLINE F32 load_n(const f16* p, int n) {
  F32 x = zero();
  for (int i = 0; i < n; ++i) x.r[i] = f16_to_float(p[i]);
  return x;
}
LAMINA_INLINE F32 load(const f16* p) { return load_n(p, 4); }
LAMINA_INLINE F32 load_n(const int8_t* p, int n) {
  i32x4 i = {0, 0, 0, 0};
  for (int k = 0; k < n; ++k) i[k] = p[k];
  return {__builtin_convertvector(i, f32x4)};
}
LAMINA_INLINE F32 load(const int8_t* p) { return load_n(p, 4); }

LAMINA_INLINE void store(float* p, F32 x) { memcpy(p, &x.r, sizeof x.r); }
LAMINA_INLINE void store_n(float* p, F32 x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.r[i];
}
LAMINA_INLINE uint16_t bf16_bits(float x);
LAMINA_INLINE void store_n(bf16* p, F32 x, int n) {
  for (int i = 0; i < n; ++i) p[i].bits = bf16_bits(x.r[i]);
}
LAMINA_INLINE void store(bf16* p, F32 x) { store_n(p, x, 4); }

LAMINA_INLINE uint16_t f16_bits(float x);
LAMINA_INLINE void store_n(f16* p, F32 x, int n) {
  for (int i = 0; i < n; ++i) p[i].bits = f16_bits(x.r[i]);
}
LAMINA_INLINE void store(f16* p, F32 x) { store_n(p, x, 4); }

LAMINA_INLINE F32 operator+(F32 a, F32 b) { return {a.r + b.r}; }
LAMINA_INLINE F32 operator-(F32 a, F32 b) { return {a.r - b.r}; }
LAMINA_INLINE F32 operator*(F32 a, F32 b) { return {a.r * b.r}; }
LAMINA_INLINE F32 operator/(F32 a, F32 b) { return {a.r / b.r}; }
LAMINA_INLINE F32 fmadd(F32 a, F32 b, F32 c) { return {a.r * b.r + c.r}; }
LAMINA_INLINE F32 max(F32 a, F32 b) { return {a.r > b.r ? a.r : b.r}; }
LAMINA_INLINE F32 min(F32 a, F32 b) { return {a.r < b.r ? a.r : b.r}; }

LAMINA_INLINE Mask less(F32 a, F32 b) { return {a.r < b.r}; }
LAMINA_INLINE Mask is_nan(F32 x) { return {x.r != x.r}; }
LAMINA_INLINE Mask operator&(Mask a, Mask b) { return {a.r & b.r}; }
LAMINA_INLINE Mask all_lanes() { return {i32x4{-1, -1, -1, -1}}; }
LAMINA_INLINE bool all(Mask m) { return (m.r[0] & m.r[1] & m.r[2] & m.r[3]) != 0; }
// Bit i is lane i.
LAMINA_INLINE uint32_t bits_of_lanes(Mask m) {
  return uint32_t(m.r[0] & 1) | uint32_t(m.r[1] & 2) | uint32_t(m.r[2] & 4) | uint32_t(m.r[3] & 8);
}
// n <= 64 bytes, 0 or 1, as bits.
LAMINA_INLINE uint64_t bool_bits(const uint8_t* p, int n) {
  uint64_t bits = 0;
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t eight;
    memcpy(&eight, p + i, 8);
    // The product gathers bit 0 of each byte in the top byte, in order, without carries.
    bits |= (eight * 0x0102040810204080u >> 56) << i;
  }
  for (; i < n; ++i) bits |= uint64_t(p[i] != 0) << i;
  return bits;
}
// Lane i is bit i.
LAMINA_INLINE Mask lanes_of_bits(uint32_t bits) {
  const int32_t b = int32_t(bits);
  return {(i32x4{b, b, b, b} & i32x4{1, 2, 4, 8}) != 0};
}
LAMINA_INLINE F32 select(Mask m, F32 a, F32 b) { return {m.r ? a.r : b.r}; }

// The same bits of every lane.
LAMINA_INLINE F32 and_bits(F32 x, uint32_t bits) { return {(f32x4)((i32x4)x.r & int32_t(bits))}; }

LAMINA_INLINE F32 or_bits(F32 x, uint32_t bits) { return {(f32x4)((i32x4)x.r | int32_t(bits))}; }

// Exact for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for the fraction, and the addition rounds to even.
LAMINA_INLINE F32 round_even(F32 x) {
  const F32 magic = set1(12582912.0f);
  F32 t = x + magic;
  __asm__("" : "+x"(t.r));  // keeps the compiler from folding the two additions
  return t - magic;
}

// p * 2^n for integer-valued n; n below -126 gives 0.
LAMINA_INLINE F32 scale_exponent(F32 p, F32 n) {
  const i32x4 e = __builtin_convertvector(n.r < -127.0f ? f32x4{-127, -127, -127, -127} : n.r, i32x4);
  const F32 factor = {(f32x4)((e + 127) << 23)};
  return p * factor;
}

LAMINA_INLINE F32 reciprocal(F32 x) { return {1.0f / x.r}; }
LAMINA_INLINE F32 reciprocal_of_normal(F32 x) { return reciprocal(x); }

// The lanes x lanes matrix whose rows are r becomes its transpose.
LAMINA_INLINE void transpose(F32 (&r)[4]) {
  const f32x4 low01 = __builtin_shufflevector(r[0].r, r[1].r, 0, 4, 1, 5);
  const f32x4 high01 = __builtin_shufflevector(r[0].r, r[1].r, 2, 6, 3, 7);
  const f32x4 low23 = __builtin_shufflevector(r[2].r, r[3].r, 0, 4, 1, 5);
  const f32x4 high23 = __builtin_shufflevector(r[2].r, r[3].r, 2, 6, 3, 7);
  r[0].r = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  r[1].r = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  r[2].r = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  r[3].r = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

// Lane i is the sum of the lanes of x[i].
LAMINA_INLINE F32 reduce_add_each(const F32 (&x)[4]) {
  F32 t[4] = {x[0], x[1], x[2], x[3]};
  transpose(t);
  return (t[0] + t[2]) + (t[1] + t[3]);
}

LAMINA_INLINE float reduce_max(F32 x) {
  float m = x.r[0];
  for (int i = 1; i < 4; ++i) m = x.r[i] > m ? x.r[i] : m;
  return m;
}
LAMINA_INLINE float reduce_add(F32 x) { return (x.r[0] + x.r[2]) + (x.r[1] + x.r[3]); }

LAMINA_INLINE I32 set1_i32(int32_t x) { return {i32x4{x, x, x, x}}; }
LAMINA_INLINE I32 load_i32(const int32_t* p) {
  I32 x;
  memcpy(&x.r, p, sizeof x.r);
  return x;
}
LAMINA_INLINE void store_i32(int32_t* p, I32 x) { memcpy(p, &x.r, sizeof x.r); }
LAMINA_INLINE I32 operator+(I32 a, I32 b) {
  typedef uint32_t u32x4 __attribute__((vector_size(16)));
  return {(i32x4)((u32x4)a.r + (u32x4)b.r)};
}
LAMINA_INLINE I32 operator-(I32 a, I32 b) {
  typedef uint32_t u32x4 __attribute__((vector_size(16)));
  return {(i32x4)((u32x4)a.r - (u32x4)b.r)};
}
LAMINA_INLINE I32 operator&(I32 a, I32 b) { return {a.r & b.r}; }
LAMINA_INLINE I32 operator^(I32 a, I32 b) { return {a.r ^ b.r}; }
// The 64-bit products of unsigned a and b.
LAMINA_INLINE void multiply_wide(I32 a, uint32_t b, I32& low, I32& high) {
  for (int i = 0; i < 4; ++i) {
    const uint64_t product = uint64_t(uint32_t(a.r[i])) * b;
    low.r[i] = int32_t(uint32_t(product));
    high.r[i] = int32_t(uint32_t(product >> 32));
  }
}
// Bit i: lane i is below the limit, unsigned.
LAMINA_INLINE uint32_t bits_below(I32 a, uint32_t limit) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= uint32_t(uint32_t(a.r[i]) < limit) << i;
  return bits;
}
LAMINA_INLINE I32 shift_left(I32 x, int n) {
  typedef uint32_t u32x4 __attribute__((vector_size(16)));
  return {(i32x4)((u32x4)x.r << uint32_t(n))};
}
LAMINA_INLINE I32 shift_right(I32 x, int n) { return {x.r >> n}; }
LAMINA_INLINE F32 to_float(I32 x) { return {__builtin_convertvector(x.r, f32x4)}; }
LAMINA_INLINE I32 bits_of(F32 x) { return {(i32x4)x.r}; }
LAMINA_INLINE F32 floats_of(I32 x) { return {(f32x4)x.r}; }
LAMINA_INLINE I32 abs_bits(F32 x) { return {(i32x4)x.r & 0x7fffffff}; }
LAMINA_INLINE I32 max(I32 a, I32 b) { return {a.r > b.r ? a.r : b.r}; }
// table[low five bits of each lane].
LAMINA_INLINE F32 lookup32(const float (&table)[32], I32 at) {
  const i32x4 i = at.r & 31;
  return {f32x4{table[i[0]], table[i[1]], table[i[2]], table[i[3]]}};
}
LAMINA_INLINE int32_t reduce_max(I32 x) {
  int32_t m = x.r[0];
  for (int i = 1; i < 4; ++i) m = x.r[i] > m ? x.r[i] : m;
  return m;
}

// n <= lanes int8 codes, round half to even, saturated to [-128, 127]; `zero` (0 or 128) is the code of zero.
LAMINA_INLINE void store_codes(uint8_t* p, F32 x, uint8_t zero, int n) {
  const F32 r = round_even(max(min(x, set1(127.0f)), set1(-128.0f)));
  for (int i = 0; i < n; ++i) p[i] = uint8_t(int32_t(r.r[i]) + zero);
}

// The codes of four registers, round half to even, saturated, with an offset of 128: those of lane i are the bytes of
// word i.
LAMINA_INLINE I32 join_codes(F32 a, F32 b, F32 c, F32 d) {
  const F32 x[4] = {a, b, c, d};
  alignas(16) uint8_t codes[16];
  for (int j = 0; j < 4; ++j) {
    const F32 r = round_even(max(min(x[j], set1(127.0f)), set1(-128.0f)));
    for (int i = 0; i < 4; ++i) codes[4 * i + j] = uint8_t(int32_t(r.r[i]) + 128);
  }
  I32 words;
  memcpy(&words.r, codes, 16);
  return words;
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
