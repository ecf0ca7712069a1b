"""What gru computes, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.reference import rnn


def cell(x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor]) -> tuple[Tensor]:
    """One step of one layer: x [B, I], (h [B, H],) -> (h,). Weights as in nn.GRU."""
    (h,) = state
    w_ih, w_hh, *biases = weights
    x_r, x_z, x_n = F.linear(x, w_ih, biases[0] if biases else None).chunk(3, dim=-1)
    h_r, h_z, h_n = F.linear(h, w_hh, biases[1] if biases else None).chunk(3, dim=-1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return ((1 - z) * n + z * h,)


def gru(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    weights: Sequence[Tensor],
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """-> (output, h_n), shapes and weights as in torch.gru; `batch_sizes` goes with packed input [N, I]."""
    return rnn.run(cell, input, batch_sizes, (h_0,), weights, num_layers, bidirectional, batch_first)
