"""conv2d: float convolution with bias, residual, activation and pooling in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lamina import _C
from lamina.ops.library import define
from lamina.ops.packed_cache import PackedCache
from lamina.reference.conv2d import conv2d as composed
from lamina.reference.int8_linear import ACTIVATIONS

_DTYPES = (torch.float32, torch.bfloat16)

# Fewer channels than this on either side leave Winograd's transforms dearer than what they save.
_MIN_WINOGRAD_CHANNELS = 16


_weights: PackedCache[Tensor] = PackedCache()


def _geometry(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    winograd: int,
    pool_sizes: Sequence[int],
) -> tuple[int, ...]:
    """What csrc/ops/conv2d.h calls Conv2dGeometry."""
    around = padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
    pool = tuple(pool_sizes) or (0,) * 6
    return (*weight.shape[2:], *stride, *dilation, *around, groups, winograd, *pool)


def _packed(weight: Tensor, geometry: tuple[int, ...]) -> Tensor:
    """The weight in the order the kernels read it, or what this gave last time."""

    def pack() -> Tensor:
        packed = torch.empty(_C.conv2d_packed_size(weight.shape[0], weight.shape[1], geometry))
        _C.conv2d_pack(weight.detach(), geometry, packed)
        return packed

    # What the layout hangs on: sizes, groups, and the Winograd tile; stride, padding and pool do not matter.
    form = (tuple(weight.shape), weight.stride(), weight.dtype, *geometry[10:12])
    return _weights.get([weight], form, pack)


def _size(n: int, before: int, after: int, window: int, stride: int, dilation: int = 1) -> int:
    # A stride of 0 is refused in csrc, in words.
    return (n + before + after - dilation * (window - 1) - 1) // max(stride, 1) + 1


def _new_output(input: Tensor, weight: Tensor, geometry: tuple[int, ...], pool: str) -> Tensor:
    """channels_last if the input or the weight is, as torch's own has it."""
    kh, kw, sh, sw, dh, dw, top, bottom, left, right = geometry[:10]
    height = _size(input.shape[2], top, bottom, kh, sh, dh)
    width = _size(input.shape[3], left, right, kw, sw, dw)
    if pool != "none":
        wh, ww, ph, pw, py, px = geometry[12:]
        height, width = _size(height, py, py, wh, ph), _size(width, px, px, ww, pw)
    last = _is_channels_last(input) or _is_channels_last(weight)
    form = torch.channels_last if last else torch.contiguous_format
    shape = (input.shape[0], weight.shape[0], max(height, 0), max(width, 0))
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=form)


def _is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if input.ndim != 4 or weight.ndim != 4:
        raise ValueError(
            f"conv2d: input has shape {list(input.shape)} and weight {list(weight.shape)}, but must be [B, C, H, W] or "
            "[C, H, W] and [N, C / groups, kh, kw]"
        )
    if groups < 1 or input.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"conv2d: input has {input.shape[1]} channels and weight is {list(weight.shape)}, which does not fit "
            f"{groups} groups"
        )
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        raise ValueError(f"conv2d: bias has shape {list(bias.shape)}, but must be [{weight.shape[0]}]")


def _cpu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    winograd: int,
    activation: str,
    pool: str,
    pool_sizes: Sequence[int],
) -> Tensor:
    if input.ndim == 3:
        one = residual if residual is None else residual.unsqueeze(0)
        options = (stride, padding, dilation, groups, winograd, activation, pool, pool_sizes)
        return _cpu(input.unsqueeze(0), weight, bias, one, *options).squeeze(0)
    _check(input, weight, bias, groups)
    geometry = _geometry(weight, stride, padding, dilation, groups, winograd, pool_sizes)
    out = _new_output(input, weight, geometry, pool)
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous(memory_format=torch.channels_last)
    _C.conv2d(input, _packed(weight, geometry), bias, residual, geometry, activation, pool, out)
    return out


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    winograd: int,
    activation: str,
    pool: str,
    pool_sizes: Sequence[int],
) -> Tensor:
    if input.ndim == 3:
        options = (stride, padding, dilation, groups, winograd, activation, pool, pool_sizes)
        return _fake(input.unsqueeze(0), weight, bias, residual, *options).squeeze(0)
    _check(input, weight, bias, groups)
    geometry = _geometry(weight, stride, padding, dilation, groups, winograd, pool_sizes)
    return _new_output(input, weight, geometry, pool)


_op = define(
    "conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, SymInt[] padding, "
    "int[] dilation, int groups, int winograd, str activation, str pool, int[] pool_sizes) -> Tensor",
    cpu=_cpu,
    fake=_fake,
)


