"""torch's own ops, done by lamina's: what the recorder calls where a graph was left with one of torch's.

LOWERINGS[op](live, *args, **kwargs) gives what torch's op gives, or NotImplemented for arguments that lamina's does not
take: they go on as a call of torch. live(tensor): whether a tensor hangs on an input of the model; the functions are
asked only where one does. Weights that do not are packed here, once for all forms of inputs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lamina import _C, ops
from lamina.ops.attention import MAX_HEAD_SIZE
from lamina.ops.linear import PackedLinearWeight, pack_linear_weight
from lamina.ops.packed_cache import PackedCache

_aten = torch.ops.aten
_FLOATS = (torch.float32, torch.bfloat16)

Live = Callable[[Tensor], bool]
Lowering = Callable[..., Any]

LOWERINGS: dict[torch._ops.OpOverload, Lowering] = {}

# Functions of `_C` that write to an argument which is not blank.
MUTATING = {"attention_decode_append"}

_linear_weights: PackedCache[PackedLinearWeight] = PackedCache()


def _lowers(*overloads: torch._ops.OpOverload) -> Callable[[Lowering], Lowering]:
    def register(function: Lowering) -> Lowering:
        for overload in overloads:
            LOWERINGS[overload] = function
        return function

    return register


def _is_float(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype in _FLOATS for t in tensors)


# -- products


@_lowers(_aten.addmm.default)
def _addmm(live: Live, bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1 or bias.ndim != 1:
        return NotImplemented
    return _linear(live, x, weight.t(), bias)


@_lowers(_aten.mm.default)
def _mm(live: Live, x: Tensor, weight: Tensor) -> Any:
    return _linear(live, x, weight.t(), None)


@_lowers(_aten.linear.default)
def _linear(live: Live, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if live(weight) or weight.ndim != 2 or not {x.dtype, weight.dtype} <= {torch.float32}:
        return NotImplemented
    if bias is not None and bias.dtype is not torch.float32:
        return NotImplemented
    form = (tuple(weight.shape), weight.stride(), weight.dtype)
    packed = _linear_weights.get([weight], form, lambda: pack_linear_weight(weight))
    return ops.linear(x, packed, bias)


@_lowers(_aten.convolution.default)
def _convolution(
    live: Live,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    fits = not transposed and not live(weight) and input.dtype is weight.dtype and _is_float(input, weight)
    if not fits or weight.ndim not in (3, 4) or input.ndim != weight.ndim:
        return NotImplemented
    if weight.ndim == 4:
        return ops.conv2d(input, weight, bias, stride, padding, dilation, groups)
    # In one dimension: images of one row.
    stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    y = ops.conv2d(input.unsqueeze(2), weight.unsqueeze(2), bias, stride, padding, dilation, groups)
    return y.squeeze(2)


@_lowers(_aten._scaled_dot_product_flash_attention_for_cpu.default)
def _attention(
    live: Live,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    if dropout_p or not _is_float(query, key, value) or query.shape[-1] > MAX_HEAD_SIZE:
        return NotImplemented
    return _with_unused(ops.attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale), 1)


# -- norms, softmax, sums


@_lowers(_aten.native_layer_norm.default)
def _layer_norm(
    live: Live, input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    if not _is_float(input, weight, bias):
        return NotImplemented
    return _with_unused(ops.layer_norm(input, shape, weight, bias, eps), 2)


@_lowers(_aten.native_group_norm.default)
def _group_norm(
    live: Live,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    images: int,
    channels: int,
    pixels: int,
    groups: int,
    eps: float,
) -> Any:
    if not _is_float(input, weight, bias):
        return NotImplemented
    return _with_unused(ops.group_norm(input, groups, weight, bias, eps), 2)


@_lowers(_aten.native_batch_norm.default)
def _batch_norm(
    live: Live,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    parameters = [t for t in (weight, bias, mean, variance) if t is not None]
    if training or mean is None or variance is None or not _is_float(input, *parameters) or any(map(live, parameters)):
        return NotImplemented
    factor = (variance.float() + eps).rsqrt()
    if weight is not None:
        factor = factor * weight
    offset = -mean * factor if bias is None else bias - mean * factor
    shape = (1, -1, *[1] * (input.ndim - 2))
    inputs = [input, factor.reshape(shape), offset.reshape(shape)]
    y = ops.elementwise(inputs, [("mul", 0, 1), ("add", 3, 2)], dtype=input.dtype)
    return _with_unused(y, 2)


@_lowers(_aten._native_batch_norm_legit_no_training.default)
def _batch_norm_without_training(
    live: Live,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> Any:
    return _batch_norm(live, input, weight, bias, mean, variance, False, momentum, eps)


@_lowers(_aten._softmax.default)
def _softmax(live: Live, input: Tensor, dim: int, half_to_float: bool) -> Any:
    return NotImplemented if half_to_float or not _is_float(input) else ops.softmax(input, dim)


@_lowers(_aten.mean.dim)
def _mean(live: Live, input: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    return _reduce(input, dim, keepdim, "mean", dtype)


@_lowers(_aten.sum.dim_IntList)
def _sum(live: Live, input: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    return _reduce(input, dim, keepdim, "sum", dtype)


@_lowers(_aten.mean.default)
def _mean_of_all(live: Live, input: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    return _reduce(input, None, False, "mean", dtype)


@_lowers(_aten.sum.default)
def _sum_of_all(live: Live, input: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    return _reduce(input, None, False, "sum", dtype)


@_lowers(_aten.amax.default)
def _amax(live: Live, input: Tensor, dim: Any = (), keepdim: bool = False) -> Any:
    return _reduce(input, dim, keepdim, "max", None)


@_lowers(_aten.amin.default)
def _amin(live: Live, input: Tensor, dim: Any = (), keepdim: bool = False) -> Any:
    return _reduce(input, dim, keepdim, "min", None)


def _reduce(input: Tensor, dim: Any, keepdim: bool, how: str, dtype: torch.dtype | None) -> Any:
    if not _is_float(input) or dtype not in (None, input.dtype):
        return NotImplemented
    return ops.reduce(input, dim, how, keepdim)


# -- memory


@_lowers(_aten.embedding.default)
def _embedding(
    live: Live,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    return ops.embedding(indices, weight) if weight.ndim == 2 and _is_float(weight) else NotImplemented


@_lowers(_aten.cat.default)
def _cat(live: Live, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    # torch takes an empty tensor of any rank, and promotes dtypes.
    same = len({(t.dtype, t.ndim) for t in tensors}) == 1
    return ops.concatenate(list(tensors), dim) if same and tensors[0].ndim else NotImplemented


@_lowers(_aten.stack.default)
def _stack(live: Live, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    return _cat(live, [t.unsqueeze(dim) for t in tensors], dim)


@_lowers(_aten.clone.default)
def _clone(live: Live, input: Tensor, *, memory_format: torch.memory_format | None = None) -> Any:
    return _copy(input, input.dtype, memory_format)


@_lowers(_aten._to_copy.default)
def _to_copy(
    live: Live,
    input: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Any:
    if layout not in (None, torch.strided) or (device is not None and device.type != "cpu") or pin_memory:
        return NotImplemented
    return _copy(input, dtype or input.dtype, memory_format)


_CONVERTIBLE = (*_FLOATS, torch.float16, torch.bool)


def _copy(input: Tensor, dtype: torch.dtype, memory_format: torch.memory_format | None) -> Any:
    if dtype is not input.dtype and not {input.dtype, dtype} <= set(_CONVERTIBLE):
        return NotImplemented
    if memory_format in (None, torch.preserve_format):
        last = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
        memory_format = torch.channels_last if last else torch.contiguous_format
    layouts = {torch.contiguous_format: "contiguous", torch.channels_last: "channels_last"}
    if memory_format not in layouts:
        return NotImplemented
    return ops.copy(input, dtype=dtype, layout=layouts[memory_format])


# -- pooling


@_lowers(_aten.max_pool2d_with_indices.default)
def _max_pool2d(
    live: Live,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Any:
    if not _is_float(input):
        return NotImplemented
    y = ops.max_pool2d(input, kernel, stride or kernel, padding, dilation, ceil_mode)
    return _with_unused(y, 1)


@_lowers(_aten.avg_pool2d.default)
def _avg_pool2d(
    live: Live,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    if not _is_float(input):
        return NotImplemented
    return ops.avg_pool2d(input, kernel, stride or kernel, padding, ceil_mode, count_include_pad, divisor_override)


@_lowers(_aten._adaptive_avg_pool2d.default)
def _adaptive_avg_pool2d(live: Live, input: Tensor, output_size: Sequence[int]) -> Any:
    return ops.adaptive_avg_pool2d(input, output_size) if _is_float(input) else NotImplemented


# -- arithmetic, element by element

# torch's op -> the instruction that takes the same operands in the same order.
_INSTRUCTIONS: dict[torch._ops.OpOverload, str] = {
    **{
        getattr(_aten, name).default: name
        for name in ("neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log", "sin", "cos", "erf", "sigmoid", "tanh")
    },
    **{getattr(_aten, name).default: name for name in ("relu", "hardswish", "floor", "round")},
    **{getattr(_aten, name).Tensor: name for name in ("mul", "div", "eq", "ne", "lt", "le", "gt", "ge")},
    **{getattr(_aten, name).Scalar: name for name in ("mul", "div", "eq", "ne", "lt", "le", "gt", "ge")},
    **{getattr(_aten, name).default: name for name in ("maximum", "minimum")},
    **{getattr(_aten, name).default: name for name in ("logical_and", "logical_or", "logical_not")},
    _aten.pow.Tensor_Tensor: "pow",
    _aten.where.self: "where",
    _aten.where.ScalarOther: "where",
    _aten.where.ScalarSelf: "where",
    _aten.where.Scalar: "where",
}
_BETWEEN_BOOLS = {
    _aten.bitwise_and.Tensor: "logical_and",
    _aten.bitwise_or.Tensor: "logical_or",
    _aten.bitwise_not.default: "logical_not",
}
_ELEMENTS = (*_FLOATS, torch.bool)


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

    def run(self, dtype: torch.dtype) -> Tensor:
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
        return ops.elementwise(inputs, program, constants, dtype=dtype)


def _elementwise(function: Callable[..., bool | None], overload: torch._ops.OpOverload) -> Lowering:
    """function(program, *args, **kwargs) writes the program, and says False where it cannot."""

    def lowering(live: Live, *args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not all(t.dtype in _ELEMENTS and t.device.type == "cpu" for t in tensors):
            return NotImplemented
        # What torch makes of these dtypes.
        like = [torch.empty((0,) * t.ndim, dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t for t in args]
        dtype = overload(*like, **kwargs).dtype
        program = _Program()
        if dtype not in _ELEMENTS or function(program, *args, **kwargs) is False:
            return NotImplemented
        return program.run(dtype)

    return lowering


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
    _aten.add.Tensor: _add,
    _aten.add.Scalar: _add,
    _aten.sub.Tensor: _sub,
    _aten.sub.Scalar: _sub,
    _aten.rsub.Scalar: _rsub,
    _aten.rsub.Tensor: _rsub,
    _aten.pow.Tensor_Scalar: _pow,
    _aten.clamp.default: _clamp,
    _aten.clamp_min.default: lambda program, a, low: _clamp(program, a, low),
    _aten.clamp_max.default: lambda program, a, high: _clamp(program, a, None, high),
    _aten.hardtanh.default: _hardtanh,
    _aten.gelu.default: _gelu,
    _aten.silu.default: _silu,
    _aten.masked_fill.Scalar: _masked_fill,
    _aten.masked_fill.Tensor: _masked_fill,
    _aten.addcmul.default: _addcmul,
}
_register_elementwise()


# -- in place


def in_place(live: Live, func: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """What an op that writes to its first argument does: the op that does not write, and a copy; or NotImplemented."""
    target = args[0]
    if func is _aten.copy_.default:
        source = args[1]
        if source.dtype is not target.dtype and not {source.dtype, target.dtype} <= set(_CONVERTIBLE):
            return NotImplemented
        if source.untyped_storage().data_ptr() == target.untyped_storage().data_ptr():
            return NotImplemented
        _C.copy(source.expand(target.shape), target)
        return target
    name = func.overloadpacket._qualified_op_name.removeprefix("aten::").removesuffix("_")
    plain = getattr(getattr(_aten, name, None), func._overloadname, None)
    lowering = LOWERINGS.get(plain)
    result = NotImplemented if lowering is None else lowering(live, *args, **kwargs)
    if result is NotImplemented or result.dtype is not target.dtype or result.shape != target.shape:
        return NotImplemented
    _C.copy(result, target)
    return target


def _with_unused(result: Tensor, others: int) -> tuple[Tensor, ...]:
    """A result in the place of a tuple whose other parts only a gradient would read."""
    return result, *(torch.empty(0) for _ in range(others))
