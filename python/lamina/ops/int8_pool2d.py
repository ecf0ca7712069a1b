"""int8_pool2d: max, average and adaptive average pooling of int8 codes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina import _C
from lamina.ops.library import define
from lamina.ops.pool_windows import check_windows, output_size, pair


def _out_like(x: Tensor, kind, kernel, stride, padding, dilation, ceil_mode, x_scale, out_scale, out_dtype) -> Tensor:
    """An empty output, channels_last."""
    size = output_size(x.shape[2:], kind, kernel, stride, padding, dilation, ceil_mode)
    dtype = torch.int8 if x_scale is None or out_scale is not None else out_dtype or torch.float32
    return torch.empty((*x.shape[:2], *size), dtype=dtype, device=x.device, memory_format=torch.channels_last)


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
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if x.ndim == 3:
        arguments = kind, kernel, stride, padding, dilation, ceil_mode, count_include_pad, divisor
        return _cpu(x.unsqueeze(0), *arguments, x_scale, out_scale, out_dtype).squeeze(0)
    _check(x, kind, kernel, stride, padding, dilation, divisor, x_scale, out_scale, out_dtype)
    out = _out_like(x, kind, kernel, stride, padding, dilation, ceil_mode, x_scale, out_scale, out_dtype)
    if x.shape[1] != 1 and x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    _C.int8_pool2d(x, kind, kernel, stride, padding, dilation, count_include_pad, divisor or 0, x_scale, out_scale, out)
    return out


def _check(x: Tensor, kind, kernel, stride, padding, dilation, divisor, x_scale, out_scale, out_dtype) -> None:
    check_windows("int8_pool2d", x, kind, kernel, stride, padding, dilation, divisor)
    if out_dtype is not None and (x_scale is None or out_scale is not None):
        raise ValueError(
            f"int8_pool2d: out_dtype {out_dtype} goes with a float mean: with x_scale and without out_scale"
        )


# A sum of so many codes is exact in float32.
_EXACT_IN_FLOAT32 = 2**24 // 128


def _cuda(
    x: Tensor,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Of torch's ops: they compare and add codes exactly as floats, and what follows is the CPU's, operation for
    operation."""
    if x.ndim == 3:
        arguments = kind, kernel, stride, padding, dilation, ceil_mode, count_include_pad, divisor
        return _cuda(x.unsqueeze(0), *arguments, x_scale, out_scale, out_dtype).squeeze(0)
    _check(x, kind, kernel, stride, padding, dilation, divisor, x_scale, out_scale, out_dtype)
    _check_gpu_operands(x, kind, kernel, padding, x_scale, out_scale)
    out = _out_like(x, kind, kernel, stride, padding, dilation, ceil_mode, x_scale, out_scale, out_dtype)
    if out.numel() == 0:
        return out
    if kind == "max":
        return out.copy_(F.max_pool2d(x.float(), kernel, stride, padding, dilation, ceil_mode))
    if kind == "adaptive_avg":
        windows = [_adaptive_windows(size, count) for size, count in zip(x.shape[2:], kernel, strict=True)]
        sums = x
        for dim, ends in enumerate(windows, start=2):
            parts = [sums.narrow(dim, first, end - first).sum(dim, dtype=torch.int32) for first, end in ends]
            sums = torch.stack(parts, dim)
        counts = [_adaptive_counts(size, count, x.device) for size, count in zip(x.shape[2:], kernel, strict=True)]
    else:
        exact = torch.float32 if kernel[0] * kernel[1] <= _EXACT_IN_FLOAT32 else torch.float64
        sums = F.avg_pool2d(x.to(exact), kernel, stride, padding, ceil_mode, True, 1)
        sizes = zip(x.shape[2:], out.shape[2:], kernel, stride, padding, strict=True)
        counts = [_counts(*of, count_include_pad, x.device) for of in sizes]
    if divisor is None:
        by = counts[0][:, None] * counts[1]
    else:
        by = torch.full((1, 1), float(divisor), device=x.device)
    factor = torch.ones((), device=x.device) if x_scale is None else x_scale
    if out_scale is not None:
        factor = factor / out_scale
    mean = sums.float() * (factor / by)
    return out.copy_(mean.clamp_(-127, 127).round_() if out.dtype is torch.int8 else mean)


