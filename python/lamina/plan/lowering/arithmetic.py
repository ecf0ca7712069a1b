"""Arithmetic, element by element: every op is a short program of instructions of `elementwise`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lamina import _C, ops
from lamina.ops.elementwise import elementwise_program
from lamina.plan.lowering.table import FLOATS, LOWERINGS, Live, Lowering, aten

# torch's op -> the instruction that takes the same operands in the same order.
_INSTRUCTIONS: dict[torch._ops.OpOverload, str] = {
    **{
        getattr(aten, name).default: name
        for name in ("neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log", "sin", "cos", "erf", "sigmoid", "tanh")
    },
    **{getattr(aten, name).default: name for name in ("relu", "hardswish", "floor", "round")},
    **{getattr(aten, name).Tensor: name for name in ("mul", "div", "eq", "ne", "lt", "le", "gt", "ge")},
    **{getattr(aten, name).Scalar: name for name in ("mul", "div", "eq", "ne", "lt", "le", "gt", "ge")},
    **{getattr(aten, name).default: name for name in ("maximum", "minimum")},
    **{getattr(aten, name).default: name for name in ("logical_and", "logical_or", "logical_not")},
    aten.pow.Tensor_Tensor: "pow",
    aten.where.self: "where",
    aten.where.ScalarOther: "where",
    aten.where.ScalarSelf: "where",
    aten.where.Scalar: "where",
}
_BETWEEN_BOOLS = {
    aten.bitwise_and.Tensor: "logical_and",
    aten.bitwise_or.Tensor: "logical_or",
    aten.bitwise_not.default: "logical_not",
}
_ELEMENTS = (*FLOATS, torch.bool)


class _Program:
    """A program in the making over operands as torch has them: tensors, numbers and earlier results."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.constants: list[float] = []
        self.steps: list[tuple[str, tuple[Any, ...]]] = []

    def do(self, code: str, *operands: Any) -> "_Program._Result":
        self.steps.append((code, operands))
        return self._Result(len(self.steps) - 1)

    class _Result(int):
        """The number of the step that gives it."""

    def run(self, like: Tensor) -> Tensor:
        """like: what the result must look like; views that follow count on its strides."""
        inputs: list[Tensor] = []
        constants: list[float] = []
        for _, operands in self.steps:
            for operand in operands:
                if isinstance(operand, Tensor):
                    if not any(operand is known for known in inputs):
                        inputs.append(operand)
                elif not isinstance(operand, self._Result) and float(operand) not in constants:
                    constants.append(float(operand))

        def place(operand: Any) -> int:
            if isinstance(operand, Tensor):
                return next(i for i, known in enumerate(inputs) if known is operand)
            if isinstance(operand, self._Result):
                return len(inputs) + len(constants) + operand
            return len(inputs) + constants.index(float(operand))

        program = [(code, *map(place, operands)) for code, operands in self.steps]
        out = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        _C.elementwise(inputs, elementwise_program(program), constants, out)
        return out


def _elementwise(function: Callable[..., bool | None], overload: torch._ops.OpOverload) -> Lowering:
    """function(program, *args, **kwargs) writes the program, and says False where it cannot."""

    def lowering(live: Live, *args: Any, **kwargs: Any) -> Any:
        args = _comparable(live, overload, args)
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not all(t.dtype in _ELEMENTS and t.device.type == "cpu" for t in tensors):
            return NotImplemented
        # What torch makes of these dtypes and strides.
        with _disable_current_modes():
            like = overload(*(_form_of(a) if isinstance(a, Tensor) else a for a in args), **kwargs)
        program = _Program()
        if like.dtype not in _ELEMENTS or function(program, *args, **kwargs) is False:
            return NotImplemented
        return program.run(like)

    return lowering


def _form_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
_INTEGERS = (torch.int8, torch.int32, torch.int64)
# Integers below are exact in float32, and what is not below does not come near them when it is rounded.
_EXACT = 2**24


