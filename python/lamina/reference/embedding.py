"""What embedding computes, in plain PyTorch."""

from torch import Tensor


def embedding(indices: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [V, D], picked by indices [...]: [..., D]."""
    return weight[indices.long()]
