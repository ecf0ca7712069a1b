"""What reduce computes, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

REDUCTIONS = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}


def reduce(x: Tensor, dims: Sequence[int] = (), keepdim: bool = False, how: str = "mean") -> Tensor:
    """The sum, mean, maximum or minimum over some dimensions, or over all."""
    return REDUCTIONS[how](x, list(dims), keepdim)
