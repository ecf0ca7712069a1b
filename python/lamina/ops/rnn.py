"""What the recurrent ops share: weights in the order the kernels read them, kept between calls, and the gradient.

The ops take weights as torch's own do, a flat list: per layer and direction w_ih [G H, I], w_hh [G H, R], then b_ih and
b_hh [G H] if there are biases, then w_hr [R, H] if there is a projection. Packing them costs about as much as one step,
so the packed form is kept for as long as the weights live and do not change.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from lamina import _C

DTYPES = (torch.float32, torch.bfloat16)

# Units of a panel, and outputs of a panel of the projection; csrc/ops/rnn.h has the layout.
_LANES = 16
_COLUMNS = 64


class Sizes(NamedTuple):
    """hidden: units H; state: width R of the output, H or the projection's; each: tensors per layer and direction."""

    hidden: int
    state: int
    each: int


def sizes_of(
    op: str, gates: int, input_size: int, weights: Sequence[Tensor], has_biases: bool, num_layers: int, directions: int
) -> Sizes:
    """Checks every weight. Raises ValueError."""
    parts = num_layers * directions
    plain = 4 if has_biases else 2
    each = len(weights) // parts if parts > 0 else 0
    if each * parts != len(weights) or each not in (plain, plain + 1) or (each > plain and gates != 4):
        raise ValueError(
            f"{op}: there are {len(weights)} weights, but {num_layers} layers in {directions} directions "
            f"{'with' if has_biases else 'without'} biases have {plain * parts}"
            + (f", or {(plain + 1) * parts} with projections" if gates == 4 else "")
        )
    hidden = weights[0].shape[0] // gates
    state = weights[plain].shape[0] if each > plain else hidden
    if each > plain and state >= hidden:
        raise ValueError(f"{op}: the projection gives {state} of {hidden} units, but must give fewer")
    for i, weight in enumerate(weights):
        place, layer = i % each, i // each // directions
        expected = {
            0: [gates * hidden, directions * state if layer else input_size],
            1: [gates * hidden, state],
        }.get(place, [state, hidden] if place == plain else [gates * hidden])
        if list(weight.shape) != expected:
            raise ValueError(f"{op}: weights[{i}] has shape {list(weight.shape)}, but must be {expected}")
    return Sizes(hidden, state, each)


def check_inputs(
    op: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor | None],
    scales: Sequence[Tensor] | None = None,
) -> None:
    """One dtype for all, an input of the right number of dimensions, states of packed input. Raises ValueError.

    With `scales`, the matrices among the weights are int8 codes and everything else among them is float32.
    """
    if input.dtype not in DTYPES:
        raise ValueError(f"{op}: input is {input.dtype}, but must be torch.float32 or torch.bfloat16")
    for tensors in (weights, states):
        for t in tensors:
            if t is None or (scales is not None and tensors is weights):
                continue
            if t.dtype is not input.dtype:
                name = "weights" if tensors is weights else "initial states"
                raise ValueError(f"{op}: {name} are {t.dtype}, but must be the input's {input.dtype}")
    if input.ndim != (3 if batch_sizes is None else 2):
        what = "[T, B, I]" if batch_sizes is None else "[N, I] with batch_sizes"
        raise ValueError(f"{op}: input has shape {list(input.shape)}, but must be {what}")
    if scales is not None:
        for i, t in enumerate(weights):
            expected = torch.int8 if t.ndim == 2 else torch.float32
            if t.dtype is not expected:
                raise ValueError(f"{op}: weights[{i}] is {t.dtype}, but must be {expected}")
        rows = [t.shape[0] for t in weights if t.ndim == 2]
        if [list(s.shape) for s in scales] != [[n] for n in rows] or any(s.dtype is not torch.float32 for s in scales):
            raise ValueError(f"{op}: scales must be float32, one per row of each matrix: {rows}")
    for state in states:
        if state is None and batch_sizes is not None:
            raise ValueError(f"{op}: packed input needs its initial states, from which the batch is read")
        if state is not None and state.ndim != 3:
            raise ValueError(f"{op}: an initial state has shape {list(state.shape)}, but must be [layers, B, width]")


