"""What rms_norm computes, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """v / sqrt(mean v^2 + eps) * weight over the last dimensions of v = input + residual.

    eps None is the machine epsilon of float32, in which torch computes, whatever the dtype.
    """
    v = input if residual is None else input + residual
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    dims = list(range(-len(normalized_shape), 0))
    y = v / torch.sqrt(v.square().mean(dims, keepdim=True) + eps)
    return y if weight is None else y * weight
