"""Pooling."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lamina import ops
from lamina.plan.lowering.table import Live, aten, is_channels_last, is_float, lowers, with_unused


@lowers(aten.max_pool2d_with_indices.default)
def _max_pool2d(
    live: Live,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Any:
    if not is_float(input):
        return NotImplemented
    y = ops.max_pool2d(input, kernel, stride or kernel, padding, dilation, ceil_mode)
    return with_unused(y, 1)


@lowers(aten.avg_pool2d.default)
def _avg_pool2d(
    live: Live,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    if not is_float(input):
        return NotImplemented
    stride = stride or kernel
    if ceil_mode:  # torch lets a window reach beyond the padded image
        padded = [size + 2 * p for size, p in zip(input.shape[-2:], _pair(padding), strict=True)]
        kernel = [min(k, size) for k, size in zip(_pair(kernel), padded, strict=True)]
    return ops.avg_pool2d(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return value[0], value[-1]


@lowers(aten.upsample_nearest2d.default)
def _upsample_nearest2d(
    live: Live,
    input: Tensor,
    output_size: Sequence[int],
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Any:
    images, channels, height, width = input.shape
    factors = (output_size[0] // max(height, 1), output_size[1] // max(width, 1))
    whole = factors[0] * height == output_size[0] and factors[1] * width == output_size[1]
    if not whole or scales_h not in (None, factors[0]) or scales_w not in (None, factors[1]) or not input.numel():
        return NotImplemented
    if is_channels_last(input):
        pixels = input.permute(0, 2, 3, 1)[:, :, None, :, None]
        repeated = ops.copy(pixels.expand(images, height, factors[0], width, factors[1], channels))
        return repeated.view(images, *output_size, channels).permute(0, 3, 1, 2)
    pixels = input[:, :, :, None, :, None].expand(images, channels, height, factors[0], width, factors[1])
    return ops.copy(pixels).view(images, channels, *output_size)


@lowers(aten._adaptive_avg_pool2d.default)
def _adaptive_avg_pool2d(live: Live, input: Tensor, output_size: Sequence[int]) -> Any:
    return ops.adaptive_avg_pool2d(input, output_size) if is_float(input) else NotImplemented
