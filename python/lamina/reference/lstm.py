"""What lstm computes, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.reference import rnn


def cell(x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One step of one layer: x [B, I], (h [B, R], c [B, H]) -> (h, c). Weights as in nn.LSTM."""
    h, c = state
    w_ih, w_hh, *others = weights
    biases = [b for b in others if b.ndim == 1]
    gates = x @ w_ih.T + h @ w_hh.T + (sum(biases) if biases else 0)
    i, f, g, o = gates.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    projections = [w for w in others if w.ndim == 2]
    return (h @ projections[0].T if projections else h), c


def lstm(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """-> (output, h_n, c_n), shapes and weights as in torch.lstm; `batch_sizes` goes with packed input [N, I]."""
    return rnn.run(cell, input, batch_sizes, (h_0, c_0), weights, num_layers, bidirectional, batch_first)
