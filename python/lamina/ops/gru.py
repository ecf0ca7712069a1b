"""gru: gated recurrent units over whole sequences, all layers, directions and steps in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina import _C
from lamina.ops import rnn
from lamina.ops.library import define

_GATES = 3


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
    return rnn.run("gru", _C.gru, _GATES, input, batch_sizes, (h_0,), weights, *options)


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
    return rnn.fake("gru", _GATES, input, batch_sizes, (h_0,), weights, *options)


_op = define(
    "gru(Tensor input, Tensor? batch_sizes, Tensor? h_0, Tensor[] weights, bool has_biases, "
    "int num_layers, bool bidirectional, bool batch_first) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
)


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
) -> tuple[Tensor, Tensor]:
    """GRU over whole sequences, in evaluation (no dropout).

    r, z = sigmoid of W_ih x + b_ih + W_hh h + b_hh;  n = tanh(W_in x + b_in + r (W_hn h + b_hn));  h = (1 - z) n + z h.
    "Learning Phrase Representations using RNN Encoder-Decoder" (Cho et al. 2014), with the reset gate behind the
    product, as torch and cuDNN have it.

    Sums and states are float32, whatever the dtype; each gate is within 3e-7 of the exact function of its sum. A NaN
    stays NaN in the units it reaches. The weights are packed at the first call and again when they change; only a
    change of single elements through `.data`, past torch's version counter, may go unseen. Gradients are those of
    torch's own op, which the backward runs again; on other devices and dtypes and under autocast torch's op computes
    everything.

    Args:
        input: [T, B, I], [B, T, I] if batch_first, or packed [N, I] with batch_sizes; float32 or bfloat16, T >= 1.
        hx: h_0 [layers * directions, B, H], or None for zeros.
        weights: per layer and direction w_ih [3 H, I of the layer], w_hh [3 H, H], then b_ih, b_hh [3 H] if
            has_biases: `nn.GRU`'s flat list, gates in its order.
        batch_sizes: [T] int64, how many sequences run at each step, as in `torch.nn.utils.rnn.PackedSequence`.

    Returns output [.., directions * H] laid out as the input, h_n as h_0, of the input's dtype. Raises
    ValueError when shapes or dtypes do not fit or a sequence has no step.

    >>> output, h_n = lamina.ops.gru(x, None, layer._flat_weights, num_layers=layer.num_layers)
    """
    states = (hx,)
    options = (has_biases, num_layers, bidirectional, batch_first)
    return rnn.call(_op, torch.gru, 1, input, batch_sizes, states, weights, *options)
