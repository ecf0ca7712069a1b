// Contract of elementwise: a short program of arithmetic, run over tiles of broadcast operands.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

// Every instruction: its name, how many operands it takes, and what an element of it costs beside one of an addition.
// Python knows them by name, in this order (ops/elementwise.py).
#define LAMINA_ELEMENTWISE_CODES(CODE) \
  CODE(add, 2, 1)                      \
  CODE(sub, 2, 1)                      \
  CODE(mul, 2, 1)                      \
  CODE(div, 2, 2)                      \
  CODE(neg, 1, 1)                      \
  CODE(abs, 1, 1)                      \
  CODE(sqrt, 1, 3)                     \
  CODE(rsqrt, 1, 4)                    \
  CODE(reciprocal, 1, 2)               \
  CODE(square, 1, 1)                   \
  CODE(cube, 1, 1)                     \
  CODE(pow, 2, 16)                     \
  CODE(exp, 1, 6)                      \
  CODE(log, 1, 8)                      \
  CODE(sin, 1, 8)                      \
  CODE(cos, 1, 8)                      \
  CODE(erf, 1, 6)                      \
  CODE(sigmoid, 1, 8)                  \
  CODE(tanh, 1, 8)                     \
  CODE(relu, 1, 1)                     \
  CODE(relu6, 1, 1)                    \
  CODE(gelu, 1, 4)                     \
  CODE(gelu_tanh, 1, 4)                \
  CODE(silu, 1, 4)                     \
  CODE(hardswish, 1, 2)                \
  CODE(maximum, 2, 1)                  \
  CODE(minimum, 2, 1)                  \
  CODE(floor, 1, 2)                    \
  CODE(round, 1, 1)                    \
  CODE(eq, 2, 1)                       \
  CODE(ne, 2, 1)                       \
  CODE(lt, 2, 1)                       \
  CODE(le, 2, 1)                       \
  CODE(gt, 2, 1)                       \
  CODE(ge, 2, 1)                       \
  CODE(logical_and, 2, 1)              \
  CODE(logical_or, 2, 1)               \
  CODE(logical_not, 1, 1)              \
  CODE(where, 3, 1)

enum class ElementwiseCode : uint8_t {
#define LAMINA_CODE(name, operands, cost) name,
  LAMINA_ELEMENTWISE_CODES(LAMINA_CODE)
#undef LAMINA_CODE
};

enum class ElementwiseFormat : uint8_t { f32, b16, boolean };

constexpr int kElementwiseDims = 16;

// A tensor, its strides from the innermost dimension outwards.
struct ElementwiseTensor {
  void* data;
  ElementwiseFormat format;
  int64_t strides[kElementwiseDims];
};

// Operands are counted: inputs, then constants, then `slots` tiles for results. The last step writes the output,
// whatever its `to`.
struct ElementwiseStep {
  ElementwiseCode code;
  int a, b, c;  // as many as the code takes
  int to;
};

struct ElementwiseArgs {
  const ElementwiseTensor* inputs;
  const float* constants;
  const ElementwiseStep* steps;
  int input_count, constant_count, slots, step_count;
  ElementwiseTensor out;
  int dims;                         // at least 2, the second of size 1 where there is only one
  int64_t sizes[kElementwiseDims];  // from the innermost dimension outwards
  // A tile is up to so many rows (of dimension 1) of so many columns (of dimension 0), kElementwiseTile elements at
  // most; several rows only where they are whole.
  int64_t tile_rows, tile_columns;
  int64_t begin, end;  // tiles to compute: columns first, then rows, then the other dimensions
  // elementwise_scratch(...) floats.
  float* scratch;
};

// Tiles for inputs, slots and the output, 16 floats apart so that they do not share their places in L1, and a register
// of each constant and scalar input.
constexpr int64_t elementwise_scratch(int64_t inputs, int64_t constants, int64_t slots, int64_t tile) {
  return (inputs + slots + 1) * (tile + 16) + constants * 16;
}

extern const KernelTable<void(const ElementwiseArgs&)> elementwise_table;

}  // namespace lamina
