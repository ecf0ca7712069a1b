"""What softmax computes, in plain PyTorch."""

from torch import Tensor


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """e^(x - m) / sum of e^(x - m) along a dimension, with m the largest element."""
    powers = (x - x.amax(dim, keepdim=True)).exp()
    return powers / powers.sum(dim, keepdim=True)
