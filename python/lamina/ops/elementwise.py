"""elementwise: a short program of arithmetic over broadcast tensors, in one pass over memory."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.library import define
from lamina.reference.elementwise import elementwise as composed

# Every instruction and how many operands it takes, in the order of csrc/cpu/kernels/elementwise.h: an instruction's
# code is its place here.
INSTRUCTIONS = {
    "add": 2,
    "sub": 2,
    "mul": 2,
    "div": 2,
    "neg": 1,
    "abs": 1,
    "sqrt": 1,
    "rsqrt": 1,
    "reciprocal": 1,
    "square": 1,
    "cube": 1,
    "pow": 2,
    "exp": 1,
    "log": 1,
    "sin": 1,
    "cos": 1,
    "erf": 1,
    "sigmoid": 1,
    "tanh": 1,
    "relu": 1,
    "relu6": 1,
    "gelu": 1,
    "gelu_tanh": 1,
    "silu": 1,
    "hardswish": 1,
    "maximum": 2,
    "minimum": 2,
    "floor": 1,
    "round": 1,
    "eq": 2,
    "ne": 2,
    "lt": 2,
    "le": 2,
    "gt": 2,
    "ge": 2,
    "logical_and": 2,
    "logical_or": 2,
    "logical_not": 1,
    "where": 3,
}
NAMES = tuple(INSTRUCTIONS)
CODES = {name: code for code, name in enumerate(NAMES)}
# Those whose results are truths.
TRUTHS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"})
# What an instruction is in a program: its code and three operands.
WIDTH = 4

DTYPES = (torch.float32, torch.bfloat16, torch.bool)


@functools.lru_cache(maxsize=1024)
def _encoded(program: tuple[tuple, ...]) -> tuple[int, ...]:
    numbers: list[int] = []
    for i, (name, *operands) in enumerate(program):
        if name not in CODES:
            raise ValueError(f"elementwise: instruction {i} is '{name}'; use one of {', '.join(NAMES)}")
        if len(operands) != INSTRUCTIONS[name]:
            raise ValueError(
                f"elementwise: instruction {i}, {name}, has {len(operands)} operands, but takes {INSTRUCTIONS[name]}"
            )
        numbers += [CODES[name], *operands, *[-1] * (WIDTH - 1 - len(operands))]
    return tuple(numbers)


def elementwise_program(program: Sequence[tuple]) -> tuple[int, ...]:
    """The numbers of a program of (name, operand, ...), as torch.ops.lamina.elementwise takes them.

    >>> elementwise_program([("add", 0, 1), ("relu", 2)])
    (0, 0, 1, -1, 19, 2, -1, -1)
    """
    return _encoded(tuple(map(tuple, program)))


def instructions(program: Sequence[int]) -> list[tuple]:
    """The (name, operand, ...) of the numbers of a program."""
    found = []
    for at in range(0, len(program), WIDTH):
        name = NAMES[program[at]]
        found.append((name, *program[at + 1 : at + 1 + INSTRUCTIONS[name]]))
    return found


def _common_shape(inputs: Sequence[Tensor]) -> Sequence[int]:
    shape = inputs[0].shape
    for t in inputs:
        if t.shape != shape:
            break
    else:
        return shape
    ndim = max(t.ndim for t in inputs)
    sizes = [1] * ndim
    for t in inputs:
        for d, size in enumerate(t.shape, ndim - t.ndim):
            if size != 1:
                if sizes[d] != 1 and sizes[d] != size:
                    shapes = ", ".join(str(list(t.shape)) for t in inputs)
                    raise ValueError(f"elementwise: inputs of shapes {shapes} do not broadcast")
                sizes[d] = size
    return tuple(sizes)


def _new_result(inputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Of the common shape; channels_last if the first input of that shape is, else contiguous."""
    if not inputs:
        raise ValueError("elementwise: inputs is empty, but must hold at least one tensor")
    shape = _common_shape(inputs)
    for t in inputs:
        if t.shape == shape:
            last = len(shape) == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
            # torch.empty_like is half as dear as torch.empty.
            return torch.empty_like(
                t, dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format
            )
    return torch.empty(shape, dtype=dtype, device=inputs[0].device)


def _cpu(inputs: Sequence[Tensor], program: Sequence[int], constants: Sequence[float], dtype: torch.dtype) -> Tensor:
    out = _new_result(inputs, dtype)
    _C.elementwise(inputs, program, constants, out)
    return out


def _fake(inputs: Sequence[Tensor], program: Sequence[int], constants: Sequence[float], dtype: torch.dtype) -> Tensor:
    return _new_result(inputs, dtype)


_op = define(
    "elementwise(Tensor[] inputs, int[] program, float[] constants, ScalarType dtype) -> Tensor",
    cpu=_cpu,
    fake=_fake,
)


def elementwise(
    inputs: Sequence[Tensor],
    program: Sequence[tuple],
    constants: Sequence[float] = (),
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Runs a short program of arithmetic over tensors that broadcast, in one pass over memory.

    A program is a sequence of instructions (name, operand, ...). Operands are counted: inputs first, then constants,
    then the results of instructions; the last result is what comes out. Names: add, sub, mul, div, neg, abs, sqrt,
    rsqrt, reciprocal, square, cube, pow, exp, log, sin, cos, erf, sigmoid, tanh, relu, relu6, gelu, gelu_tanh, silu,
    hardswish, maximum, minimum, floor, round (half to even), eq, ne, lt, le, gt, ge, logical_and, logical_or,
    logical_not (all of these give 1 or 0), where (condition, then, else).

    Everything is computed in float32 and rounded once, at the end. Arithmetic, comparisons, maxima and rounding are
    torch's bit for bit, square roots are rounded correctly; exp, log, sin, cos, erf, sigmoid, tanh and pow are within
    5e-7 (relative, sin and cos absolute; results below the smallest normal number may be 0), gelu, gelu_tanh and silu
    within 3e-6. The same inputs give the same bits on every run and for every number of threads.

    Calls that need gradients, other dtypes and other devices run instruction by instruction in torch.

    Args:
        inputs: float32, bfloat16 or bool (as 1 and 0), any strides.
        program: the instructions.
        constants: numbers that instructions may take.
        dtype: of the result, torch.float32, torch.bfloat16 or torch.bool (what is not 0). By default bool after a
            comparison, else the widest of the inputs.

    Returns a tensor of the shape that all inputs broadcast to, in torch.channels_last if the first input of that shape
    is, else contiguous. Raises ValueError when the program, shapes or dtypes do not fit.

    >>> y = lamina.ops.elementwise([x, bias], [("add", 0, 1), ("mul", 3, 2), ("gelu", 4)], [0.5])
    """
    numbers = elementwise_program(program)
    if not inputs or not numbers:
        raise ValueError("elementwise: inputs and program must hold at least one tensor and one instruction")
    grad = torch.is_grad_enabled()
    widest, ours = None, True
    for t in inputs:
        given = t.dtype
        if given is not torch.bool and given is not widest:
            widest = given if widest is None else torch.promote_types(widest, given)
        ours = ours and given in DTYPES and t.is_cpu and not (grad and t.requires_grad)
    if dtype is None:
        dtype = torch.bool if program[-1][0] in TRUTHS else widest or torch.float32
    if ours:
        return _op(inputs, numbers, constants, dtype)
    _common_shape(inputs)
    return composed(inputs, program, constants).to(dtype)
