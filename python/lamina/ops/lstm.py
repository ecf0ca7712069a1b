"""lstm: long short-term memory over whole sequences, all layers, directions and steps in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina import _C
from lamina.ops import rnn
from lamina.ops.library import define

_CELL = rnn.Cell("lstm", gates=4, states=2, saved=5, torch_op=torch.lstm)


def _cpu(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (has_biases, num_layers, bidirectional, batch_first)
    return rnn.run(_CELL, _C.lstm, input, batch_sizes, (h_0, c_0), weights, *options)


def _fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (has_biases, num_layers, bidirectional, batch_first)
    return rnn.fake(_CELL, input, batch_sizes, (h_0, c_0), weights, *options)


_op = define(
    "lstm(Tensor input, Tensor? batch_sizes, Tensor? h_0, Tensor? c_0, Tensor[] weights, bool has_biases, "
    "int num_layers, bool bidirectional, bool batch_first) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
)
_with_gradient = rnn.define_with_gradient(_CELL, _C.lstm)


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """LSTM over whole sequences.

    i, f, o = sigmoid, g = tanh of W_ih x + b_ih + W_hh h + b_hh;  c = f c + i g;  h = o tanh(c), projected by W_hr if
    there is one. "Long Short-Term Memory" (Hochreiter & Schmidhuber 1997) with the forget gate of Gers et al. 2000; the
    projection is Sak et al. 2014.

    Sums and states are float32, whatever the dtype; each gate is within 3e-7 of the exact function of its sum. A NaN
    stays NaN in the units it reaches. The weights are packed at the first call and again when they change; only a
    change of single elements through `.data`, past torch's version counter, may go unseen. Where a gradient is
    asked for, each layer of float32 keeps its gates and has a backward of its own; bfloat16 and projected states, other
    devices and dtypes and autocast then are torch's own op.

    Args:
        input: [T, B, I], [B, T, I] if batch_first, or packed [N, I] with batch_sizes; float32 or bfloat16, T >= 1.
        hx: (h_0 [layers * directions, B, R], c_0 [.., B, H]), or None for zeros; H units, R of them after a projection.
        weights: per layer and direction w_ih [4 H, I of the layer], w_hh [4 H, R], then b_ih, b_hh [4 H] if
            has_biases, then w_hr [R, H] if the states are projected: `nn.LSTM`'s flat list, gates in its order.
        batch_sizes: [T] int64, how many sequences run at each step, as in `torch.nn.utils.rnn.PackedSequence`.
        dropout: share of the outputs of every layer but the last that are dropped: for training.

    Returns output [.., directions * R] laid out as the input, h_n and c_n as h_0 and c_0, of the input's dtype.
    Raises ValueError when shapes or dtypes do not fit or a sequence has no step.

    >>> output, h_n, c_n = lamina.ops.lstm(x, None, layer._flat_weights, num_layers=layer.num_layers)
    """
    states = hx if hx is not None else (None, None)
    options = (has_biases, num_layers, bidirectional, batch_first)
    return rnn.call(_CELL, _op, _with_gradient, input, batch_sizes, states, weights, *options, dropout)