def _comparable(live: Live, overload: torch._ops.OpOverload, args: tuple) -> tuple:
    """Integers that are compared with small ones which hang on no input: as float32, they compare the same."""
    if overload.overloadpacket.__name__ not in _COMPARISONS or any(
        isinstance(a, float) or (isinstance(a, Tensor) and a.dtype not in (*_INTEGERS, torch.bool)) for a in args
    ):
        return args
    known = [a for a in args if not isinstance(a, Tensor) or not live(a)]
    with _disable_current_modes():
        if not known or not all(bool((torch.as_tensor(a).long().abs() < _EXACT).all()) for a in known):
            return args
    return tuple(
        ops.copy(a, dtype=torch.float32) if isinstance(a, Tensor) and a.dtype is not torch.bool else a for a in args
    )


def _register_elementwise() -> None:
    def plain(code: str) -> Callable[..., bool | None]:
        def write(program: _Program, *operands: Any) -> None:
            program.do(code, *operands)

        return write

    for overload, code in _INSTRUCTIONS.items():
        LOWERINGS[overload] = _elementwise(plain(code), overload)
    for overload, code in _BETWEEN_BOOLS.items():

        def of_bools(program: _Program, *operands: Tensor, code: str = code) -> bool | None:
            if any(operand.dtype is not torch.bool for operand in operands):
                return False
            program.do(code, *operands)
            return None

        LOWERINGS[overload] = _elementwise(of_bools, overload)
    for overload, function in _WRITERS.items():
        LOWERINGS[overload] = _elementwise(function, overload)


def _add(program: _Program, a: Any, b: Any, alpha: float = 1) -> None:
    program.do("add", a, b if alpha == 1 else program.do("mul", b, alpha))


def _sub(program: _Program, a: Any, b: Any, alpha: float = 1) -> None:
    program.do("sub", a, b if alpha == 1 else program.do("mul", b, alpha))


def _rsub(program: _Program, a: Any, b: Any, alpha: float = 1) -> None:
    _sub(program, b, a, alpha)


def _pow(program: _Program, a: Tensor, exponent: float) -> None:
    named = {2.0: "square", 3.0: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}.get(float(exponent))
    if named:
        program.do(named, a)
    else:
        program.do("pow", a, exponent)


def _clamp(program: _Program, a: Tensor, low: Any = None, high: Any = None) -> bool | None:
    if low is None and high is None:
        return False
    if low is not None:
        a = program.do("maximum", a, low)
    if high is not None:
        program.do("minimum", a, high)
    return None


def _hardtanh(program: _Program, a: Tensor, low: float = -1.0, high: float = 1.0) -> None:
    _clamp(program, a, low, high)


# The instructions gelu and silu are made for bfloat16 and for layers in int8: float32 is spelled out, and right to the
# last digits.


def _gelu(program: _Program, a: Tensor, *, approximate: str = "none") -> None:
    if a.dtype is not torch.float32:
        program.do("gelu" if approximate == "none" else "gelu_tanh", a)
    elif approximate == "none":
        twice = program.do("add", program.do("erf", program.do("mul", a, 0.5**0.5)), 1.0)
        program.do("mul", program.do("mul", a, 0.5), twice)
    else:
        # x sigmoid(2 u) is x / 2 (1 + tanh(u)).
        slope = 2 * (2 / math.pi) ** 0.5
        grown = program.do("add", program.do("mul", program.do("square", a), 0.044715 * slope), slope)
        program.do("mul", a, program.do("sigmoid", program.do("mul", a, grown)))


def _silu(program: _Program, a: Tensor) -> None:
    if a.dtype is torch.float32:
        program.do("mul", a, program.do("sigmoid", a))
    else:
        program.do("silu", a)


def _masked_fill(program: _Program, a: Tensor, mask: Tensor, value: Any) -> None:
    program.do("where", mask, value, a)


def _addcmul(program: _Program, a: Tensor, b: Tensor, c: Tensor, *, value: float = 1) -> None:
    product = program.do("mul", b, c)
    program.do("add", a, product if value == 1 else program.do("mul", product, value))


_WRITERS: dict[torch._ops.OpOverload, Callable[..., bool | None]] = {
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _sub,
    aten.sub.Scalar: _sub,
    aten.rsub.Scalar: _rsub,
    aten.rsub.Tensor: _rsub,
    aten.pow.Tensor_Scalar: _pow,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: lambda program, a, low: _clamp(program, a, low),
    aten.clamp_max.default: lambda program, a, high: _clamp(program, a, None, high),
    aten.hardtanh.default: _hardtanh,
    aten.gelu.default: _gelu,
    aten.silu.default: _silu,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.addcmul.default: _addcmul,
}
_register_elementwise()
