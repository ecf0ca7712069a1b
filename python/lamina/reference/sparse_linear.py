"""What sparse_linear computes, in plain PyTorch."""

import torch
from torch import Tensor

from lamina.reference.int8_linear import ACTIVATIONS


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x [..., K], the weight [N, K] with its zeros, bias [N] -> [..., N], all in float64."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    return ACTIVATIONS[activation](y)


def kept_blocks(weight: Tensor, pattern: str) -> Tensor:
    """Which values are stored, bool [N, K]: those of every block in which one is not zero."""
    rows, columns = (1, 1) if pattern == "unstructured" else map(int, pattern.split("x"))
    n, k = weight.shape
    padded = torch.zeros(n + -n % rows, k + -k % columns, dtype=torch.bool)
    padded[:n, :k] = weight != 0
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).any(3).any(1)
    return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:n, :k]
