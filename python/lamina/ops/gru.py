"""gru: gated recurrent units over whole sequences, all layers, directions and steps in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina import _C
from lamina.ops import rnn
from lamina.ops.library import define

_CELL = rnn.Cell("gru", gates=3, states=1, saved=4, torch_op=torch.gru)


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
    return rnn.run(_CELL, _C.gru, input, batch_sizes, (h_0,), weights, *options)


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
    "gru(Tensor input, Tensor? batch_sizes, Tensor? h_0, Tensor[] weights, bool has_biases, "
    "int num_layers, bool bidirectional, bool batch_first) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
)
_with_gradient = rnn.define_with_gradient(_CELL, _C.gru)


def gru(
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
    """GRU over whole sequences.

    r, z = sigmoid of W_ih x + b_ih + W_hh h + b_hh;  n = tanh(W_in x + b_in + r (W_hn h + b_hn));  h = (1 - z) n + z h.
    "Learning Phrase Representations using RNN Encoder-Decoder" (Cho et al. 2014), with the reset gate behind the
    product, as torch and cuDNN have it.

    Sums and states are float32, whatever the dtype; each gate is within 3e-7 of the exact function of its sum. A NaN
    stays NaN in the units it reaches. The weights are packed at the first call and again when they change; only a
    change of single elements through `.data`, past torch's version counter, may go unseen. Where a gradient is
    asked for, each layer of float32 keeps its gates and has a backward of its own; bfloat16 and projected states, other
    devices and dtypes and autocast then are torch's own op.

    Args:
        input: [T, B, I], [B, T, I] if batch_first, or packed [N, I] with batch_sizes; float32 or bfloat16, T >= 1.
        hx: h_0 [layers * directions, B, H], or None for zeros.
        weights: per layer and direction w_ih [3 H, I of the layer], w_hh [3 H, H], then b_ih, b_hh [3 H] if
            has_biases: `nn.GRU`'s flat list, gates in its order.
        batch_sizes: [T] int64, how many sequences run at each step, as in `torch.nn.utils.rnn.PackedSequence`.
        dropout: share of the outputs of every layer but the last that are dropped: for training.

    Returns output [.., directions * H] laid out as the input, h_n as h_0, of the input's dtype. Raises
    ValueError when shapes or dtypes do not fit or a sequence has no step.

    >>> output, h_n = lamina.ops.gru(x, None, layer._flat_weights, num_layers=layer.num_layers)
    """
    states = (hx,)
    options = (has_biases, num_layers, bidirectional, batch_first)
    return rnn.call(_CELL, _op, _with_gradient, input, batch_sizes, states, weights, *options, dropout)