class _Conv2d(torch.autograd.Function):
    """The plain convolution; its gradient is torch's own."""

    @staticmethod
    def forward(ctx, input, weight, bias, stride, padding, dilation, groups, winograd):
        ctx.save_for_backward(input, weight)
        ctx.options = (None if bias is None else bias.shape, stride, padding, dilation, groups)
        return _op(input, weight, bias, None, stride, padding, dilation, groups, winograd, "none", "none", ())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        bias_shape, stride, padding, dilation, groups = ctx.options
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        sizes = None if bias_shape is None else list(bias_shape)
        one = input.ndim == 3
        if one:
            input, grad = input.unsqueeze(0), grad.unsqueeze(0)
        of_input, *others = torch.ops.aten.convolution_backward(
            grad, input, weight, sizes, stride, padding, dilation, False, [0, 0], groups, needed
        )
        if one and of_input is not None:
            of_input = of_input.squeeze(0)
        return of_input, *others, None, None, None, None, None


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def paddings_of(
    padding: str | int | Sequence[int], kernel: Sequence[int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, ...]:
    """[vertical, horizontal], or [top, bottom, left, right] where the two sides differ."""
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"conv2d: padding 'same' goes with stride 1, but stride is {list(stride)}")
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if all(t % 2 == 0 for t in total):
            return tuple(t // 2 for t in total)
        return tuple(side for t in total for side in (t // 2, t - t // 2))
    if isinstance(padding, str):
        raise ValueError(f"conv2d: padding '{padding}' is unknown; use 'same', 'valid' or numbers")
    return pair(padding)


def _pool_sizes(pool: tuple | None) -> tuple[str, tuple[int, ...]]:
    if pool is None:
        return "none", ()
    kind, window, *rest = pool
    window = pair(window)
    stride = pair(rest[0]) if rest and rest[0] is not None else window
    padding = pair(rest[1]) if len(rest) > 1 else (0, 0)
    return kind, (*window, *stride, *padding)


def winograd_tile(weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> int:
    """2, for F(2x2), where Winograd's filtering fits and pays; 0 where the direct sum is used."""
    fits = tuple(weight.shape[2:]) == (3, 3) and tuple(stride) == tuple(dilation) == (1, 1) and groups == 1
    if not fits or min(weight.shape[:2]) < _MIN_WINOGRAD_CHANNELS:
        return 0
    return 2


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    pool: tuple | None = None,
    winograd: int | None = None,
) -> Tensor:
    """`torch.nn.functional.conv2d`, then + residual, an activation and a pool, in one call.

    3 x 3 kernels of stride 1 are computed by Winograd's minimal filtering ("Fast Algorithms for Convolutional Neural
    Networks", Lavin & Gray, 2015): F(2x2) by default, whose error is about that of the direct sum; F(4x4) on request,
    which is faster and loses about a digit. Everything else is the direct sum. Sums are float32, also of bfloat16
    inputs. The same inputs give the same bits on every run and for every number of threads.

    The weight is packed at the first call and again when it changes; only a change of single elements through `.data`,
    past torch's version counter, may go unseen. Gradients are torch's own. Other devices and dtypes, and calls under
    autocast, go to torch.

    Args:
        input: [B, C, H, W] or [C, H, W], float32 or bfloat16, any strides; channels_last is read as it lies.
        weight: [N, C / groups, kh, kw] of the same dtype.
        bias: [N], of the same dtype.
        stride, padding, dilation, groups: as in torch; padding may be "same" or "valid".
        activation: None, "relu", "relu6", "gelu" (exact GELU), "gelu_tanh", "quick_gelu", "silu", "hardswish"
            or "tanh".
        residual: of the convolution's shape, added before the activation.
        pool: ("max" or "avg", window, stride=window, padding=0) of what the activation gives; the average counts the
            padding as zeros, as torch's default does.
        winograd: 0 for the direct sum, 2 for F(2x2), 4 for F(4x4), None for F(2x2) where it fits.

    Returns [B, N, H', W'] of input's dtype, channels_last if input or weight is. Raises ValueError for shapes, sizes
    and names that do not fit, and for winograd tiles where the kernel is not 3 x 3 of stride and dilation 1 in one
    group.

    >>> y = lamina.ops.conv2d(x, weight, bias, padding=1, activation="relu", pool=("max", 2))
    """
    stride, dilation = pair(stride), pair(dilation)
    paddings = paddings_of(padding, weight.shape[2:], stride, dilation)
    kind, sizes = _pool_sizes(pool)
    activation = activation or "none"
    if winograd is None:
        winograd = winograd_tile(weight, stride, dilation, groups)
    tensors = [t for t in (input, weight, bias, residual) if t is not None]
    here = all(t.is_cpu and t.dtype is input.dtype for t in tensors) and input.dtype in _DTYPES
    if not here or torch.is_autocast_enabled("cpu"):
        return composed(input, weight, bias, residual, stride, paddings, dilation, groups, activation, kind, sizes)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return _op(input, weight, bias, residual, stride, paddings, dilation, groups, winograd, activation, kind, sizes)
    if len(paddings) == 4:
        top, bottom, left, right = paddings
        input, paddings = F.pad(input, (left, right, top, bottom)), (0, 0)
    y = _Conv2d.apply(input, weight, bias, stride, paddings, dilation, groups, winograd)
    y = ACTIVATIONS[activation](y if residual is None else y + residual)
    if kind == "none":
        return y
    return (F.max_pool2d if kind == "max" else F.avg_pool2d)(y, sizes[0:2], sizes[2:4], sizes[4:6])
