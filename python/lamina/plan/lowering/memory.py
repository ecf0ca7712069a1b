"""What only moves numbers, or makes another dtype of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lamina import _C, ops
from lamina.plan.lowering.table import FLOATS, LOWERINGS, Live, aten, is_channels_last, is_float, lowers


@lowers(aten.embedding.default)
def _embedding(
    live: Live,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    return ops.embedding(indices, weight) if weight.ndim == 2 and is_float(weight) else NotImplemented


@lowers(aten.cat.default)
def _cat(live: Live, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    # torch takes an empty tensor of any rank, and promotes dtypes.
    same = len({(t.dtype, t.ndim) for t in tensors}) == 1
    return ops.concatenate(list(tensors), dim) if same and tensors[0].ndim else NotImplemented


@lowers(aten.stack.default)
def _stack(live: Live, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    return _cat(live, [t.unsqueeze(dim) for t in tensors], dim)


@lowers(aten.clone.default)
def _clone(live: Live, input: Tensor, *, memory_format: torch.memory_format | None = None) -> Any:
    return _copy(input, input.dtype, memory_format)


@lowers(aten._to_copy.default)
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


# Each of a group into each other.
_CONVERTIBLE = (
    {*FLOATS, torch.float16, torch.bool},
    {torch.float32, torch.bool, torch.int32, torch.int64},
)


def _converts(a: torch.dtype, b: torch.dtype) -> bool:
    return a is b or any({a, b} <= group for group in _CONVERTIBLE)


def _copy(input: Tensor, dtype: torch.dtype, memory_format: torch.memory_format | None) -> Any:
    if not _converts(input.dtype, dtype):
        return NotImplemented
    if memory_format in (None, torch.preserve_format):
        # The dimensions in the order in which they lie, if nothing lies between them.
        order = sorted(range(input.ndim), key=lambda d: -input.stride(d))
        inner = input.permute(order)
        if inner.is_contiguous():
            return ops.copy(inner, dtype=dtype).permute([order.index(d) for d in range(input.ndim)])
        memory_format = torch.contiguous_format
    layouts = {torch.contiguous_format: "contiguous", torch.channels_last: "channels_last"}
    if memory_format not in layouts:
        return NotImplemented
    return ops.copy(input, dtype=dtype, layout=layouts[memory_format])


@lowers(aten.constant_pad_nd.default)
def _constant_pad_nd(live: Live, input: Tensor, pad: Sequence[int], value: float = 0) -> Any:
    """The input in the middle, then the constant on all sides of it."""
    around = [(0, 0)] * input.ndim
    for i in range(len(pad) // 2):
        around[input.ndim - 1 - i] = (pad[2 * i], pad[2 * i + 1])
    if not input.numel() or any(side < 0 for sides in around for side in sides):
        return NotImplemented
    if not any(map(any, around)):
        return _copy(input, input.dtype, None)
    shape = [size + sum(sides) for size, sides in zip(input.shape, around, strict=True)]
    layout = torch.channels_last if input.ndim == 4 and is_channels_last(input) else torch.contiguous_format
    out = torch.empty(shape, dtype=input.dtype, memory_format=layout)
    inner, margins = out, []
    for d, (before, after) in enumerate(around):
        margins += [inner.narrow(d, 0, before), inner.narrow(d, before + input.shape[d], after)]
        inner = inner.narrow(d, before, input.shape[d])
    _C.copy(input, inner)
    constant = torch.full((), value, dtype=input.dtype)
    for margin in margins:
        if margin.numel():
            _C.copy(constant.expand(margin.shape), margin)
    return out


@lowers(aten.index.Tensor)
def _index(live: Live, input: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """Places that hang on no input. Those that lie evenly (rows and columns of a mask) are copied, others gathered."""
    if not input.numel() or any(index is None or live(index) for index in indices):
        return NotImplemented
    count = len(indices)
    rest, rest_strides = input.shape[count:], input.stride()[count:]
    with _disable_current_modes():
        wrapped = [
            torch.where(index < 0, index + size, index).long()
            for index, size in zip(indices, input.shape, strict=False)
        ]
        if any(bool((index >= size).any()) for index, size in zip(wrapped, input.shape, strict=False)):
            return NotImplemented  # torch says so in its own words
        offsets = sum(index * stride for index, stride in zip(wrapped, input.stride(), strict=False))
        if not offsets.numel():
            return NotImplemented
        strides = [
            int((offsets.select(d, 1) - offsets.select(d, 0)).flatten()[0]) if n > 1 else 0
            for d, n in enumerate(offsets.shape)
        ]
        first = int(offsets.flatten()[0])
        even = first + sum(
            torch.arange(n).view(-1, *[1] * (offsets.ndim - 1 - d)) * strides[d] for d, n in enumerate(offsets.shape)
        )
        is_even = min(strides, default=0) >= 0 and torch.equal(offsets, even.expand_as(offsets))
    if is_even:
        places = (*offsets.shape, *rest), (*strides, *rest_strides)
        return ops.copy(input.as_strided(*places, input.storage_offset() + first))
    if not input.is_contiguous():
        return NotImplemented
    row = rest.numel()
    return ops.embedding(offsets // row, input.view(-1, row)).view(*offsets.shape, *rest)


# -- in place


def in_place(live: Live, func: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """What an op that writes to its first argument does: the op that does not write, and a copy; or NotImplemented."""
    target = args[0]
    if func is aten.copy_.default:
        source = args[1]
        if not _converts(source.dtype, target.dtype):
            return NotImplemented
        if source.untyped_storage().data_ptr() == target.untyped_storage().data_ptr():
            return NotImplemented
        _C.copy(source.expand(target.shape), target)
        return target
    name = func.overloadpacket._qualified_op_name.removeprefix("aten::").removesuffix("_")
    plain = getattr(getattr(aten, name, None), func._overloadname, None)
    lowering = LOWERINGS.get(plain)
    result = NotImplemented if lowering is None else lowering(live, *args, **kwargs)
    if result is NotImplemented or result.dtype is not target.dtype or result.shape != target.shape:
        return NotImplemented
    _C.copy(result, target)
    return target
