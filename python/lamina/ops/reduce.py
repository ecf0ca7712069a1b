"""reduce: sum, mean, maximum or minimum over any dimensions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.library import define
from lamina.reference.reduce import REDUCTIONS


def _new_output(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    reduced = {dim % max(x.ndim, 1) for dim in dims} if dims else range(x.ndim)
    shape = [1 if i in reduced else size for i, size in enumerate(x.shape) if keepdim or i not in reduced]
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _cpu(x: Tensor, dims: Sequence[int], keepdim: bool, how: str) -> Tensor:
    out = _new_output(x, dims, keepdim)
    _C.reduce(x, dims, keepdim, how, out)
    return out


def _fake(x: Tensor, dims: Sequence[int], keepdim: bool, how: str) -> Tensor:
    most = max(x.ndim, 1)
    torch._check(
        all(-most <= dim < most for dim in dims),
        lambda: f"reduce: dims {list(dims)} are not all in [{-most}, {most})",
    )
    return _new_output(x, dims, keepdim)


_op = define("reduce(Tensor x, int[] dims, bool keepdim, str how) -> Tensor", cpu=_cpu, fake=_fake)


def reduce(x: Tensor, dim: int | Sequence[int] | None = None, how: str = "mean", keepdim: bool = False) -> Tensor:
    """`torch.sum`, `mean`, `amax` or `amin` over one dimension, several or all.

    Sums are float32 whatever the storage: in short chains that join pairwise, and those of every 512 elements with the
    rounding of each addition kept, so that a sum of millions is as good as one of hundreds. Their order hangs on the
    shape alone: the same bits on every run, for every number of threads and for all strides. As in torch, a NaN stays,
    and the mean of nothing is NaN; a maximum that is zero is +0. Fast where the reduced elements are adjacent (last
    dimensions, the pixels of contiguous images) or where the results are (tokens, the pixels of channels_last images).

    Calls that need gradients, other devices and dtypes than float32 and bfloat16 go to torch.

    Args:
        x: float32 or bfloat16, any shape and strides.
        dim: one dimension or several, from the end if negative; None or an empty list for all.
        how: "sum", "mean", "max" or "min".
        keepdim: leave the reduced dimensions, of size 1.

    Returns a contiguous tensor of x's dtype. Raises ValueError for dimensions that x does not have or that are given
    twice, for an unknown `how`, and for the maximum or minimum of nothing.

    >>> pooled = lamina.ops.reduce(images, (2, 3), "mean")
    """
    dims = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
    grad = torch.is_grad_enabled() and x.requires_grad
    if not grad and x.is_cpu and (x.dtype is torch.float32 or x.dtype is torch.bfloat16):
        return _op(x, dims, keepdim, how)
    if how not in REDUCTIONS:
        raise ValueError(f"reduce: how '{how}' is unknown; use {', '.join(REDUCTIONS)}")
    return REDUCTIONS[how](x, dims, keepdim)
