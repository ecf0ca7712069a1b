"""What int8_linear computes, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric quantization: x [M, K] -> (codes int8 [M, K], scale float32 [M]).

    The arithmetic is float32 by definition of the format, whatever the dtype of x: the codes are the op's exact
    intermediate result, not an approximation of one.
    """
    x = x.to(torch.float32)
    largest = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    tiny = largest < 1e-36
    # One correctly rounded division: torch computes 127.0 / tensor as a reciprocal and a product, which rounds twice.
    inverse = torch.where(tiny, torch.zeros_like(largest), torch.full_like(largest, 127.0) / largest)
    codes = torch.round(x * inverse[:, None]).clamp(-128, 127)
    # largest - largest: a row that holds infinity is NaN, like one that holds NaN.
    scale = torch.where(tiny, torch.zeros_like(largest), largest / 127.0 + (largest - largest))
    return codes.nan_to_num(-128).to(torch.int8), scale


def int8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """x [..., K], codes int8 [N, K], scale [N], bias [N] -> [..., N] in float64, with exact integer sums."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    x_codes, x_scale = quantize_rows(rows)
    sums = x_codes.double() @ codes.double().T  # exact: below 2^53
    y = sums * scale.double() * x_scale.double()[:, None]
    if bias is not None:
        y = y + bias.double()
    return _ACTIVATIONS[activation](y).reshape(*x.shape[:-1], codes.shape[0])