def _check_gpu_operands(
    x: Tensor, kind: str, kernel, padding, x_scale: Tensor | None, out_scale: Tensor | None
) -> None:
    """What the CPU checks in csrc/ops/int8_pool2d.cpp, but for the values of scales."""
    if kind not in ("max", "avg", "adaptive_avg"):
        raise ValueError(f"int8_pool2d: kind '{kind}' is unknown; use max, avg or adaptive_avg")
    if x.dtype is not torch.int8:
        raise ValueError(f"int8_pool2d: x is {str(x.dtype).removeprefix('torch.')}, but must be int8")
    if kind == "max" and (x_scale is not None or out_scale is not None):
        raise ValueError("int8_pool2d: the largest codes keep their scale; x_scale and out_scale go with a mean")
    if x_scale is None and out_scale is not None:
        raise ValueError("int8_pool2d: out_scale goes with x_scale, which says what the codes of x mean")
    for name, scale in (("x_scale", x_scale), ("out_scale", out_scale)):
        if scale is not None and (scale.ndim or scale.dtype is not torch.float32):
            raise ValueError(f"int8_pool2d: {name} is {scale.dtype} {list(scale.shape)}, but must be float32 []")
    if kind != "adaptive_avg":
        for k, p in zip(kernel, padding, strict=True):
            if p < 0 or 2 * p > k:
                raise ValueError(f"int8_pool2d: padding is {p}, but must be at most half of the kernel, {k}")


def _counts(size: int, count: int, kernel: int, stride: int, padding: int, include: bool, device) -> Tensor:
    """By what the sum of each window of one dimension is divided, float32 [count]: its pixels, with padding where it
    counts, but not what a window of ceil_mode has beyond it."""
    start = torch.arange(count, device=device) * stride - padding
    if include:
        taps = (start + kernel).clamp(max=size + padding) - start
    else:
        taps = (start + kernel).clamp(max=size) - start.clamp(min=0)
    return taps.clamp(min=1).float()


def _adaptive_windows(size: int, count: int) -> list[tuple[int, int]]:
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def _adaptive_counts(size: int, count: int, device) -> Tensor:
    i = torch.arange(count, device=device)
    return ((i * size + size + count - 1) // count - i * size // count).clamp(min=1).float()


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
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    torch._check(x.ndim in (3, 4), lambda: f"int8_pool2d: x has {x.ndim} dimensions, but must have 3 or 4")
    batched = x if x.ndim == 4 else x.unsqueeze(0)
    out = _out_like(batched, kind, kernel, stride, padding, dilation, ceil_mode, x_scale, out_scale, out_dtype)
    return out if x.ndim == 4 else out.squeeze(0)


_op = define(
    "int8_pool2d(Tensor x, str kind, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
    "bool count_include_pad, int? divisor, Tensor? x_scale=None, Tensor? out_scale=None, ScalarType? out_dtype=None) "
    "-> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)


def int8_pool2d(
    x: Tensor,
    kind: str,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Pooling of int8 codes: the largest code of each window and channel, or the mean.

    Sums are exact in int32, and multiplied once, in float32, by x_scale / out_scale / divisor. Codes are rounded half
    to even and clamped to [-127, 127]; all results are the same bits on every instruction set.

    Args:
        x: [images, channels, height, width] or [channels, height, width], int8; best in torch.channels_last.
        kind: "max", "avg" or "adaptive_avg".
        kernel_size, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override: as in
            torch.nn.functional.max_pool2d and avg_pool2d; kernel_size is the output's size for "adaptive_avg".
        x_scale, out_scale: of a mean, float32 scalar tensors []: with both, codes in steps of out_scale; with x_scale
            alone, float values; without, codes in the steps of x.
        out_dtype: of float values, torch.float32 (the default) or torch.bfloat16.

    Returns [images, channels, ...], channels_last. Raises ValueError when shapes, dtypes or scales do not fit.

    >>> codes = lamina.ops.int8_pool2d(codes, "max", 3, stride=2, padding=1)
    """
    stride = kernel_size if stride is None else stride
    pairs = (pair(value) for value in (kernel_size, stride, padding, dilation))
    return _op(x, kind, *pairs, ceil_mode, count_include_pad, divisor_override, x_scale, out_scale, out_dtype)


def int8_max_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """`int8_pool2d` of kind "max"; codes keep their scale.

    >>> codes = lamina.ops.int8_max_pool2d(codes, 3, stride=2, padding=1)
    """
    return int8_pool2d(x, "max", kernel_size, stride, padding, dilation, ceil_mode)


def int8_avg_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    **scales,
) -> Tensor:
    """`int8_pool2d` of kind "avg"; `scales` are its keyword-only arguments.

    >>> codes = lamina.ops.int8_avg_pool2d(codes, 2)
    """
    return int8_pool2d(
        x, "avg", kernel_size, stride, padding, 1, ceil_mode, count_include_pad, divisor_override, **scales
    )


def int8_adaptive_avg_pool2d(x: Tensor, output_size: int | Sequence[int], **scales) -> Tensor:
    """`int8_pool2d` of kind "adaptive_avg"; `scales` are its keyword-only arguments.

    >>> features = lamina.ops.int8_adaptive_avg_pool2d(codes, 1, x_scale=scale)
    """
    return int8_pool2d(x, "adaptive_avg", output_size, 1, **scales)
