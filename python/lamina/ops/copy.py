"""copy: the values of a tensor in fresh memory, in another layout or dtype."""

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.library import define

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _format(x: Tensor, layout: str) -> torch.memory_format:
    if layout not in LAYOUTS:
        raise ValueError(f"copy: layout '{layout}' is unknown; use {' or '.join(LAYOUTS)}")
    if layout == "channels_last" and x.ndim != 4:
        raise ValueError(f"copy: x has {x.ndim} dimensions, but must have 4 for channels_last")
    return LAYOUTS[layout]


def _new_result(x: Tensor, dtype: torch.dtype | None, layout: str) -> Tensor:
    # torch.empty_like is half as dear as torch.empty.
    return torch.empty_like(x, dtype=dtype, memory_format=_format(x, layout))


def _cpu(x: Tensor, dtype: torch.dtype | None, layout: str) -> Tensor:
    out = _new_result(x, dtype, layout)
    _C.copy(x, out)
    return out


def _fake(x: Tensor, dtype: torch.dtype | None, layout: str) -> Tensor:
    return _new_result(x, dtype, layout)


_op = define("copy(Tensor x, ScalarType? dtype, str layout) -> Tensor", cpu=_cpu, fake=_fake)


def copy(x: Tensor, *, dtype: torch.dtype | None = None, layout: str = "contiguous") -> Tensor:
    """The values of x in fresh memory: `x.to(dtype, copy=True, memory_format=...)`, bit for bit.

    Transpositions (NCHW to channels_last and back, heads that are split off or merged) go through registers in squares.

    Calls that need gradients and other devices than the CPU run in torch.

    Args:
        x: any shape of up to 16 dimensions and any strides.
        dtype: of the result; that of x by default. float32, int32, int64 and bool are converted into each other, so
            are float32, bfloat16, float16 and bool, and int8 to these four. What an integer cannot hold (NaN, 1e30)
            becomes some number, as in torch.
        layout: "contiguous", or "channels_last" for four dimensions.

    Returns a new tensor of the shape of x. Raises ValueError when dtype or layout do not fit.

    >>> y = lamina.ops.copy(x.transpose(1, 2))
    """
    if not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
        return x.to(dtype or x.dtype, copy=True, memory_format=_format(x, layout))
    return _op(x, dtype, layout)
