"""What int8_conv2d computes, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.reference.int8_linear import ACTIVATIONS


def quantize_images(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [images, channels, height, width], scale [] or None -> (codes int8, scales float32 [images]).

    The arithmetic is float32 by definition of the format: the codes are an exact result. An image that holds NaN or
    infinity gets codes of zero and a scale of NaN.
    """
    x = x.to(torch.float32)
    largest = x.abs().flatten(1).amax(dim=1) if x[:1].numel() else x.new_zeros(x.shape[0])
    if scale is not None:
        scales = scale.to(torch.float32).expand_as(largest)
    else:
        scales = torch.where(largest < 127e-36, torch.zeros_like(largest), largest / 127.0)
    bad = ~largest.isfinite()
    # A correctly rounded division: torch computes 1.0 / tensor as a reciprocal.
    inverse = torch.where(scales > 0, torch.ones_like(scales) / scales, torch.zeros_like(scales))
    codes = torch.round(x * inverse[:, None, None, None]).clamp(-127, 127).masked_fill(bad[:, None, None, None], 0)
    return codes.to(torch.int8), scales.masked_fill(bad, torch.nan)


def int8_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    """x [images, channels, height, width], codes int8 [n, c, kh, kw], scale [n], padding: top, bottom, left, right ->
    [images, n, ...] in float64.

    The integer sums are exact. x_scale as in the op: [], or [images] when x is int8. What the op makes of this with
    out_scale is `requantize` of it, but for one rounding more or less.
    """
    x_codes, x_scale = (x, x_scale) if x.dtype is torch.int8 else quantize_images(x, x_scale)
    top, bottom, left, right = padding
    padded = F.pad(x_codes.double(), (left, right, top, bottom))
    sums = F.conv2d(padded, codes.double(), None, tuple(stride), 0, tuple(dilation), groups)  # exact: below 2^53
    y = sums * scale.double()[:, None, None] * x_scale.double().reshape(-1, 1, 1, 1)
    if bias is not None:
        y = y + bias.double()[:, None, None]
    if residual is not None:
        y = y + residual.double() * (1.0 if residual_scale is None else residual_scale.double())
    return ACTIVATIONS[activation](y)
