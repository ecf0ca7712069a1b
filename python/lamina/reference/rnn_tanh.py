"""What rnn_tanh computes, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.reference import rnn


def cell(x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor]) -> tuple[Tensor]:
    """One step of one layer: x [B, I], (h [B, H],) -> (h,). Weights as in nn.RNN."""
    w_ih, w_hh, *biases = weights
    s = x @ w_ih.T + state[0] @ w_hh.T + (sum(biases) if biases else 0)
    return (torch.tanh(s),)


def rnn_tanh(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    weights: Sequence[Tensor],
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """-> (output, h_n), shapes and weights as in torch.rnn_tanh; `batch_sizes` goes with packed input [N, I]."""
    return rnn.run(cell, input, batch_sizes, (h_0,), weights, num_layers, bidirectional, batch_first)
