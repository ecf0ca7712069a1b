"""Matrix products, convolutions, attention: weights that hang on no input are packed once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lamina import ops
from lamina.ops.attention import MAX_HEAD_SIZE
from lamina.ops.linear import PackedLinearWeight, pack_linear_weight
from lamina.ops.packed_cache import PackedCache
from lamina.plan.lowering.table import Live, aten, is_channels_last, is_float, lowers, with_unused

_linear_weights: PackedCache[PackedLinearWeight] = PackedCache()
_transposed_weights: PackedCache[tuple[Tensor, Tensor | None]] = PackedCache()


@lowers(aten.addmm.default)
def _addmm(live: Live, bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1 or bias.ndim != 1:
        return NotImplemented
    return _linear(live, x, weight.t(), bias)


@lowers(aten.mm.default)
def _mm(live: Live, x: Tensor, weight: Tensor) -> Any:
    return _linear(live, x, weight.t(), None)


@lowers(aten.linear.default)
def _linear(live: Live, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if live(weight) or weight.ndim != 2 or not {x.dtype, weight.dtype} <= {torch.float32}:
        return NotImplemented
    if bias is not None and bias.dtype is not torch.float32:
        return NotImplemented
    form = (tuple(weight.shape), weight.stride(), weight.dtype)
    packed = _linear_weights.get([weight], form, lambda: pack_linear_weight(weight))
    return ops.linear(x, packed, bias)


@lowers(aten.convolution.default)
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
    fits = not live(weight) and (bias is None or not live(bias))
    if not fits or input.dtype is not weight.dtype or not is_float(input, weight, bias):
        return NotImplemented
    if weight.ndim not in (3, 4) or input.ndim != weight.ndim:
        return NotImplemented
    if weight.ndim == 3:
        # In one dimension: images of one row.
        sizes = (1, *stride), (0, *padding), (1, *dilation), transposed, (0, *output_padding)
        y = _convolution(live, input.unsqueeze(2), weight.unsqueeze(2), bias, *sizes, groups)
        return y if y is NotImplemented else y.squeeze(2)
    if transposed:
        if groups != 1 or any(d != 1 for d in dilation):
            return NotImplemented
        return _transposed_convolution(input, weight, bias, stride, padding, output_padding)
    return ops.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
) -> Tensor:
    """As a convolution that gives all pixels of a square of `stride` at once, as channels, and a copy that lays them
    side by side.

    Output pixel q s + r - padding is the sum over m of input pixel q - m times tap r + m s of the kernel: for each r a
    convolution with every s-th tap, the last one first.
    """
    images, _, height, width = input.shape
    channels, kernel = weight.shape[1], weight.shape[2:]
    taps = [-(-k // s) for k, s in zip(kernel, stride, strict=True)]
    sizes = [
        (n - 1) * s - 2 * p + k + more
        for n, s, p, k, more in zip((height, width), stride, padding, kernel, output_padding, strict=True)
    ]
    # How many squares there are, and so what is padded behind the last pixel.
    squares = [
        max(-(-(size + p) // s), n) for size, p, s, n in zip(sizes, padding, stride, (height, width), strict=True)
    ]
    around = [taps[0] - 1, squares[0] - height, taps[1] - 1, squares[1] - width]

    def pack() -> tuple[Tensor, Tensor | None]:
        room = [t * s - k for t, s, k in zip(taps, stride, kernel, strict=True)]
        padded = torch.nn.functional.pad(weight, (0, room[1], 0, room[0]))
        parts = padded.reshape(weight.shape[0], channels, taps[0], stride[0], taps[1], stride[1]).flip(2, 4)
        # [rows and columns of a square, channels] in one, [C], taps.
        arranged = parts.permute(3, 5, 1, 0, 2, 4).reshape(-1, weight.shape[0], *taps)
        repeated = None if bias is None else bias.repeat(stride[0] * stride[1])
        return arranged.contiguous(memory_format=torch.channels_last), repeated

    form = (tuple(weight.shape), weight.stride(), weight.dtype, tuple(stride))
    packed, repeated = _transposed_weights.get([weight] if bias is None else [weight, bias], form, pack)
    options = ([1, 1], around, [1, 1], 1, 0, "none", "none", [])
    y = torch.ops.lamina.conv2d(input, packed, repeated, None, *options)  # channels_last, as its weight is
    squared = y.permute(0, 2, 3, 1).view(images, *squares, stride[0], stride[1], channels)
    last = is_channels_last(input)
    if last:
        whole = ops.copy(squared.permute(0, 1, 3, 2, 4, 5)).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    else:
        whole = ops.copy(squared.permute(0, 5, 1, 3, 2, 4)).flatten(4, 5).flatten(2, 3)
    if list(whole.shape[2:]) == sizes:
        return whole
    inside = whole[:, :, padding[0] : padding[0] + sizes[0], padding[1] : padding[1] + sizes[1]]
    return ops.copy(inside, layout="channels_last" if last else "contiguous")


@lowers(aten.bmm.default)
def _bmm(live: Live, a: Tensor, b: Tensor) -> Any:
    """Of one row with a matrix, as in attention of one query: nothing is read twice that a product would read once."""
    if a.shape[1] != 1 or not a.shape[2] or {a.dtype, b.dtype} != {torch.float32}:
        return NotImplemented
    products = ops.elementwise([a.transpose(1, 2), b], [("mul", 0, 1)])
    return ops.reduce(products, 1, "sum", True)


@lowers(aten._scaled_dot_product_flash_attention_for_cpu.default)
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
    if dropout_p or not is_float(query, key, value) or query.shape[-1] > MAX_HEAD_SIZE:
        return NotImplemented
    return with_unused(ops.attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale), 1)
