"""Symmetric int8 quantization of weights, one scale per output channel."""

import torch
from torch import Tensor


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Floating-point weight [N, ...] -> (codes int8 [N, ...] in [-127, 127], scale float32 [N]).

    scale = max|channel| / 127, codes = round half to even (weight / scale). A channel of zeros gets scale 1, so that
    its codes mean zero without a division by zero. Raises ValueError for NaN or infinity, naming the channel.

    >>> codes, scale = quantize_weight(linear.weight)
    """
    flat = weight.detach().to(torch.float32).flatten(1)
    largest = flat.abs().amax(dim=1) if flat.shape[1] else flat.new_zeros(flat.shape[0])
    bad = (~torch.isfinite(largest)).nonzero()
    if bad.numel():
        raise ValueError(f"quantize_weight: output channel {bad[0].item()} has a NaN or infinite weight")
    # 127 / largest overflows below 1e-36; such a channel counts as zero.
    largest = torch.where(largest < 1e-36, torch.full_like(largest, 127.0), largest)
    codes = torch.round(flat / (largest / 127.0)[:, None]).clamp_(-127, 127).to(torch.int8)
    return codes.reshape(weight.shape), largest / 127.0


def dequantize_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """codes int8 [N, ...], scale [N] -> float32 [N, ...]."""
    return codes.to(torch.float32) * scale.reshape(-1, *[1] * (codes.ndim - 1))
