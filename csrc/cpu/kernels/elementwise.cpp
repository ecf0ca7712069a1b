// elementwise as an interpreter whose registers are tiles of floats in L1: each instruction is one loop over a tile, so
// that what it costs to look it up is spread over a thousand elements. Contiguous float32 operands are read and written
// where they lie, and one value for a whole tile is a register; others pass through a tile of their own, which is kept
// for as long as the tiles that follow need the same values (a bias).
#include "cpu/kernels/elementwise.h"

#include "cpu/tuning/elementwise.h"
#include "cpu/vec/activate.h"
#include "cpu/vec/functions.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
constexpr int kSplat = 16;  // floats that a scalar is repeated to
constexpr int64_t kStep = tuning::kElementwiseTile + 16;

// Element i is at[i & mask]: all ones, or 0 for a scalar, which is repeated for a whole register.
struct Operand {
  float* at;
  int64_t mask;
};

LAMINA_INLINE const float* from(const Operand& x, int64_t i) { return x.at + (i & x.mask); }

template <class Function>
LAMINA_INLINE void map(float* to, const Operand& a, int64_t n, const Function& function) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, function(load(from(a, i))));
  if (i < n) store_n(to + i, function(load_n(from(a, i), int(n - i))), int(n - i));
}

template <class Function>
LAMINA_INLINE void map(float* to, const Operand& a, const Operand& b, int64_t n, const Function& function) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, function(load(from(a, i)), load(from(b, i))));
  if (const int rest = int(n - i); rest > 0) {
    store_n(to + i, function(load_n(from(a, i), rest), load_n(from(b, i), rest)), rest);
  }
}

#define LAMINA_UNARY(expression) return map(to, a, n, [](F32 x) __attribute__((always_inline)) { return expression; })
#define LAMINA_BINARY(expression) \
  return map(to, a, b, n, [](F32 x, F32 y) __attribute__((always_inline)) { return expression; })

// One instruction over a tile of n elements; `to` may be an operand's place.
void run(ElementwiseCode code, float* to, const Operand& a, const Operand& b, const Operand& c, int64_t n) {
  using enum ElementwiseCode;
  switch (code) {
    case add: LAMINA_BINARY(x + y);
    case sub: LAMINA_BINARY(x - y);
    case mul: LAMINA_BINARY(x * y);
    case div: LAMINA_BINARY(x / y);
    case neg: LAMINA_UNARY(negated(x));
    case ElementwiseCode::abs: LAMINA_UNARY(absolute(x));
    case ElementwiseCode::sqrt: LAMINA_UNARY(LAMINA_ISA::sqrt(x));
    case rsqrt: LAMINA_UNARY(set1(1.0f) / LAMINA_ISA::sqrt(x));
    case ElementwiseCode::reciprocal: LAMINA_UNARY(set1(1.0f) / x);
    case square: LAMINA_UNARY(x * x);
    case cube: LAMINA_UNARY(x * x * x);
    case ElementwiseCode::pow: LAMINA_BINARY(LAMINA_ISA::pow(x, y));
    case ElementwiseCode::exp: LAMINA_UNARY(LAMINA_ISA::exp(x));
    case ElementwiseCode::log: LAMINA_UNARY(LAMINA_ISA::log(x));
    case ElementwiseCode::sin: LAMINA_UNARY(LAMINA_ISA::sin(x));
    case ElementwiseCode::cos: LAMINA_UNARY(LAMINA_ISA::cos(x));
    case ElementwiseCode::erf: LAMINA_UNARY(LAMINA_ISA::erf(x));
    case sigmoid: LAMINA_UNARY(sigmoid_precise(x));
    case ElementwiseCode::tanh: LAMINA_UNARY(tanh_precise(x));
    case relu: LAMINA_UNARY(activate<Activation::relu>(x));
    case relu6: LAMINA_UNARY(activate<Activation::relu6>(x));
    case gelu: LAMINA_UNARY(activate<Activation::gelu>(x));
    case ElementwiseCode::gelu_tanh: LAMINA_UNARY(activate<Activation::gelu_tanh>(x));
    case ElementwiseCode::silu: LAMINA_UNARY(activate<Activation::silu>(x));
    case hardswish: LAMINA_UNARY(activate<Activation::hardswish>(x));
    case ElementwiseCode::maximum: LAMINA_BINARY(LAMINA_ISA::maximum(x, y));
    case ElementwiseCode::minimum: LAMINA_BINARY(LAMINA_ISA::minimum(x, y));
    case floor: LAMINA_UNARY(floored(x));
    case round: LAMINA_UNARY(rounded(x));
    case eq: LAMINA_BINARY(one_where(equal(x, y)));
    case ne: LAMINA_BINARY(one_where(not_equal(x, y)));
    case lt: LAMINA_BINARY(one_where(less(x, y)));
    case le: LAMINA_BINARY(one_where(less_or_equal(x, y)));
    case gt: LAMINA_BINARY(one_where(less(y, x)));
    case ge: LAMINA_BINARY(one_where(less_or_equal(y, x)));
    case logical_and: LAMINA_BINARY(one_where(not_equal(x, zero()) & not_equal(y, zero())));
    case logical_or: LAMINA_BINARY(select(not_equal(x, zero()), set1(1.0f), one_where(not_equal(y, zero()))));
    case logical_not: LAMINA_UNARY(one_where(equal(x, zero())));
    case where: {
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        store(to + i, select(not_equal(load(from(a, i)), zero()), load(from(b, i)), load(from(c, i))));
      }
      if (const int rest = int(n - i); rest > 0) {
        const F32 condition = load_n(from(a, i), rest);
        store_n(to + i, select(not_equal(condition, zero()), load_n(from(b, i), rest), load_n(from(c, i), rest)), rest);
      }
      return;
    }
  }
}

