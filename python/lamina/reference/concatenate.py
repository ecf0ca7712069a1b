"""What concatenate computes, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def concatenate(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """All tensors, one behind the other in a dimension."""
    return torch.cat(list(tensors), dim)
