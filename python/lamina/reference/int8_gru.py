"""What int8_gru computes, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.reference import rnn
from lamina.reference.int8_linear import int8_linear


def cell(x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor]) -> tuple[Tensor]:
    """One step of one layer; weights: (codes, scale) of w_ih and of w_hh, and the biases."""
    (h,) = state
    (w_ih, w_hh), biases = rnn.int8_parts(weights)
    x_r, x_z, x_n = int8_linear(x, *w_ih, biases[0] if biases else None).chunk(3, dim=-1)
    h_r, h_z, h_n = int8_linear(h, *w_hh, biases[1] if biases else None).chunk(3, dim=-1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return ((1 - z) * n + z * h,)


def int8_gru(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """-> (output, h_n) in float64, shapes as in `reference.gru`, weights and scales as in the op."""
    joined = rnn.with_scales(weights, scales)
    return rnn.run(cell, input, batch_sizes, (h_0,), joined, num_layers, bidirectional, batch_first)