#undef LAMINA_UNARY
#undef LAMINA_BINARY

LAMINA_INLINE float as_float(const float* p) { return *p; }
LAMINA_INLINE float as_float(const bf16* p) { return bf16_to_float(*p); }
LAMINA_INLINE float as_float(const int8_t* p) { return float(*p); }

// rows x columns elements in any strides -> a tile, row behind row.
template <class T>
void gather(float* to, const T* x, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  for (int64_t r = 0; r < rows; ++r, x += row) {
    if (r > 0 && row == 0) {
      memcpy(to, to - columns, size_t(columns) * 4);
      to += columns;
    } else if (column == 1) {
      int64_t i = 0;
      for (; i + kLanes <= columns; i += kLanes) store(to + i, load(x + i));
      if (i < columns) store_n(to + i, load_n(x + i, int(columns - i)), int(columns - i));
      to += columns;
    } else if (column == 0) {
      const F32 value = set1(as_float(x));
      int64_t i = 0;
      for (; i + kLanes <= columns; i += kLanes) store(to + i, value);
      if (i < columns) store_n(to + i, value, int(columns - i));
      to += columns;
    } else {
      for (int64_t i = 0; i < columns; ++i) *to++ = as_float(x + i * column);
    }
  }
}

LAMINA_INLINE void put(float* p, float x) { *p = x; }
LAMINA_INLINE void put(bf16* p, float x) { p->bits = bf16_bits(x); }
LAMINA_INLINE void put(uint8_t* p, float x) { *p = x != 0; }

LAMINA_INLINE void put_run(float* to, const float* x, int64_t n) { memcpy(to, x, size_t(n) * 4); }
LAMINA_INLINE void put_run(bf16* to, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int rest = int(n - i < kLanes ? n - i : kLanes);
    store_up_to(to + i, load_up_to(x + i, rest), rest);
  }
}
LAMINA_INLINE void put_run(uint8_t* __restrict to, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] != 0;
}

// A tile, row behind row -> rows x columns elements in any strides.
template <class T>
void scatter(T* to, const float* x, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  for (int64_t r = 0; r < rows; ++r, to += row, x += columns) {
    if (column == 1) {
      put_run(to, x, columns);
    } else {
      for (int64_t i = 0; i < columns; ++i) put(to + i * column, x[i]);
    }
  }
}

LAMINA_INLINE int64_t element_size(ElementwiseFormat format) {
  return format == ElementwiseFormat::f32 ? 4 : format == ElementwiseFormat::b16 ? 2 : 1;
}

void gather(float* to, ElementwiseFormat format, const void* x, int64_t rows, int64_t columns, int64_t row,
            int64_t column) {
  switch (format) {
    case ElementwiseFormat::f32: return gather(to, static_cast<const float*>(x), rows, columns, row, column);
    case ElementwiseFormat::b16: return gather(to, static_cast<const bf16*>(x), rows, columns, row, column);
    case ElementwiseFormat::boolean: return gather(to, static_cast<const int8_t*>(x), rows, columns, row, column);
  }
}

void scatter(ElementwiseFormat format, void* to, const float* x, int64_t rows, int64_t columns, int64_t row,
             int64_t column) {
  switch (format) {
    case ElementwiseFormat::f32: return scatter(static_cast<float*>(to), x, rows, columns, row, column);
    case ElementwiseFormat::b16: return scatter(static_cast<bf16*>(to), x, rows, columns, row, column);
    case ElementwiseFormat::boolean: return scatter(static_cast<uint8_t*>(to), x, rows, columns, row, column);
  }
}

