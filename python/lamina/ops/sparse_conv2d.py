"""sparse_conv2d: convolution with a weight that is mostly zeros, of images with their channels together."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina import _C
from lamina.ops.int8_conv2d import four_paddings
from lamina.ops.int8_linear import ACTIVATIONS
from lamina.ops.library import define
from lamina.ops.sparse_linear import PackedSparseWeight, pack_sparse_weight, traced_sparse_weight, unpack_sparse_weight
from lamina.reference.int8_linear import ACTIVATIONS as FORWARD


def pack_sparse_conv_weight(weight: Tensor, pattern: str = "unstructured") -> PackedSparseWeight:
    """Pack a weight [N, C, kh, kw] for `sparse_conv2d`: as `pack_sparse_weight` does its windows [N, kh kw C].

    pattern: output channels x inputs of a block: "unstructured", "2x1" or "4x1". Raises ValueError as
    `pack_sparse_weight` does.

    >>> packed = lamina.ops.pack_sparse_conv_weight(conv.weight, "4x1")
    """
    if weight.ndim != 4:
        raise ValueError(f"pack_sparse_conv_weight: weight has shape {list(weight.shape)}, but must be [N, C, kh, kw]")
    return pack_sparse_weight(window_rows(weight), pattern)


def window_rows(weight: Tensor) -> Tensor:
    """[N, C, kh, kw] -> [N, kh kw C], as pixels lie in channels_last."""
    return weight.detach().permute(0, 2, 3, 1).reshape(weight.shape[0], weight[0:1].numel())


def from_window_rows(rows: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """The inverse."""
    kh, kw = kernel_size
    return rows.view(rows.shape[0], kh, kw, rows.shape[1] // (kh * kw)).permute(0, 3, 1, 2)


def unpack_sparse_conv_weight(packed: PackedSparseWeight, kernel_size: Sequence[int]) -> Tensor:
    """The weight [N, C, kh, kw] with its zeros; `pack_sparse_conv_weight` is the inverse."""
    return from_window_rows(unpack_sparse_weight(packed), kernel_size)


def _size(n: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> int:
    # A stride of 0 is refused in csrc, in words.
    return (n + before + after - dilation * (kernel - 1) - 1) // max(stride, 1) + 1


def _new_output(x: Tensor, out_channels: int, geometry: Sequence[int]) -> Tensor:
    kh, kw, sh, sw, dh, dw, top, bottom, left, right = geometry
    height, width = _size(x.shape[2], top, bottom, kh, sh, dh), _size(x.shape[3], left, right, kw, sw, dw)
    torch._check(
        height > 0 and width > 0,
        lambda: f"sparse_conv2d: the kernel does not fit into images of {x.shape[2]} x {x.shape[3]} pixels",
    )
    shape = (x.shape[0], out_channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _cpu(
    x: Tensor, data: Tensor, bias: Tensor | None, out_channels: int, geometry: Sequence[int], activation: str
) -> Tensor:
    if x.ndim == 3:
        return _cpu(x.unsqueeze(0), data, bias, out_channels, geometry, activation).squeeze(0)
    if x.ndim != 4:
        raise ValueError(f"sparse_conv2d: x has shape {list(x.shape)}, but must be [B, C, H, W] or [C, H, W]")
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    if x.stride(1) != 1:  # one pixel: every layout counts as channels_last
        x = x.flatten(1).contiguous().view(x.shape)
    out = _new_output(x, out_channels, geometry)
    _C.sparse_conv2d(x, data, bias, geometry, activation, out)
    return out


def _cuda(
    x: Tensor, data: Tensor, bias: Tensor | None, out_channels: int, geometry: Sequence[int], activation: str
) -> Tensor:
    kh, kw, sh, sw, dh, dw, top, bottom, left, right = geometry
    if data.ndim != 2:
        raise ValueError("sparse_conv2d: packed_weight has the layout of the CPU, but x is on a GPU; move it there")
    if activation not in FORWARD:
        raise ValueError(f"sparse_conv2d: activation '{activation}' is unknown; use one of {', '.join(FORWARD)}")
    weight = from_window_rows(data, (kh, kw)).to(x.dtype)
    if x.ndim not in (3, 4) or x.shape[-3] != weight.shape[1]:
        raise ValueError(
            f"sparse_conv2d: x has shape {list(x.shape)}, but must be [B, {weight.shape[1]}, H, W] or "
            f"[{weight.shape[1]}, H, W]"
        )
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, (sh, sw), 0, (dh, dw))
    y = FORWARD[activation](y)
    return y if y.ndim == 3 else y.contiguous(memory_format=torch.channels_last)


def _fake(
    x: Tensor, data: Tensor, bias: Tensor | None, out_channels: int, geometry: Sequence[int], activation: str
) -> Tensor:
    torch._check(x.ndim in (3, 4), lambda: "sparse_conv2d: x must be [B, C, H, W] or [C, H, W]")
    torch._check(x.dtype in (torch.float32, torch.bfloat16), lambda: f"sparse_conv2d: x is {x.dtype}")
    if x.ndim == 3:
        return _new_output(x.unsqueeze(0), out_channels, geometry).squeeze(0)
    return _new_output(x, out_channels, geometry)


_op = define(
    "sparse_conv2d(Tensor x, Tensor data, Tensor? bias, int out_channels, int[] geometry, str activation) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)


class _WithGradient(torch.autograd.Function):
    """The gradient of the dense convolution with the same weight, which does not train."""

    @staticmethod
    def forward(ctx, x, data, bias, out_channels, geometry, activation):
        ctx.save_for_backward(x, data, bias)
        ctx.constants = out_channels, geometry, activation
        return _op(x, data, bias, out_channels, geometry, activation)

    @staticmethod
    def backward(ctx, grad):
        x, data, bias = ctx.saved_tensors
        out_channels, geometry, activation = ctx.constants
        if activation != "none":
            grad = ACTIVATIONS[activation](grad, _op(x, data, bias, out_channels, geometry, "none"))
        one = x.ndim == 3
        if one:
            x, grad = x.unsqueeze(0), grad.unsqueeze(0)
        x_grad = _input_gradient(x, grad, data, out_channels, geometry) if ctx.needs_input_grad[0] else None
        if one and x_grad is not None:
            x_grad = x_grad.squeeze(0)
        bias_grad = grad.float().sum((0, 2, 3)).to(bias.dtype) if ctx.needs_input_grad[2] else None
        return x_grad, None, bias_grad, None, None, None


def _input_gradient(x: Tensor, grad: Tensor, data: Tensor, out_channels: int, geometry: Sequence[int]) -> Tensor:
    kh, kw, sh, sw, dh, dw, top, bottom, left, right = geometry
    rows = traced_sparse_weight(PackedSparseWeight(data, out_channels), x.shape[1] * kh * kw)
    weight = from_window_rows(rows, (kh, kw)).to(grad.dtype)
    padded = (x.shape[0], x.shape[1], x.shape[2] + top + bottom, x.shape[3] + left + right)
    found = torch.nn.grad.conv2d_input(padded, weight, grad, (sh, sw), 0, (dh, dw))
    return F.pad(found, (-left, -right, -top, -bottom))


def call_sparse_conv2d(
    x: Tensor, data: Tensor, bias: Tensor | None, out_channels: int, geometry: Sequence[int], activation: str
) -> Tensor:
    """The op on loose tensors, with a gradient where one is asked for; why not by torch.library: see int8_linear."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _WithGradient.apply(x, data, bias, out_channels, geometry, activation)
    return _op(x, data, bias, out_channels, geometry, activation)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def sparse_conv2d(
    x: Tensor,
    packed_weight: PackedSparseWeight,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    kernel_size: int | Sequence[int],
    activation: str | None = None,
) -> Tensor:
    """`torch.nn.functional.conv2d` of one group, then an activation, with a weight of which only blocks are stored.

    Each output pixel is a row of `sparse_linear` over the window it sees; panels of windows are gathered as they are
    multiplied. Sums are float32; zeros that are not stored multiply nothing. Outputs are channels_last; inputs that are
    too are read as they lie. The gradient for x and bias is that of the dense convolution; the weight does not train.
    On a GPU torch's dense convolution computes it.

    Args:
        x: [B, C, H, W] or [C, H, W], float32 or bfloat16.
        packed_weight: of a weight [N, C, kh, kw], from `pack_sparse_conv_weight`.
        bias: [N] float32 or bfloat16.
        stride, padding, dilation: as in torch; padding may be "same" or "valid".
        kernel_size: kh and kw, which the packed weight does not tell.
        activation: None, "relu", "relu6", "gelu" (exact GELU), "gelu_tanh", "quick_gelu", "silu", "hardswish" or
            "tanh", within 3e-6.

    Returns [B, N, H', W'] of x's dtype. Raises ValueError when shapes or dtypes do not fit, and FormatError (a
    ValueError) when `packed_weight.data` is foreign, damaged or of another version.

    >>> packed = lamina.ops.pack_sparse_conv_weight(conv.weight)
    >>> y = lamina.ops.sparse_conv2d(x, packed, conv.bias, padding=1, kernel_size=3)
    """
    kernel, stride, dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
    geometry = (*kernel, *stride, *dilation, *four_paddings(padding, kernel, stride, dilation))
    data, out_channels = packed_weight.data, packed_weight.out_features
    return call_sparse_conv2d(x, data, bias, out_channels, geometry, activation or "none")
