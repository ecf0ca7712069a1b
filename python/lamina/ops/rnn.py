"""What the recurrent ops share: weights in the order the kernels read them, kept between calls, and the gradient.

The ops take weights as torch's own do, a flat list: per layer and direction w_ih [G H, I], w_hh [G H, R], then b_ih and
b_hh [G H] if there are biases, then w_hr [R, H] if there is a projection. Packing them costs about as much as one step,
so the packed form is kept for as long as the weights live and do not change.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina import _C
from lamina.ops.library import LIBRARY, define
from lamina.ops.packed_cache import PackedCache
from lamina.quant.weights import dequantize_weight

DTYPES = (torch.float32, torch.bfloat16)

# Units of a panel, and outputs of a panel of the projection; csrc/ops/rnn.h has the layout.
_LANES = 16
_COLUMNS = 64


class Cell(NamedTuple):
    """What tells the recurrent ops apart: gates of a unit, states of a cell, values a unit keeps for its gradient."""

    op: str
    gates: int
    states: int
    saved: int
    torch_op: Callable[..., tuple[Tensor, ...]]


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


def _gate_panels(matrix: Tensor, gates: int, together: int) -> Tensor:
    """[G H, K] -> [H / 16 rounded up, K / together rounded up, G, 16, together], flat."""
    units = matrix.shape[0] // gates
    padded = F.pad(matrix.reshape(gates, units, -1), (0, -matrix.shape[1] % together, 0, -units % _LANES))
    return padded.unflatten(2, (-1, together)).unflatten(1, (-1, _LANES)).permute(1, 3, 0, 2, 4).reshape(-1)


def _projection_panels(matrix: Tensor, gates: int, together: int) -> Tensor:
    """[R, H] -> [R / 64 rounded up, H / together rounded up, 64, together], flat."""
    padded = F.pad(matrix, (0, -matrix.shape[1] % together, 0, -matrix.shape[0] % _COLUMNS))
    return padded.unflatten(1, (-1, together)).unflatten(0, (-1, _COLUMNS)).transpose(1, 2).reshape(-1)


# Of w_ih, w_hh and w_hr.
_COLUMN_ORDERS = (_gate_panels, _gate_panels, _projection_panels)


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


def pack(
    gates: int, sizes: Sizes, weights: Sequence[Tensor], has_biases: bool, scales: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """The weights as panels of their dtype, float32 biases (and scales), and for int8 the compensation.

    In the order of csrc/ops/rnn.h.
    """
    panels, floats, compensation = [], [], []
    remaining = iter(scales or ())
    for at in range(0, len(weights), sizes.each):
        part = [w.detach() for w in weights[at : at + sizes.each]]
        matrices = [*part[:2], *(part[-1:] if sizes.state < sizes.hidden else ())]
        biases = _joined_biases(gates, sizes, [b.float() for b in part[2:4]] if has_biases else None)
        for matrix, in_columns, bias in zip(matrices, _COLUMN_ORDERS, (*biases, None), strict=False):
            panels.append(in_columns(matrix, gates, 4 if matrix.dtype is torch.int8 else 1))
            if matrix.dtype is torch.int8:
                compensation.append(in_columns(128 * matrix.sum(1, True, dtype=torch.int32), gates, 1))
                floats.append(in_columns(next(remaining).detach()[:, None], gates, 1))
            if bias is not None:
                floats.append(in_columns(bias[:, None], gates, 1))
    return tuple(torch.cat(pieces) for pieces in (panels, floats, compensation) if pieces)


_packed: PackedCache[tuple[Sizes, tuple[Tensor, ...]]] = PackedCache()


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
    """`sizes_of` and `pack`, or what they gave last time."""

    def make() -> tuple[Sizes, tuple[Tensor, ...]]:
        sizes = sizes_of(op, gates, input_size, weights, has_biases, num_layers, directions)
        return sizes, pack(gates, sizes, weights, has_biases, scales)

    tensors = weights if scales is None else [*weights, *scales]
    return _packed.get(tensors, (op, input_size, has_biases, num_layers, directions), make)


def _outputs(
    input: Tensor, batch: int, sizes: Sizes, parts: int, directions: int, state_count: int
) -> tuple[Tensor, ...]:
    """output, then the last states: h_n, and c_n where a cell has two."""
    shapes = [(parts, batch, width) for width in (sizes.state, sizes.hidden)[:state_count]]
    shapes.insert(0, (*input.shape[:-1], directions * sizes.state))
    return tuple(input.new_empty(shape) for shape in shapes)


def _batch(input: Tensor, batch_sizes: Tensor | None, states: Sequence[Tensor | None], batch_first: bool) -> int:
    if batch_sizes is None:
        return input.shape[0 if batch_first else 1]
    return states[0].shape[1]


def _saved(cell: Cell, input: Tensor, sizes: Sizes, directions: int) -> Tensor:
    """What the forward of one layer leaves for its backward, by direction, panel of units and row of the input."""
    rows = math.prod(input.shape[:-1])
    panels = -(-sizes.hidden // _LANES)
    return input.new_empty(directions, panels, rows, cell.saved, _LANES, dtype=torch.float32)


def run(
    cell: Cell,
    kernel: Callable[..., None],
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    scales: Sequence[Tensor] | None = None,
    saves: bool = False,
) -> tuple[Tensor, ...]:
    """The CPU implementation of a recurrent op around its compiled function."""
    check_inputs(cell.op, input, batch_sizes, weights, states, scales)
    directions = 2 if bidirectional else 1
    sizes, packed = packed_weights(
        cell.op, cell.gates, input.shape[-1], weights, has_biases, num_layers, directions, scales
    )
    # The kernels compute in float32.
    x, *states = (None if t is None else _plain(t) for t in (input, *states))
    batch = _batch(x, batch_sizes, states, batch_first)
    outputs = _outputs(x, batch, sizes, num_layers * directions, directions, len(states))
    by_step = batch_sizes is None and batch_first
    steps, output = (x.transpose(0, 1), outputs[0].transpose(0, 1)) if by_step else (x, outputs[0])
    saved = ()
    if cell.saved and scales is None:
        saved = (_saved(cell, x, sizes, directions) if saves else None,)
    kernel(steps, batch_sizes, *states, *packed, num_layers, bidirectional, output, *outputs[1:], *saved)
    if saves:
        return *outputs, saved[0] if saved else x.new_empty(0)
    return outputs if input.dtype is torch.float32 else tuple(t.to(input.dtype) for t in outputs)


def _plain(t: Tensor) -> Tensor:
    """Contiguous float32."""
    if t.dtype is not torch.float32:
        t = t.float()
    return t if t.is_contiguous() else t.contiguous()


def run_float(
    cell: Cell,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    scales: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The CUDA implementation of a recurrent op with int8 weights: torch's float op, with what the codes mean."""
    check_inputs(cell.op, input, batch_sizes, weights, states, scales)
    remaining = iter(scales)
    floats = [(dequantize_weight(w, next(remaining)) if w.ndim == 2 else w).to(input.dtype) for w in weights]
    options = (has_biases, num_layers, bidirectional, batch_first)
    return _torch_op(cell, input, batch_sizes, states, floats, *options, 0.0)


