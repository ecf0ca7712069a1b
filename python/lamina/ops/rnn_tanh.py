"""rnn_tanh: plain recurrent network over whole sequences, all layers, directions and steps in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina import _C
from lamina.ops import rnn
from lamina.ops.library import define

_CELL = rnn.Cell("rnn_tanh", gates=1, states=1, saved=0, torch_op=torch.rnn_tanh)


def _cpu(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    options = (has_biases, num_layers, bidirectional, batch_first)
    return rnn.run(_CELL, _C.rnn_tanh, input, batch_sizes, (h_0,), weights, *options)


def _fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    options = (has_biases, num_layers, bidirectional, batch_first)
    return rnn.fake(_CELL, input, batch_sizes, (h_0,), weights, *options)


_op = define(
    "rnn_tanh(Tensor input, Tensor? batch_sizes, Tensor? h_0, Tensor[] weights, bool has_biases, "
    "int num_layers, bool bidirectional, bool batch_first) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
)
_with_gradient = rnn.define_with_gradient(_CELL, _C.rnn_tanh)


def rnn_tanh(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Plain recurrent network over whole sequences.

    h = tanh(s) of s = W_ih x + b_ih + W_hh h + b_hh. "Finding Structure in Time" (Elman 1990).

    Numerics, gradients, packed weights, other devices and dtypes as in `lamina.ops.lstm`.

    Args:
        input: [T, B, I], [B, T, I] if batch_first, or packed [N, I] with batch_sizes; float32 or bfloat16, T >= 1.
        hx: h_0 [layers * directions, B, H], or None for zeros.
        weights: per layer and direction w_ih [H, I of the layer], w_hh [H, H], then b_ih, b_hh [H] if has_biases:
            `nn.RNN`'s flat list.
        batch_sizes: [T] int64, how many sequences run at each step, as in `torch.nn.utils.rnn.PackedSequence`.
        dropout: share of the outputs of every layer but the last that are dropped: for training.

    Returns output [.., directions * H] laid out as the input and h_n as h_0, of the input's dtype.
    Raises ValueError when shapes or dtypes do not fit or a sequence has no step.

    >>> output, h_n = lamina.ops.rnn_tanh(x, None, layer._flat_weights, num_layers=layer.num_layers)
    """
    options = (has_biases, num_layers, bidirectional, batch_first)
    return rnn.call(_CELL, _op, _with_gradient, input, batch_sizes, (hx,), weights, *options, dropout)
