"""What group_norm computes, in plain PyTorch."""

import torch
from torch import Tensor

from lamina.reference.int8_linear import ACTIVATIONS


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, over groups of neighbouring channels; then an activation."""
    groups = x.reshape(x.shape[0], num_groups, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    y = (centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)).reshape(x.shape)
    per_channel = [1, -1] + [1] * (x.ndim - 2)
    if weight is not None:
        y = y * weight.reshape(per_channel)
    if bias is not None:
        y = y + bias.reshape(per_channel)
    return ACTIVATIONS[activation](y)
