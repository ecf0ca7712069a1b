"""What int8_lstm computes, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.reference import rnn
from lamina.reference.int8_linear import int8_linear


def cell(x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One step of one layer; weights: (codes, scale) of w_ih, of w_hh and of w_hr if there is one, and the biases."""
    h, c = state
    pairs, biases = rnn.int8_parts(weights)
    gates = int8_linear(x, *pairs[0]) + int8_linear(h, *pairs[1]) + sum(biases)
    i, f, g, o = gates.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (int8_linear(h, *pairs[2]) if len(pairs) > 2 else h), c


def int8_lstm(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """-> (output, h_n, c_n) in float64, shapes as in `reference.lstm`, weights and scales as in the op."""
    joined = rnn.with_scales(weights, scales)
    return rnn.run(cell, input, batch_sizes, (h_0, c_0), joined, num_layers, bidirectional, batch_first)
