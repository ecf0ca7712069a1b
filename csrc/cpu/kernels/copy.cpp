// copy in three shapes: runs that are contiguous on both sides; transpositions, where one side is contiguous in another
// dimension than the other, by squares that are transposed in registers; and any other strides, element by element.
#include "cpu/kernels/copy.h"

#include "cpu/tuning/copy.h"
#include "cpu/vec/vec.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;

struct boolean {
  uint8_t value;
};

template <class T>
constexpr bool kInRegisters = false;  // whether registers of floats are loaded from T and stored to it
template <>
constexpr bool kInRegisters<float> = true;
template <>
constexpr bool kInRegisters<bf16> = true;
template <>
constexpr bool kInRegisters<f16> = true;

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

LAMINA_INLINE float number(float x) { return x; }
LAMINA_INLINE float number(bf16 x) { return bf16_to_float(x); }
LAMINA_INLINE float number(f16 x) { return f16_to_float(x); }
LAMINA_INLINE float number(boolean x) { return x.value != 0 ? 1.0f : 0.0f; }
LAMINA_INLINE float number(int8_t x) { return float(x); }
LAMINA_INLINE float number(int32_t x) { return float(x); }
LAMINA_INLINE float number(int64_t x) { return float(x); }

LAMINA_INLINE void put(float& to, float x) { to = x; }
LAMINA_INLINE void put(bf16& to, float x) { to.bits = bf16_bits(x); }
LAMINA_INLINE void put(f16& to, float x) { to.bits = f16_bits(x); }
LAMINA_INLINE void put(boolean& to, float x) { to.value = x != 0; }
LAMINA_INLINE void put(int32_t& to, float x) { to = int32_t(x); }
LAMINA_INLINE void put(int64_t& to, float x) { to = int64_t(x); }

// Integers that a float may not hold.
template <class T>
constexpr bool kInteger = kSame<T, int32_t> || kSame<T, int64_t>;

// float stands for four bytes as well: a copy of one moves its bits.
template <class To, class From>
LAMINA_INLINE void move(To& to, const From& x) {
  if constexpr (kSame<To, From>) {
    to = x;
  } else if constexpr (kInteger<To> && kInteger<From>) {
    to = To(x);
  } else {
    put(to, number(x));
  }
}

// As fast as memcpy for long runs and without its call for short ones; the end goes by a register that overlaps the one
// before.
LAMINA_INLINE void copy_bytes(char* to, const char* x, int64_t n) {
  constexpr int64_t step = sizeof(F32);
  if (n < step) {
    memcpy(to, x, size_t(n));
    return;
  }
  const auto move = [&](int64_t at) __attribute__((always_inline)) {
    store(reinterpret_cast<float*>(to + at), load(reinterpret_cast<const float*>(x + at)));
  };
  int64_t i = 0;
  for (; i + step <= n; i += step) move(i);
  if (i < n) move(n - step);
}

template <class To, class From>
LAMINA_INLINE void copy_run(To* to, const From* x, int64_t n) {
  if constexpr (kSame<To, From>) {
    copy_bytes(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(x), n * int64_t(sizeof(To)));
  } else if constexpr (kInRegisters<To> && (kInRegisters<From> || kSame<From, int8_t>)) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(x + i));
    if (i < n) store_n(to + i, load_n(x + i, int(n - i)), int(n - i));
  } else {
    for (int64_t i = 0; i < n; ++i) move(to[i], x[i]);
  }
}

// out[row][column] = x[column][row] of up to `lanes` rows and columns.
template <class To, class From>
LAMINA_INLINE void transpose_square(To* to, int64_t to_row, const From* x, int64_t x_row, int rows, int columns) {
  F32 r[kLanes];
  if (rows == kLanes && columns == kLanes) {
    LAMINA_UNROLL
    for (int i = 0; i < kLanes; ++i) r[i] = load(x + i * x_row);
    transpose(r);
    LAMINA_UNROLL
    for (int i = 0; i < kLanes; ++i) store(to + i * to_row, r[i]);
    return;
  }
  for (int i = 0; i < kLanes; ++i) r[i] = i < columns ? load_up_to(x + i * x_row, rows) : zero();
  transpose(r);
  for (int i = 0; i < rows; ++i) store_up_to(to + i * to_row, r[i], columns);
}

typedef uint16_t words8 __attribute__((vector_size(16)));

