"""concatenate: tensors one behind the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.library import define


def _is_channels_last(t: Tensor) -> bool:
    return not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _common_shape(tensors: Sequence[Tensor], dim: int) -> list[int]:
    if not tensors:
        raise ValueError("concatenate: tensors is empty, but must hold at least one")
    first = tensors[0]
    if not -first.ndim <= dim < first.ndim:
        raise ValueError(f"concatenate: dim is {dim}, but tensors have {first.ndim} dimensions")
    along = dim % first.ndim
    shape = list(first.shape)
    for i, t in enumerate(tensors[1:], start=1):
        if t.dtype != first.dtype:
            raise ValueError(f"concatenate: tensors[{i}] is {t.dtype}, but must be {first.dtype} as tensors[0] is")
        size = t.shape
        fits = size == first.shape or (
            t.ndim == first.ndim and all(size[d] == shape[d] for d in range(first.ndim) if d != along)
        )
        if not fits:
            raise ValueError(
                f"concatenate: tensors[{i}] has shape {list(size)}, but must have that of tensors[0], "
                f"{list(first.shape)}, except in dimension {along}"
            )
        shape[along] = shape[along] + size[along]
    return shape


def _new_result(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """channels_last if all tensors are, else contiguous."""
    shape = _common_shape(tensors, dim)
    first = tensors[0]
    if len(shape) == 4 and all(map(_is_channels_last, tensors)):
        return torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=torch.channels_last)
    return first.new_empty(shape)


def _cpu(tensors: Sequence[Tensor], dim: int) -> Tensor:
    out = _new_result(tensors, dim)
    _C.concatenate(tensors, dim, out)
    return out


def _fake(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return _new_result(tensors, dim)


_op = define("concatenate(Tensor[] tensors, int dim) -> Tensor", cpu=_cpu, fake=_fake)


def concatenate(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`: tensors one behind the other in dimension `dim`.

    Calls that need gradients and other devices than the CPU run in torch.

    Args:
        tensors: of one dtype, of 1 to 16 dimensions and any strides, of one shape but for dimension dim.
        dim: the dimension, from the end if negative.

    Returns a new tensor, in torch.channels_last if all tensors are, else contiguous. Raises ValueError when shapes or
    dtypes do not fit; nothing is promoted.

    >>> y = lamina.ops.concatenate([features, skipped], 1)
    """
    grad = torch.is_grad_enabled()
    for t in tensors:
        if not t.is_cpu or (grad and t.requires_grad):
            _common_shape(tensors, dim)
            return torch.cat(list(tensors), dim)
    return _op(tensors, dim)