def fake(
    cell: Cell,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    scales: Sequence[Tensor] | None = None,
    saves: bool = False,
) -> tuple[Tensor, ...]:
    """The shapes `run` gives."""
    check_inputs(cell.op, input, batch_sizes, weights, states, scales)
    directions = 2 if bidirectional else 1
    sizes = sizes_of(cell.op, cell.gates, input.shape[-1], weights, has_biases, num_layers, directions)
    batch = _batch(input, batch_sizes, states, batch_first)
    outputs = _outputs(input, batch, sizes, num_layers * directions, directions, len(states))
    if not saves:
        return outputs
    return *outputs, _saved(cell, input, sizes, directions) if cell.saved else input.new_empty(0)


# -- gradients


def backward(
    cell: Cell,
    grads: Sequence[Tensor | None],
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    has_biases: bool,
    bidirectional: bool,
    output: Tensor,
    saved: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of the input, the initial states and the weights of one layer [T, B, *], or packed [N, *].

    `grads` are those of the output and of the last states. The compiled part runs over the steps and gives the
    gradient of every gate's sum, d_x; the rest are products of whole matrices.
    """
    directions, each = (2, len(weights) // 2) if bidirectional else (1, len(weights))
    hidden = weights[1].shape[1]
    batch = int(batch_sizes[0]) if batch_sizes is not None else input.shape[1]
    rows = math.prod(input.shape[:-1])
    padding = -hidden % _LANES

    def of_state(grad: Tensor | None) -> Tensor:
        if grad is None:
            return input.new_zeros(directions, batch, hidden + padding)
        return F.pad(grad, (0, padding)).contiguous()

    d_h = of_state(grads[1])
    d_c = of_state(grads[2]) if cell.states == 2 else None
    is_gru = cell.gates == 3
    d_x = input.new_empty(directions, rows, cell.gates * hidden)
    d_of_state = torch.empty_like(d_x) if is_gru else None
    transposed = torch.stack(
        [F.pad(w, (0, padding)).unflatten(1, (-1, _LANES)).transpose(0, 1) for w in weights[1::each]]
    )
    h_0, *others = (None if state is None else state.contiguous() for state in states)
    _C.rnn_backward(
        cell.op,
        batch_sizes,
        output.contiguous(),
        saved if cell.saved else None,
        h_0,
        others[0] if others else None,
        None if grads[0] is None else grads[0].contiguous(),
        transposed.contiguous(),
        d_h,
        torch.zeros_like(d_h) if is_gru else None,
        d_c,
        d_x,
        d_of_state,
    )
    x = input.reshape(rows, -1)
    d_input = sum(d_x[d] @ weights[d * each] for d in range(directions)).view_as(input)
    d_weights: list[Tensor] = []
    for d in range(directions):
        mine = d_x[d]
        theirs = mine if d_of_state is None else d_of_state[d]
        own = output[..., d * hidden : (d + 1) * hidden]
        start = input.new_zeros(batch, hidden) if h_0 is None else h_0[d]
        before = _states_before(own, start, batch_sizes, backwards=d == 1)
        d_weights += [mine.T @ x, theirs.T @ before]
        if has_biases:
            d_weights += [mine.sum(0), theirs.sum(0)]
    d_states = [d[..., :hidden] for d in (d_h, d_c) if d is not None]
    return d_input, d_states, d_weights


def _states_before(output: Tensor, start: Tensor, batch_sizes: Tensor | None, backwards: bool) -> Tensor:
    """[N, H]: the state that each row of the output of one direction came from."""
    if batch_sizes is None:
        pieces = [output[1:].flatten(0, 1), start] if backwards else [start, output[:-1].flatten(0, 1)]
        return torch.cat(pieces)
    rows = list(output.split(batch_sizes.tolist()))
    pieces = []
    for t, now in enumerate(rows):
        earlier = t + 1 if backwards else t - 1
        known = rows[earlier][: len(now)] if 0 <= earlier < len(rows) else now[:0]
        pieces += [known, start[len(known) : len(now)]]
    return torch.cat(pieces)


def define_with_gradient(cell: Cell, kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """Defines `lamina::<op>.with_saved`, one layer of the op that also returns what its gradient needs, with that
    gradient, `lamina::<op>.backward`. Returns the first."""
    states = ["h_0", "c_0"][: cell.states]
    count = cell.states
    tail = "Tensor[] weights, bool has_biases, bool bidirectional"
    starts = ", ".join(f"Tensor? {name}" for name in states)

    def saves(function: Callable) -> Callable:
        def with_saved(input, batch_sizes, *rest):
            weights, has_biases, bidirectional = rest[count:]
            options = (has_biases, 1, bidirectional, False)
            return function(input, batch_sizes, rest[:count], weights, *options, saves=True)

        return with_saved

    define(
        f"{cell.op}.with_saved(Tensor input, Tensor? batch_sizes, {starts}, {tail}) -> "
        f"({', '.join(['Tensor'] * (count + 2))})",
        cpu=saves(partial(run, cell, kernel)),
        fake=saves(partial(fake, cell)),
    )

    def cpu(input, batch_sizes, *rest):
        starts, (weights, has_biases, bidirectional, output, saved, *grads) = rest[:count], rest[count:]
        return backward(cell, grads, input, batch_sizes, starts, weights, has_biases, bidirectional, output, saved)

    def fake_backward(input, batch_sizes, *rest):
        weights = rest[count]
        directions = 2 if rest[count + 2] else 1
        hidden = weights[1].shape[1]
        batch = rest[count + 6].shape[1]
        new = [input.new_empty(directions, batch, hidden) for _ in range(count)]
        return torch.empty_like(input), new, [torch.empty_like(w) for w in weights]

    define(
        f"{cell.op}.backward(Tensor input, Tensor? batch_sizes, {starts}, {tail}, Tensor output, Tensor saved, "
        f"{', '.join(f'Tensor grad_{i}' for i in range(count + 1))}) -> (Tensor, Tensor[], Tensor[])",
        cpu=cpu,
        fake=fake_backward,
    )
    forward = getattr(torch.ops.lamina, cell.op).with_saved
    backward_op = getattr(torch.ops.lamina, cell.op).backward

    def setup_context(ctx, inputs, output):
        input, batch_sizes, *rest = inputs
        weights, ctx.has_biases, ctx.bidirectional = rest[count:]
        ctx.has_starts = [state is not None for state in rest[:count]]
        kept = [t for t in (batch_sizes, *rest[:count]) if t is not None]
        ctx.has_sizes = batch_sizes is not None
        ctx.save_for_backward(input, output[0], output[-1], *kept, *weights)
        ctx.mark_non_differentiable(output[-1])

    def gradient(ctx, *grads):
        input, output, saved, *others = ctx.saved_tensors
        batch_sizes = others.pop(0) if ctx.has_sizes else None
        starts = [others.pop(0) if there else None for there in ctx.has_starts]
        options = (others, ctx.has_biases, ctx.bidirectional, output, saved)
        d_input, d_states, d_weights = backward_op(input, batch_sizes, *starts, *options, *grads[:-1])
        d_states = [d if there else None for d, there in zip(d_states, ctx.has_starts, strict=True)]
        return d_input, None, *d_states, d_weights, None, None

    torch.library.register_autograd(f"lamina::{cell.op}.with_saved", gradient, setup_context=setup_context, lib=LIBRARY)
    return forward


# -- calls


def call(
    cell: Cell,
    op: Callable[..., tuple[Tensor, ...]],
    with_gradient: Callable[..., tuple[Tensor, ...]],
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float = 0.0,
) -> tuple[Tensor, ...]:
    """The op where it can run, torch's own elsewhere (GPUs, other dtypes, autocast); with a gradient if asked."""
    tensors = (input, *states, *weights)
    dtype, gradient, plain = input.dtype, False, True
    for t in tensors:
        if t is not None:
            plain = plain and t.dtype is dtype and t.is_cpu
            gradient = gradient or t.requires_grad
    gradient = gradient and torch.is_grad_enabled()
    plain = plain and dtype in DTYPES and not torch.is_autocast_enabled("cpu")
    if plain and not gradient and dropout == 0.0:
        return op(input, batch_sizes, *states, weights, has_biases, num_layers, bidirectional, batch_first)
    directions = 2 if bidirectional else 1
    plain_each = 4 if has_biases else 2
    projected = len(weights) // max(num_layers * directions, 1) != plain_each
    if plain and dtype is torch.float32 and not projected:
        check_inputs(cell.op, input, batch_sizes, weights, states)
        sizes_of(cell.op, cell.gates, input.shape[-1], weights, has_biases, num_layers, directions)
        x = input.transpose(0, 1) if batch_first and batch_sizes is None else input
        last = []
        for layer in range(num_layers):
            mine = slice(layer * directions, (layer + 1) * directions)
            starts = [None if state is None else state[mine] for state in states]
            part = weights[mine.start * plain_each : mine.stop * plain_each]
            x, *ends, _ = with_gradient(x, batch_sizes, *starts, part, has_biases, bidirectional)
            last.append(ends)
            if dropout > 0.0 and layer + 1 < num_layers:
                x = F.dropout(x, dropout)
        output = x.transpose(0, 1) if batch_first and batch_sizes is None else x
        return output, *(torch.cat(ends) for ends in zip(*last, strict=True))
    options = (has_biases, num_layers, bidirectional, batch_first)
    return _torch_op(cell, input, batch_sizes, states, weights, *options, dropout)


def _torch_op(
    cell: Cell,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
) -> tuple[Tensor, ...]:
    if any(state is None for state in states):
        directions = 2 if bidirectional else 1
        sizes = sizes_of(cell.op, cell.gates, input.shape[-1], weights, has_biases, num_layers, directions)
        batch = int(batch_sizes[0]) if batch_sizes is not None else _batch(input, None, states, batch_first)
        widths = (sizes.state, sizes.hidden)[: cell.states]
        states = tuple(input.new_zeros(num_layers * directions, batch, width) for width in widths)
    start = states[0] if cell.states == 1 else list(states)
    arguments = (start, list(weights), has_biases, num_layers, dropout, dropout > 0.0, bidirectional)
    if batch_sizes is None:
        return cell.torch_op(input, *arguments, batch_first)
    return cell.torch_op(input, batch_sizes, *arguments)
