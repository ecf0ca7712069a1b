"""What recurrent layers compute around a cell, step by step, in plain PyTorch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (gates of the input [B, G H], state of the cell, weights of the layer and direction) -> the next state.
# The first tensor of a state is the output of the step.
State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Sequence[Tensor]], State]


def run(
    cell: Cell,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """input [T, B, I] ([B, T, I] if batch_first, [N, I] packed) -> output and the last states [layers * D, B, *]."""
    directions = 2 if bidirectional else 1
    packed = batch_sizes is not None
    if packed:
        rows = list(input.split(batch_sizes.tolist()))
    else:
        rows = list((input.transpose(0, 1) if batch_first else input).unbind(0))
    each = len(weights) // (num_layers * directions)
    last: list[State] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            at = layer * directions + direction
            part = weights[at * each : (at + 1) * each]
            output, state = _one_direction(cell, rows, tuple(s[at] for s in states), part, backwards=direction == 1)
            outputs.append(output)
            last.append(state)
        rows = [torch.cat(both, dim=-1) for both in zip(*outputs, strict=True)]
    output = torch.cat(rows) if packed else torch.stack(rows, dim=1 if batch_first else 0)
    return output, *(torch.stack(parts) for parts in zip(*last, strict=True))


def _one_direction(
    cell: Cell, rows: list[Tensor], start: State, weights: Sequence[Tensor], backwards: bool
) -> tuple[list[Tensor], State]:
    """Sequences that end early (rows sorted by length) keep their last state."""
    state = start
    outputs: list[Tensor] = [None] * len(rows)  # type: ignore[list-item]
    for t in reversed(range(len(rows))) if backwards else range(len(rows)):
        n = rows[t].shape[0]
        after = cell(rows[t], tuple(s[:n] for s in state), weights)
        outputs[t] = after[0]
        state = tuple(torch.cat([new, old[n:]]) for new, old in zip(after, state, strict=True))
    return outputs, state


def with_scales(weights: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    """The flat list of int8 weights with the scale of each matrix right behind it."""
    remaining = iter(scales)
    joined: list[Tensor] = []
    for weight in weights:
        joined += [weight, next(remaining)] if weight.ndim == 2 else [weight]
    return joined


def int8_parts(weights: Sequence[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """What `with_scales` made of a layer's weights -> (codes, scale) pairs and the biases."""
    places = [i for i, weight in enumerate(weights) if weight.ndim == 2]
    taken = {i + 1 for i in places}
    biases = [w for i, w in enumerate(weights) if w.ndim == 1 and i not in taken]
    return [(weights[i], weights[i + 1]) for i in places], biases
