#include "ops/elementwise.h"

#include <algorithm>

#include "cpu/kernels/elementwise.h"
#include "cpu/tuning/elementwise.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/strided.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const ElementwiseArgs&)> elementwise_table;

namespace {

constexpr const char* kOp = "elementwise";
constexpr int kMostOperands = 64;
constexpr int kWidth = 4;  // numbers of an instruction
static_assert(kMostDims == kElementwiseDims);

struct CodeInfo {
  const char* name;
  int operands, cost;
};

constexpr CodeInfo kCodes[] = {
#define LAMINA_CODE(name, operands, cost) {#name, operands, cost},
    LAMINA_ELEMENTWISE_CODES(LAMINA_CODE)
#undef LAMINA_CODE
};

ElementwiseFormat format_of(const char* what, const TensorView& t) {
  check_dtype(kOp, what, t, {DType::float32, DType::bfloat16, DType::boolean});
  return t.dtype == DType::float32    ? ElementwiseFormat::f32
         : t.dtype == DType::bfloat16 ? ElementwiseFormat::b16
                                      : ElementwiseFormat::boolean;
}

// Strides with which t is walked through in the shape of `out`.
void broadcast_strides(int index, const TensorView& t, const TensorView& out, int64_t* strides) {
  const int missing = out.ndim - t.ndim;
  bool fits = missing >= 0;
  for (int d = 0; fits && d < t.ndim; ++d) fits = t.shape[d] == 1 || t.shape[d] == out.shape[d + missing];
  check(fits, kOp, "inputs[", index, "] is ", describe(t), ", but must broadcast to the shape of out, ", describe(out));
  for (int d = 0; d < out.ndim; ++d) strides[d] = d < missing || t.shape[d - missing] == 1 ? 0 : t.strides[d - missing];
}

// pow with these exponents is what torch computes for them.
void simplify_power(ElementwiseStep& step, double exponent) {
  using enum ElementwiseCode;
  if (exponent == 2) {
    step.code = square;
  } else if (exponent == 3) {
    step.code = cube;
  } else if (exponent == 0.5) {
    step.code = sqrt;
  } else if (exponent == -0.5) {
    step.code = rsqrt;
  } else if (exponent == -1) {
    step.code = reciprocal;
  } else if (exponent == 1) {
    // The larger of x and x.
    step.code = maximum;
    step.b = step.a;
  }
}

struct Program {
  ElementwiseStep* steps;
  int count, slots;
  int64_t cost;  // of an element
};

// Checks the program and gives its results places: as few tiles as possible, so that they stay in L1.
Program read_program(const std::vector<int64_t>& numbers, int inputs, const std::vector<double>& constants,
                     WorkspaceFrame& frame) {
  check(!numbers.empty() && numbers.size() % kWidth == 0, kOp, "program has ", numbers.size(),
        " numbers, but must have four for each of its instructions");
  const int count = int(numbers.size() / kWidth), given = inputs + int(constants.size());
  check(given < kMostOperands, kOp, "there are ", given, " inputs and constants, but at most ", kMostOperands - 1,
        " are taken");
  ElementwiseStep* steps = frame.take<ElementwiseStep>(size_t(count));
  int* last_use = frame.take<int>(size_t(count));
  int* place = frame.take<int>(size_t(count));
  Program program = {steps, count, 0, 0};
  for (int s = 0; s < count; ++s) {
    const int64_t* number = numbers.data() + kWidth * s;
    check(number[0] >= 0 && number[0] < int64_t(std::size(kCodes)), kOp, "instruction ", s, " has code ", number[0],
          ", but codes are 0 to ", std::size(kCodes) - 1);
    const CodeInfo& info = kCodes[number[0]];
    int operands[3] = {0, 0, 0};
    for (int o = 0; o < 3; ++o) {
      const int64_t operand = number[1 + o];
      if (o >= info.operands) {
        check(operand == -1, kOp, "instruction ", s, ", ", info.name, ", takes ", info.operands,
              " operands, the others must be -1, not ", operand);
        continue;
      }
      check(operand >= 0 && operand < given + s, kOp, "instruction ", s, ", ", info.name, ", has operand ", operand,
            ", but there are ", given + s, " inputs, constants and results before it");
      operands[o] = int(operand);
      if (operand >= given) last_use[operand - given] = s;
    }
    last_use[s] = s;
    steps[s] = {ElementwiseCode(number[0]), operands[0], operands[1], operands[2], 0};
    if (steps[s].code == ElementwiseCode::pow && steps[s].b >= inputs && steps[s].b < given) {
      simplify_power(steps[s], constants[size_t(steps[s].b - inputs)]);
    }
    program.cost += kCodes[int(steps[s].code)].cost;
  }
  bool taken[kMostOperands] = {};
  for (int s = 0; s < count; ++s) {
    for (int* operand : {&steps[s].a, &steps[s].b, &steps[s].c}) {
      if (*operand < given) continue;
      const int result = *operand - given;
      // A result that is not needed any more may be overwritten by this one: elements are read before they are written.
      if (last_use[result] == s) taken[place[result]] = false;
      *operand = given + place[result];
    }
    int slot = 0;
    while (taken[slot]) ++slot;
    check(given + slot + 2 < kMostOperands, kOp, "the program has more than ", kMostOperands - 2,
          " inputs, constants and results to keep at a time");
    place[s] = slot;
    taken[slot] = last_use[s] > s;
    steps[s].to = given + slot;
    program.slots = std::max(program.slots, slot + 1);
  }
  return program;
}

}  // namespace

