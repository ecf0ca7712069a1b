"""int8_lstm: lstm with int8 weights; states and inputs are quantized row by row, at every step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina import _C
from lamina.ops import rnn
from lamina.ops.library import define

_CELL = rnn.Cell("int8_lstm", gates=4, states=2, saved=0, torch_op=torch.lstm)


def _cpu(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    scales: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (has_biases, num_layers, bidirectional, batch_first, scales)
    return rnn.run(_CELL, _C.int8_lstm, input, batch_sizes, (h_0, c_0), weights, *options)


def _cuda(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    scales: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (has_biases, num_layers, bidirectional, batch_first, scales)
    return rnn.run_float(_CELL, input, batch_sizes, (h_0, c_0), weights, *options)


def _fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    scales: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (has_biases, num_layers, bidirectional, batch_first, scales)
    return rnn.fake(_CELL, input, batch_sizes, (h_0, c_0), weights, *options)


_op = define(
    "int8_lstm(Tensor input, Tensor? batch_sizes, Tensor? h_0, Tensor? c_0, Tensor[] weights, Tensor[] scales, "
    "bool has_biases, int num_layers, bool bidirectional, bool batch_first) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)


def int8_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lamina.ops.lstm` with int8 weights, for inference.

    Every matrix has one scale per row. Each row of the input, and of the state at every step, is quantized
    symmetrically (`quantize_rows`), products are summed exactly in int32; biases, gates and cells stay float32. A row
    that holds NaN gives NaN. There is no gradient. On a GPU torch's float op (cuDNN) computes with the dequantized
    weights, and nothing else is quantized.

    Args:
        input: [T, B, I], [B, T, I] if batch_first, or packed [N, I] with batch_sizes; float32 or bfloat16, T >= 1.
        hx: (h_0 [layers * directions, B, R], c_0 [.., B, H]), or None for zeros; H units, R of them after a projection.
        weights: the flat list of `nn.LSTM` with int8 codes for the matrices: per layer and direction w_ih
            [4 H, I of the layer], w_hh [4 H, R], b_ih and b_hh [4 H] float32 if has_biases,
            w_hr [R, H] if the states are projected.
        scales: float32, one for each matrix in the order of the weights, [rows]: weight = code * scale.
        batch_sizes: [T] int64, how many sequences run at each step, as in `torch.nn.utils.rnn.PackedSequence`.

    Returns output [.., directions * R] laid out as the input, h_n and c_n as h_0 and c_0, of the input's dtype.
    Raises ValueError when shapes or dtypes do not fit or a sequence has no step.

    >>> output, h_n, c_n = lamina.ops.int8_lstm(x, None, layer.quantized_weights(), layer.scales())
    """
    options = (has_biases, num_layers, bidirectional, batch_first)
    states = hx if hx is not None else (None, None)
    return _op(input, batch_sizes, *states, list(weights), list(scales), *options)
