"""softmax: along any dimension, in one visit of a row."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamina import _C
from lamina.ops.library import define

_DTYPES = (torch.float32, torch.bfloat16)


def _new_output(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _cpu(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    out = _new_output(x, dtype)
    _C.softmax(x, dim, out)
    return out


def _fake(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return _new_output(x, dtype)


_op = define("softmax(Tensor x, int dim, ScalarType? dtype=None) -> Tensor", cpu=_cpu, fake=_fake)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, dtype):
        out = _op(x, dim, dtype)
        ctx.save_for_backward(out)
        ctx.options = dim, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        dim, dtype = ctx.options
        return torch.ops.aten._softmax_backward_data(grad, out, dim, out.dtype).to(dtype), None, None


def softmax(x: Tensor, dim: int = -1, *, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.softmax`: e^(x - m) / sum of e^(x - m) along a dimension, with m the largest element.

    Computed in float32 whatever the storage, and rounded once, to the result's dtype; exponentials are within 1.5e-7 of
    their value, sums of long rows are float64. As in torch, a row that is -inf throughout gives NaN, and so does one
    that holds NaN or +inf. The same inputs give the same bits on every run, for every number of threads and for all
    strides. A last dimension of adjacent elements is fastest.

    The gradient is torch's own. Other devices and dtypes than float32 and bfloat16 go to torch.

    Args:
        x: float32 or bfloat16, any shape and strides.
        dim: along which the result sums to one; from the end if negative.
        dtype: of the result, x's by default. x itself is not rounded to it, as torch does.

    Returns a contiguous tensor of x's shape. Raises ValueError for a dimension that x does not have.

    >>> weights = lamina.ops.softmax(scores, dim=-1)
    """
    if not x.is_cpu or x.dtype not in _DTYPES or (dtype is not None and dtype not in _DTYPES):
        return torch.softmax(x, dim, dtype=dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _WithGradient.apply(x, dim, dtype)
    return _op(x, dim, dtype)