void elementwise(const std::vector<TensorView>& inputs, const std::vector<int64_t>& program,
                 const std::vector<double>& constants, const TensorView& out) {
  check(!inputs.empty(), kOp, "inputs is empty, but must hold at least one tensor");
  check(out.ndim <= kMostDims, kOp, "out has ", out.ndim, " dimensions, but at most ", kMostDims, " are taken");
  const int input_count = int(inputs.size());
  WorkspaceFrame frame;
  const Program steps = read_program(program, input_count, constants, frame);
  float* values = frame.take<float>(constants.size());
  for (size_t i = 0; i < constants.size(); ++i) values[i] = float(constants[i]);

  // Operand 0 is the output.
  auto* strides = frame.take<int64_t[kMostDims]>(size_t(input_count) + 1);
  auto* walked = frame.take<int64_t[kMostDims]>(size_t(input_count) + 1);
  std::copy_n(out.strides, out.ndim, strides[0]);
  for (int k = 0; k < input_count; ++k) broadcast_strides(k, inputs[size_t(k)], out, strides[k + 1]);
  ElementwiseTensor* tensors = frame.take<ElementwiseTensor>(size_t(input_count));
  ElementwiseArgs args = {};
  args.out = {out.data, format_of("out", out), {}};
  for (int k = 0; k < input_count; ++k) {
    tensors[k] = {inputs[size_t(k)].data, format_of("an input", inputs[size_t(k)]), {}};
  }
  if (out.numel() == 0) return;
  check(!repeats_memory(out), kOp, "out is expanded; use memory of its own for each element");

  args.dims = collapse_dims(out.ndim, out.shape, input_count + 1, strides, args.sizes, walked);
  if (args.dims == 1) {
    args.dims = 2;
    args.sizes[1] = 1;
    for (int k = 0; k <= input_count; ++k) walked[k][1] = 0;
  }
  std::copy_n(walked[0], args.dims, args.out.strides);
  for (int k = 0; k < input_count; ++k) std::copy_n(walked[k + 1], args.dims, tensors[k].strides);

  constexpr int64_t tile = tuning::kElementwiseTile;
  // Tiles of one row are about equally long, in whole cache lines.
  const int64_t pieces = (args.sizes[0] + tile - 1) / tile;
  args.tile_columns = std::min(args.sizes[0], (args.sizes[0] + 16 * pieces - 1) / (16 * pieces) * 16);
  args.tile_rows = std::min(args.sizes[1], std::max<int64_t>(1, tile / args.sizes[0]));
  int64_t tiles = (args.sizes[0] + args.tile_columns - 1) / args.tile_columns;
  tiles *= (args.sizes[1] + args.tile_rows - 1) / args.tile_rows;
  for (int d = 2; d < args.dims; ++d) tiles *= args.sizes[d];
  args.inputs = tensors;
  args.constants = values;
  args.steps = steps.steps;
  args.input_count = input_count;
  args.constant_count = int(constants.size());
  args.slots = steps.slots;
  args.step_count = steps.count;

  const auto kernel = elementwise_table.get();
  const int64_t work = args.tile_columns * args.tile_rows * std::max<int64_t>(steps.cost, 1);
  const int64_t grain = std::max<int64_t>(1, tuning::kElementwiseWorkPerThread / work);
  parallel_ranges(tiles, grain, [&](int64_t begin, int64_t end) {
    WorkspaceFrame own;
    ElementwiseArgs share = args;
    share.begin = begin;
    share.end = end;
    share.scratch = own.take<float>(size_t(elementwise_scratch(input_count, args.constant_count, args.slots, tile)));
    kernel(share);
  });
}

}  // namespace lamina