// The same of 8 x 8 elements of two bytes.
LAMINA_INLINE void transpose_words(uint16_t* to, int64_t to_row, const uint16_t* x, int64_t x_row) {
  words8 r[8], t[8];
  LAMINA_UNROLL
  for (int i = 0; i < 8; ++i) memcpy(&r[i], x + i * x_row, 16);
  // Each of three rounds pairs row i with row i + 4 and lays their words side by side.
  LAMINA_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = __builtin_shufflevector(r[i], r[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
    t[2 * i + 1] = __builtin_shufflevector(r[i], r[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
  }
  LAMINA_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[2 * i] = __builtin_shufflevector(t[i], t[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
    r[2 * i + 1] = __builtin_shufflevector(t[i], t[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
  }
  LAMINA_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = __builtin_shufflevector(r[i], r[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
    t[2 * i + 1] = __builtin_shufflevector(r[i], r[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
  }
  LAMINA_UNROLL
  for (int i = 0; i < 8; ++i) memcpy(to + i * to_row, &t[i], 16);
}

template <class To, class From>
LAMINA_INLINE void transpose_any(To* to, int64_t to_row, const From* x, int64_t x_row, int rows, int columns) {
  for (int j = 0; j < rows; ++j) {
    for (int i = 0; i < columns; ++i) move(to[j * to_row + i], x[i * x_row + j]);
  }
}

template <class To, class From>
LAMINA_INLINE void transpose_block(To* to, int64_t to_row, const From* x, int64_t x_row, int rows, int columns) {
  if constexpr (kInRegisters<To> && kInRegisters<From>) {
    transpose_square(to, to_row, x, x_row, rows, columns);
  } else if constexpr (kSame<To, From> && kSame<From, uint16_t>) {
    if (rows == 8 && columns == 8) return transpose_words(to, to_row, x, x_row);
    transpose_any(to, to_row, x, x_row, rows, columns);
  } else {
    transpose_any(to, to_row, x, x_row, rows, columns);
  }
}

// How wide the squares of a transposition are: a register where there is one, a cache line of the others.
template <class To, class From>
constexpr int kSquare = kInRegisters<To> && kInRegisters<From> ? kLanes
                        : sizeof(From) == 2                    ? 8
                                                               : 64 / int(sizeof(From));

LAMINA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// rows x columns; x is contiguous along rows, the output along columns.
template <class To, class From>
void transpose_plane(To* to, int64_t to_row, const From* x, int64_t x_row, int64_t rows, int64_t columns) {
  constexpr int square = kSquare<To, From>;
  // A square of a few rows or columns (the colours of an image) is mostly empty.
  if (rows < tuning::kCopyFew || columns < tuning::kCopyFew) {
    for (int64_t j = 0; j < rows; ++j) {
      for (int64_t i = 0; i < columns; ++i) move(to[j * to_row + i], x[i * x_row + j]);
    }
    return;
  }
  for (int64_t top = 0; top < rows; top += tuning::kCopyRows) {
    const int64_t bottom = smaller(rows, top + tuning::kCopyRows);
    for (int64_t i = 0; i < columns; i += square) {
      for (int64_t j = top; j < bottom; j += square) {
        transpose_block(to + j * to_row + i, to_row, x + i * x_row + j, x_row, int(smaller(square, bottom - j)),
                        int(smaller(square, columns - i)));
      }
    }
  }
}

template <class To, class From>
void copy_box(const CopyArgs& a) {
  // Two dimensions at a time: the innermost one, and the one that x is contiguous in or the next.
  const int second = a.x_inner > 0 ? a.x_inner : 1;
  const int64_t n = a.sizes[0], rows = a.sizes[second];
  const int64_t x_row = a.x_strides[second], out_row = a.out_strides[second];
  const int64_t x_step = a.x_strides[0], out_step = a.out_strides[0];
  int64_t index[kCopyDims] = {};
  const From* x = static_cast<const From*>(a.x);
  To* to = static_cast<To*>(a.out);
  while (true) {
    if (x_step == 1 && out_step == 1) {
      for (int64_t j = 0; j < rows; ++j) copy_run(to + j * out_row, x + j * x_row, n);
    } else if (x_row == 1 && out_step == 1) {
      transpose_plane(to, out_row, x, x_step, rows, n);
    } else {
      for (int64_t j = 0; j < rows; ++j) {
        for (int64_t i = 0; i < n; ++i) move(to[j * out_row + i * out_step], x[j * x_row + i * x_step]);
      }
    }
    int d = 1;
    for (; d < a.dims; ++d) {
      if (d == second) continue;
      x += a.x_strides[d];
      to += a.out_strides[d];
      if (++index[d] < a.sizes[d]) break;
      x -= a.sizes[d] * a.x_strides[d];
      to -= a.sizes[d] * a.out_strides[d];
      index[d] = 0;
    }
    if (d == a.dims) return;
  }
}

template <class From>
void convert(const CopyArgs& a) {
  if (a.out_format == CopyFormat::f32) return copy_box<float, From>(a);
  if (a.out_format == CopyFormat::boolean) return copy_box<boolean, From>(a);
  if constexpr (kInteger<From> || kSame<From, float> || kSame<From, boolean>) {
    if (a.out_format == CopyFormat::int32) return copy_box<int32_t, From>(a);
    if (a.out_format == CopyFormat::int64) return copy_box<int64_t, From>(a);
  }
  if constexpr (!kInteger<From>) {
    if (a.out_format == CopyFormat::b16) return copy_box<bf16, From>(a);
    if (a.out_format == CopyFormat::f16) return copy_box<f16, From>(a);
  }
}

void copy(const CopyArgs& a) {
  switch (a.x_format) {
    case CopyFormat::bytes1: return copy_box<uint8_t, uint8_t>(a);
    case CopyFormat::bytes2: return copy_box<uint16_t, uint16_t>(a);
    case CopyFormat::bytes4: return copy_box<float, float>(a);
    case CopyFormat::bytes8: return copy_box<uint64_t, uint64_t>(a);
    case CopyFormat::f32: return convert<float>(a);
    case CopyFormat::b16: return convert<bf16>(a);
    case CopyFormat::f16: return convert<f16>(a);
    case CopyFormat::boolean: return convert<boolean>(a);
    case CopyFormat::int8: return convert<int8_t>(a);
    case CopyFormat::int32: return convert<int32_t>(a);
    case CopyFormat::int64: return convert<int64_t>(a);
  }
}

void copy_rows(const CopyRowsArgs& a) {
  for (int64_t row = a.begin; row < a.end; ++row) {
    for (int i = 0; i < a.count; ++i) {
      const CopyArgs& box = a.boxes[i];
      copy_bytes(static_cast<char*>(box.out) + row * box.out_strides[1] * box.out_bytes,
                 static_cast<const char*>(box.x) + row * box.x_strides[1] * box.x_bytes, box.sizes[0] * box.x_bytes);
    }
  }
}

REGISTER_KERNEL(copy_table, copy);
REGISTER_KERNEL(copy_rows_table, copy_rows);

}  // namespace
}  // namespace lamina::LAMINA_ISA