def _panels(weight: Tensor, gates: int) -> Tensor:
    """[G H, K] -> [H / 16 rounded up, K, G, 16], flat."""
    units = weight.shape[0] // gates
    padded = F.pad(weight.reshape(gates, units, -1), (0, 0, 0, -units % _LANES))
    return padded.unflatten(1, (-1, _LANES)).permute(1, 3, 0, 2).reshape(-1)


def _bias(bias: Tensor, gates: int) -> Tensor:
    return _panels(bias[:, None], gates)


def _projection(weight: Tensor) -> Tensor:
    """[R, H] -> [R / 64 rounded up, H, 64], flat."""
    padded = F.pad(weight, (0, 0, 0, -weight.shape[0] % _COLUMNS))
    return padded.unflatten(0, (-1, _COLUMNS)).transpose(1, 2).reshape(-1)


def _joined_biases(gates: int, sizes: Sizes, biases: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
    """b_ih, b_hh -> what is added to the gates of the input and to those of the state."""
    if biases is None:
        zeros = torch.zeros(gates * sizes.hidden)
        return zeros, zeros
    of_input, of_state = biases[0] + biases[1], torch.zeros_like(biases[1])
    if gates == 3:  # the reset gate multiplies the state's part of the new gate, bias included
        new = slice(2 * sizes.hidden, None)
        of_input[new], of_state[new] = biases[0][new], biases[1][new]
    return of_input, of_state


def pack(gates: int, sizes: Sizes, weights: Sequence[Tensor], has_biases: bool) -> tuple[Tensor]:
    """The weights as one float32 tensor, in the order of csrc/ops/rnn.h."""
    pieces = []
    for at in range(0, len(weights), sizes.each):
        w_ih, w_hh, *others = (w.detach().float() for w in weights[at : at + sizes.each])
        input_bias, state_bias = _joined_biases(gates, sizes, others if has_biases else None)
        pieces += [_panels(w_ih, gates), _bias(input_bias, gates), _panels(w_hh, gates), _bias(state_bias, gates)]
        if sizes.state < sizes.hidden:
            pieces.append(_projection(others[-1]))
    return (torch.cat(pieces),)


def _code_panels(codes: Tensor, gates: int) -> Tensor:
    """int8 [G H, K] -> [H / 16 rounded up, K / 4 rounded up, G, 16, 4], flat."""
    units, k = codes.shape[0] // gates, codes.shape[1]
    padded = F.pad(codes.reshape(gates, units, k), (0, -k % 4, 0, -units % _LANES))
    return padded.unflatten(2, (-1, 4)).unflatten(1, (-1, _LANES)).permute(1, 3, 0, 2, 4).reshape(-1)


def _code_projection(codes: Tensor) -> Tensor:
    """int8 [R, H] -> [R / 64 rounded up, H / 4 rounded up, 64, 4], flat."""
    padded = F.pad(codes, (0, -codes.shape[1] % 4, 0, -codes.shape[0] % _COLUMNS))
    return padded.unflatten(1, (-1, 4)).unflatten(0, (-1, _COLUMNS)).transpose(1, 2).reshape(-1)


def pack_int8(
    gates: int, sizes: Sizes, weights: Sequence[Tensor], has_biases: bool, scales: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """int8 weights as codes, compensation and float32 scales and biases, in the order of csrc/ops/rnn.h."""
    codes, compensation, floats = [], [], []
    remaining = iter(scales)
    for at in range(0, len(weights), sizes.each):
        matrices = [w.detach() for w in weights[at : at + sizes.each] if w.ndim == 2]
        biases = [w.detach() for w in weights[at : at + sizes.each] if w.ndim == 1]
        of_matrices = _joined_biases(gates, sizes, biases if has_biases else None)
        for i, matrix in enumerate(matrices):
            sums = 128 * matrix.sum(1, dtype=torch.int32)
            scale = next(remaining).detach()
            if i < 2:
                codes.append(_code_panels(matrix, gates))
                compensation.append(_bias(sums, gates))
                floats += [_bias(scale, gates), _bias(of_matrices[i], gates)]
            else:
                codes.append(_code_projection(matrix))
                compensation.append(_projection(sums[:, None]))
                floats.append(_projection(scale[:, None]))
    return torch.cat(codes), torch.cat(compensation), torch.cat(floats)


class _Kept(NamedTuple):
    stamp: tuple
    storages: list[StorageWeakRef]
    sizes: Sizes
    packed: tuple[Tensor, ...]


# By the address of the first weight. An entry is good only while all its storages live: they are held weakly, and a
# weakly held storage keeps its identity, so that a new tensor at an old address is never taken for the old one.
_kept: dict[tuple[int, int], _Kept] = {}


def packed_weights(
    op: str,
    gates: int,
    input_size: int,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    directions: int,
    scales: Sequence[Tensor] | None = None,
) -> tuple[Sizes, tuple[Tensor, ...]]:
    """`sizes_of` and `pack` (with scales `pack_int8`), or what they gave last time for the same tensors and content.

    A change is noticed by torch's version counter, and by a fingerprint of some elements where it is bypassed
    (`parameter.data`).
    """
    tensors = weights if scales is None else [*weights, *scales]
    if weights and not any(w.is_inference() for w in tensors):  # inference tensors have no version counter
        places = [(w.untyped_storage()._cdata, w.data_ptr(), w._version) for w in tensors]
        stamp = (op, input_size, has_biases, num_layers, directions, places, _C.rnn_fingerprint(tensors))
        key = places[0][:2]
        kept = _kept.get(key)
        if kept is not None and kept.stamp == stamp:
            return kept.sizes, kept.packed
    else:
        key = None
    sizes = sizes_of(op, gates, input_size, weights, has_biases, num_layers, directions)
    if scales is None:
        packed = pack(gates, sizes, weights, has_biases)
    else:
        packed = pack_int8(gates, sizes, weights, has_biases, scales)
    if key is not None:
        for old in [k for k, entry in list(_kept.items()) if any(s.expired() for s in entry.storages)]:
            _kept.pop(old, None)
        _kept[key] = _Kept(stamp, [StorageWeakRef(w.untyped_storage()) for w in tensors], sizes, packed)
    return sizes, packed


def _outputs(
    input: Tensor, batch: int, sizes: Sizes, parts: int, directions: int, state_count: int
) -> tuple[Tensor, ...]:
    """output, then the last states: h_n, and c_n where a cell has two."""
    widths = (sizes.state, sizes.hidden)[:state_count]
    return (
        input.new_empty(*input.shape[:-1], directions * sizes.state),
        *(input.new_empty(parts, batch, width) for width in widths),
    )


def _batch(input: Tensor, batch_sizes: Tensor | None, states: Sequence[Tensor | None], batch_first: bool) -> int:
    if batch_sizes is None:
        return input.shape[0 if batch_first else 1]
    return states[0].shape[1]


def run(
    op: str,
    kernel: Callable[..., None],
    gates: int,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    scales: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """The CPU implementation of a recurrent op around its compiled function."""
    check_inputs(op, input, batch_sizes, weights, states, scales)
    directions = 2 if bidirectional else 1
    sizes, packed = packed_weights(op, gates, input.shape[-1], weights, has_biases, num_layers, directions, scales)
    # The kernels compute in float32.
    x, *states = (None if t is None else _plain(t) for t in (input, *states))
    batch = _batch(x, batch_sizes, states, batch_first)
    outputs = _outputs(x, batch, sizes, num_layers * directions, directions, len(states))
    by_step = batch_sizes is None and batch_first
    steps, output = (x.transpose(0, 1), outputs[0].transpose(0, 1)) if by_step else (x, outputs[0])
    kernel(steps, batch_sizes, *states, *packed, num_layers, bidirectional, output, *outputs[1:])
    return outputs if input.dtype is torch.float32 else tuple(t.to(input.dtype) for t in outputs)


def _plain(t: Tensor) -> Tensor:
    """Contiguous float32."""
    if t.dtype is not torch.float32:
        t = t.float()
    return t if t.is_contiguous() else t.contiguous()


def fake(
    op: str,
    gates: int,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    scales: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """The shapes `run` gives."""
    check_inputs(op, input, batch_sizes, weights, states, scales)
    directions = 2 if bidirectional else 1
    sizes = sizes_of(op, gates, input.shape[-1], weights, has_biases, num_layers, directions)
    batch = _batch(input, batch_sizes, states, batch_first)
    return _outputs(input, batch, sizes, num_layers * directions, directions, len(states))


def call(
    op: Callable[..., tuple[Tensor, ...]],
    torch_op: Callable[..., tuple[Tensor, ...]],
    state_count: int,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """The op where it can run, torch's own elsewhere (other devices and dtypes, autocast); with a gradient if asked."""
    tensors = (input, *states, *weights)
    dtype, gradient, plain = input.dtype, False, True
    for t in tensors:
        if t is not None:
            plain = plain and t.dtype is dtype and t.is_cpu
            gradient = gradient or t.requires_grad
    options = (has_biases, num_layers, bidirectional)
    gradient = gradient and torch.is_grad_enabled()
    here = plain and dtype in DTYPES and not torch.is_autocast_enabled("cpu")
    if here and not gradient:
        return op(input, batch_sizes, *states, weights, *options, batch_first)

    def ours(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return op(x, batch_sizes, *others[:state_count], list(others[state_count:]), *options, batch_first)

    def theirs(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        start = others[0] if state_count == 1 else list(others[:state_count])
        arguments = (start, list(others[state_count:]), has_biases, num_layers, 0.0, False, bidirectional)
        if batch_sizes is None:
            return torch_op(x, *arguments, batch_first)
        return torch_op(x, batch_sizes, *arguments)

    if any(state is None for state in states):
        states = _zeros(input, batch_sizes, weights, has_biases, num_layers, bidirectional, batch_first, state_count)
    if here and not torch.compiler.is_compiling():
        return _WithGradient.apply(ours, theirs, input, *states, *weights)
    return theirs(input, *states, *weights)


def _zeros(input, batch_sizes, weights, has_biases, num_layers, bidirectional, batch_first, state_count):
    batch = int(batch_sizes[0]) if batch_sizes is not None else input.shape[0 if batch_first else 1]
    parts = num_layers * (2 if bidirectional else 1)
    plain = 4 if has_biases else 2
    projected = len(weights) // parts > plain
    units = weights[0].shape[0] // (4 if state_count == 2 else 3)
    widths = (weights[plain].shape[0] if projected else units, units)[:state_count]
    return tuple(input.new_zeros(parts, batch, width) for width in widths)


class _WithGradient(torch.autograd.Function):
    """`ours(*tensors)`, with the gradient of `theirs`, torch's own op, which the backward runs again."""

    @staticmethod
    def forward(ctx, ours: Callable, theirs: Callable, *tensors: Tensor):
        ctx.save_for_backward(*tensors)
        ctx.theirs = theirs
        return ours(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        wanted = ctx.needs_input_grad[2:]
        tensors = [t.detach().requires_grad_(asked) for t, asked in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            outputs = ctx.theirs(*tensors)
        found = iter(torch.autograd.grad(outputs, [t for t in tensors if t.requires_grad], grads))
        return None, None, *(next(found) if asked else None for asked in wanted)