// What the tile of an input holds, so that it is not gathered twice.
struct Held {
  const char* at;
  int64_t rows, columns;
};

// Where the elements of an input are read: where they lie, in a tile they were gathered to, or in a register that
// repeats the one value of a tile.
enum class Source { memory, tile, one_value };

constexpr int kMostOperands = 64;

// Whether a tile of several rows, or of one, lies in memory as it would in a tile.
LAMINA_INLINE bool in_place(const ElementwiseArgs& a, const ElementwiseTensor& x) {
  return x.format == ElementwiseFormat::f32 && (x.strides[0] == 1 || a.sizes[0] == 1) &&
         (a.tile_rows == 1 || x.strides[1] == a.sizes[0]);
}

void elementwise(const ElementwiseArgs& a) {
  Operand operands[kMostOperands];
  Held held[kMostOperands];
  float* scratch = a.scratch;
  const int inputs = a.input_count, first_slot = inputs + a.constant_count;
  Source source[kMostOperands];
  for (int k = 0; k < inputs; ++k) {
    const ElementwiseTensor& x = a.inputs[k];
    bool scalar = true;
    for (int d = 0; d < a.dims; ++d) scalar = scalar && (x.strides[d] == 0 || a.sizes[d] == 1);
    const bool level = a.tile_rows == 1 && x.strides[0] == 0 && a.sizes[0] > 1;
    source[k] = scalar || level ? Source::one_value : in_place(a, x) ? Source::memory : Source::tile;
    operands[k] = {scratch, source[k] == Source::one_value ? 0 : -1};
    held[k] = {nullptr, 0, 0};
    scratch += kStep;
  }
  for (int k = 0; k < a.constant_count; ++k, scratch += kSplat) {
    for (int i = 0; i < kSplat; ++i) scratch[i] = a.constants[k];
    operands[inputs + k] = {scratch, 0};
  }
  for (int k = 0; k <= a.slots; ++k, scratch += kStep) operands[first_slot + k] = {scratch, -1};
  float* const last_tile = operands[first_slot + a.slots].at;
  const bool direct = in_place(a, a.out);
  const int64_t column_tiles = (a.sizes[0] + a.tile_columns - 1) / a.tile_columns;
  const int64_t row_tiles = (a.sizes[1] + a.tile_rows - 1) / a.tile_rows;

  for (int64_t tile = a.begin; tile < a.end; ++tile) {
    int64_t index[kElementwiseDims];
    index[0] = tile % column_tiles * a.tile_columns;
    int64_t rest = tile / column_tiles;
    index[1] = rest % row_tiles * a.tile_rows;
    rest /= row_tiles;
    for (int d = 2; d < a.dims; ++d) {
      index[d] = d + 1 < a.dims ? rest % a.sizes[d] : rest;
      rest /= a.sizes[d];
    }
    const int64_t columns = a.sizes[0] - index[0] < a.tile_columns ? a.sizes[0] - index[0] : a.tile_columns;
    const int64_t rows = a.sizes[1] - index[1] < a.tile_rows ? a.sizes[1] - index[1] : a.tile_rows;
    const auto place = [&](const ElementwiseTensor& x) {
      int64_t offset = 0;
      for (int d = 0; d < a.dims; ++d) offset += index[d] * x.strides[d];
      return static_cast<char*>(x.data) + offset * element_size(x.format);
    };
    for (int k = 0; k < inputs; ++k) {
      const ElementwiseTensor& x = a.inputs[k];
      char* at = place(x);
      if (source[k] == Source::memory) {
        operands[k].at = reinterpret_cast<float*>(at);
      } else if (source[k] == Source::one_value) {
        if (held[k].at != at) gather(operands[k].at, x.format, at, 1, kSplat, 0, 0);
        held[k].at = at;
      } else if (held[k].at != at || held[k].rows < rows || held[k].columns != columns) {
        gather(operands[k].at, x.format, at, rows, columns, x.strides[1], x.strides[0]);
        held[k] = {at, rows, columns};
      }
    }
    char* out = place(a.out);
    const int64_t n = rows * columns;
    for (int s = 0; s < a.step_count; ++s) {
      const ElementwiseStep& step = a.steps[s];
      float* to = s + 1 < a.step_count ? operands[step.to].at : direct ? reinterpret_cast<float*>(out) : last_tile;
      run(step.code, to, operands[step.a], operands[step.b], operands[step.c], n);
    }
    if (!direct) scatter(a.out.format, out, last_tile, rows, columns, a.out.strides[1], a.out.strides[0]);
  }
}

REGISTER_KERNEL(elementwise_table, elementwise);

}  // namespace
}  // namespace lamina::LAMINA_ISA
