"""pool2d: max, average and adaptive average pooling of floating-point images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.library import define
from lamina.ops.pool_windows import check_windows, output_size, pair
from lamina.reference.pool2d import pool2d as composed


def _new_result(x: Tensor, kind: str, kernel, stride, padding, dilation, ceil_mode: bool) -> Tensor:
    """channels_last if x is, else contiguous."""
    shape = [*x.shape[:2], *output_size(x.shape[2:], kind, kernel, stride, padding, dilation, ceil_mode)]
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.new_empty(shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _cpu(
    x: Tensor,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    check_windows("pool2d", x, kind, kernel, stride, padding, dilation, divisor)
    images = x if x.ndim == 4 else x.unsqueeze(0)
    out = _new_result(images, kind, kernel, stride, padding, dilation, ceil_mode)
    _C.pool2d(images, kind, kernel, stride, padding, dilation, count_include_pad, divisor or 0, out)
    return out if x.ndim == 4 else out.squeeze(0)


def _fake(
    x: Tensor,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    torch._check(x.ndim in (3, 4), lambda: f"pool2d: x has {x.ndim} dimensions, but must have 3 or 4")
    images = x if x.ndim == 4 else x.unsqueeze(0)
    out = _new_result(images, kind, kernel, stride, padding, dilation, ceil_mode)
    return out if x.ndim == 4 else out.squeeze(0)


_op = define(
    "pool2d(Tensor x, str kind, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
    "bool count_include_pad, int? divisor) -> Tensor",
    cpu=_cpu,
    fake=_fake,
)


def pool2d(
    x: Tensor,
    kind: str,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Pooling as torch defines it: the largest value of each window and channel (a NaN if it holds one), or the mean.

    Means are sums in float32, column by column, divided once; bfloat16 is rounded at the end. The same inputs give the
    same bits on every run, in both layouts and for every number of threads.

    Calls that need gradients, other dtypes and other devices run in torch.

    Args:
        x: [images, channels, height, width] or [channels, height, width], float32 or bfloat16; fast when contiguous or
            in torch.channels_last.
        kind: "max", "avg" or "adaptive_avg".
        kernel_size, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override: as in
            torch.nn.functional.max_pool2d and avg_pool2d; kernel_size is the output's size for "adaptive_avg", and
            dilation goes with "max" only.

    Returns [images, channels, ...] in torch.channels_last if x is, else contiguous. Raises ValueError when shapes or
    windows do not fit.

    >>> y = lamina.ops.pool2d(x, "max", 3, stride=2, padding=1)
    """
    stride = kernel_size if stride is None else stride
    kernel, stride, padding, dilation = (pair(value) for value in (kernel_size, stride, padding, dilation))
    arguments = kind, kernel, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override
    supported = x.dtype is torch.float32 or x.dtype is torch.bfloat16
    if not supported or not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
        check_windows("pool2d", x, kind, kernel, stride, padding, dilation, divisor_override)
        return composed(x, *arguments)
    return _op(x, *arguments)


def max_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """`pool2d` of kind "max".

    >>> y = lamina.ops.max_pool2d(x, 3, stride=2, padding=1)
    """
    return pool2d(x, "max", kernel_size, stride, padding, dilation, ceil_mode)


def avg_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`pool2d` of kind "avg".

    >>> y = lamina.ops.avg_pool2d(x, 2)
    """
    return pool2d(x, "avg", kernel_size, stride, padding, 1, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool2d(x: Tensor, output_size: int | Sequence[int]) -> Tensor:
    """`pool2d` of kind "adaptive_avg".

    >>> features = lamina.ops.adaptive_avg_pool2d(x, 1)
    """
    return pool2d(x, "adaptive_avg", output_size, 1)


def _one(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]


def max_pool1d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """`pool2d` of kind "max" of x [images, channels, length] or [channels, length].

    >>> y = lamina.ops.max_pool1d(x, 3, stride=2, padding=1)
    """
    stride = kernel_size if stride is None else stride
    windows = [1, _one(kernel_size)], [1, _one(stride)], [0, _one(padding)], [1, _one(dilation)]
    return pool2d(x.unsqueeze(-2), "max", *windows, ceil_mode).squeeze(-2)


def avg_pool1d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """`pool2d` of kind "avg" of x [images, channels, length] or [channels, length].

    >>> y = lamina.ops.avg_pool1d(x, 2)
    """
    stride = kernel_size if stride is None else stride
    windows = [1, _one(kernel_size)], [1, _one(stride)], [0, _one(padding)]
    return pool2d(x.unsqueeze(-2), "avg", *windows, 1, ceil_mode, count_include_pad).squeeze(-2)


def adaptive_avg_pool1d(x: Tensor, output_size: int | Sequence[int]) -> Tensor:
    """`pool2d` of kind "adaptive_avg" of x [images, channels, length] or [channels, length].

    >>> features = lamina.ops.adaptive_avg_pool1d(x, 1)
    """
    return pool2d(x.unsqueeze(-2), "adaptive_avg", [1, _one(output_size)], 1).squeeze(-2)
