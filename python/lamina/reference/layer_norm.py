"""What layer_norm computes, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """(v - mean) / sqrt(variance + eps) * weight + bias over the last dimensions of v = input + residual."""
    v = input if residual is None else input + residual
    dims = list(range(-len(normalized_shape), 0))
    centred = v - v.mean(dims, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def layer_norm_panels(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The same for each token of panels [P, K, 32]."""
    return layer_norm(input.mT, input.shape[1:2], weight, bias, eps).mT
