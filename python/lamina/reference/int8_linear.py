"""What int8_linear computes, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.reference.quantize_rows import quantize_rows

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
}


def int8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    """x [..., K], codes int8 [N, K], scale [N], bias [N], residual [..., N] -> [..., N] in float64.

    The integer sums are exact. x_scale as in the op: [], or x.shape[:-1] when x is int8. What the op makes of this with
    out_scale is `requantize` of it.
    """
    x_codes, x_scale = (x, x_scale) if x.dtype is torch.int8 else quantize_rows(x, x_scale)
    sums = x_codes.double() @ codes.double().T  # exact: below 2^53
    y = sums * scale.double() * x_scale.double()[..., None]
    if bias is not None:
        y = y + bias.double()
    if residual is not None:
        y = y + residual.double()
    return ACTIVATIONS[activation](y)


def requantize(y: Tensor, out_scale: Tensor) -> Tensor:
    """int8 codes of an output: round_half_even(y * (1 / out_scale)), clamped to [-127, 127]; the inverse is float32."""
    inverse = torch.ones_like(out_scale) / out_scale
    return torch.round(y * inverse.to(y.dtype)).clamp(-127, 127).nan_to_num(-127).to(torch.int8)
