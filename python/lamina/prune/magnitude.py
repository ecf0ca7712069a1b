"""One-shot pruning: every block gets a score, the lowest go."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.prune.activations import input_squares
from lamina.prune.patterns import Pattern, energies, expand, lowest, lowest_of_neighbours, sizes
from lamina.prune.weights import PruneReport, Taken, Weight
from lamina.running import FilterFn

Scope = Literal["layer", "global", "lamp"]
Sparsity = float | Mapping[str, float]


def magnitude_(
    model: nn.Module,
    sparsity: Sparsity = 0.9,
    pattern: str = "unstructured",
    *,
    scope: Scope = "layer",
    filter_fn: FilterFn | None = None,
) -> PruneReport:
    """Set the smallest weights of `model` to zero, in place.

    A block's score is the sum of its squares, so that what goes is what changes the weight least. Weights that are zero
    already go first: pruning twice, to 50% and then to 90%, is pruning once to 90%. To train afterwards without losing
    the zeros, put masks on them with `hold_`; or let a `GradualPruner` prune while the model trains, which loses less.

    Args:
        model: with nn.Linear, convolutions, LSTM, GRU and RNN (both weights), nn.MultiheadAttention, transformers'
            Conv1D. Biases, norms and embeddings stay.
        sparsity: share of the weights that become zero, 0 to 1; or a policy `{fqn or "re:pattern": share, "_default":
            share}` by the layer's name, which leaves layers alone that it does not name.
        pattern: "unstructured"; "2x1", "4x1", "1x4", "2x4", "4x4", and for GPUs "16x16", "32x32", "64x64": blocks of so
            many output channels x input channels (of one kernel position), where what the edge cuts off is a block
            too; "2:4": two of four neighbouring inputs, at sparsity 0.5 only.
        scope: "layer": every layer to the same sparsity; "global": the blocks of all layers compete, and layers of
            small weights lose more; "lamp": they compete by their share of what their layer has left ("Layer-adaptive
            Sparsity for the Magnitude-based Pruning", Lee et al. 2021, arXiv:2010.07611), which spares small and
            important layers. The last two take one number as sparsity, of all layers together, and no "2:4".
        filter_fn: `filter_fn(module, fqn) -> bool`, False leaves the layer alone.

    Returns the report of what is zero now, and which weights were left alone and why: those with NaN, on meta, with a
    parametrization, or that another module has too. Raises ValueError for an unknown pattern or scope, a sparsity that
    is no share or that the pattern cannot reach, and a model without any layer of these kinds.

    >>> print(lamina.prune.magnitude_(model, 0.9, "4x1"))
    """
    check_scope(scope, sparsity, pattern, "magnitude_")
    taken = Taken(model, pattern, filter_fn, "magnitude_", sparsity)
    prune(taken.chosen, taken.shares, taken.pattern, magnitudes, scope)
    return taken.report()


def random_(
    model: nn.Module,
    sparsity: Sparsity = 0.9,
    pattern: str = "unstructured",
    *,
    seed: int = 0,
    filter_fn: FilterFn | None = None,
) -> PruneReport:
    """Set blocks of weights to zero that chance chooses, in place: what any other choice has to beat.

    Arguments, report and errors are those of `magnitude_`; the same seed chooses the same blocks. Blocks that are zero
    already go first.

    >>> lamina.prune.random_(model, 0.5, "4x4", seed=1)
    """
    taken = Taken(model, pattern, filter_fn, "random_", sparsity)
    generator = torch.Generator().manual_seed(seed)

    def score(weight: Weight, pattern: Pattern) -> Tensor:
        magnitude = magnitudes(weight, pattern)
        chance = 0.5 + torch.rand(magnitude.shape, generator=generator)
        return torch.where(magnitude > 0, chance.to(magnitude.device), 0.0)

    prune(taken.chosen, taken.shares, taken.pattern, score)
    return taken.report()


def wanda_(
    model: nn.Module,
    calibration: Iterable[Any],
    sparsity: Sparsity = 0.5,
    pattern: str = "unstructured",
    *,
    filter_fn: FilterFn | None = None,
) -> PruneReport:
    """Set the weights to zero that matter least for the inputs they meet, in place: pruning without training.

    "A Simple and Effective Pruning Approach for Large Language Models" (Sun et al. 2023, arXiv:2306.11695): a weight's
    score is its magnitude times the norm of its input over the calibration data, and weights compete with those of the
    same output (blocks with those of the same outputs). Inputs are those of the dense model, collected in one pass in
    eval mode; of a convolution, one norm for each channel.

    Args:
        model, sparsity, pattern, filter_fn: as in `magnitude_`.
        calibration: an iterable of example inputs of the whole model, tuples of positional or dicts of keyword
            arguments, read once. A hundred rows tell the norms well enough.

    Returns the report. A layer that calibration never calls, or whose inputs are not seen (nn.MultiheadAttention's
    projections, recurrent layers of more than one layer or direction), is left alone. Raises as `magnitude_` does, and
    TypeError or ValueError for calibration that is empty or of the wrong kind.

    >>> lamina.prune.wanda_(model, [(x,) for x in batches], 0.5, "2:4")
    """
    taken = Taken(model, pattern, filter_fn, "wanda_", sparsity)
    squares, reasons = input_squares(model, calibration, taken.chosen)
    taken.reasons |= reasons

    def score(weight: Weight, pattern: Pattern) -> Tensor:
        return energies(weight.matrix(weight.value()).float().square() * squares[weight.fqn], pattern)

    prune(taken.chosen, taken.shares, taken.pattern, score, "row")
    return taken.report()


def magnitudes(weight: Weight, pattern: Pattern) -> Tensor:
    """The sum of squares of every block."""
    return energies(weight.matrix(weight.value()).float().square(), pattern)


def prune(
    chosen: Sequence[Weight],
    shares: Mapping[str, float],
    pattern: Pattern,
    score: Callable[[Weight, Pattern], Tensor],
    scope: str = "layer",
) -> None:
    """Zeroes the blocks of lowest score, so many as `shares` says.

    score: of a weight, 0 or more for every block, as `energies` gives it. scope: as in `magnitude_`, or "row": blocks
    compete with those of the same outputs.
    """
    if scope in ("layer", "row"):  # one weight after the other: the scores of one are held, not those of the model
        for weight in chosen:
            _zero(weight, _lowest_of_one(weight, score(weight, pattern), shares[weight.fqn], pattern, scope), pattern)
        return
    blocks = {weight: score(weight, pattern) for weight in chosen}
    if not blocks:
        return
    scores = torch.cat([_lamp(part.flatten()) if scope == "lamp" else part.flatten() for part in blocks.values()])
    counts = torch.cat([_sizes(weight, pattern, part).flatten() for weight, part in blocks.items()])
    gone = lowest(scores, next(iter(shares.values())), counts).split([part.numel() for part in blocks.values()])
    for (weight, part), part_gone in zip(blocks.items(), gone, strict=True):
        _zero(weight, part_gone.reshape(part.shape), pattern)


def _sizes(weight: Weight, pattern: Pattern, scores: Tensor) -> Tensor:
    return sizes(pattern, weight.matrix(weight.stored).shape).to(scores.device)


def _zero(weight: Weight, gone: Tensor, pattern: Pattern) -> None:
    shape = weight.matrix(weight.stored).shape
    weight.keep(weight.unmatrix(~expand(gone, pattern, shape)))


def _lowest_of_one(weight: Weight, scores: Tensor, share: float, pattern: Pattern, scope: str) -> Tensor:
    if pattern.most is not None:
        return lowest_of_neighbours(scores, pattern) if share else torch.zeros_like(scores, dtype=torch.bool)
    counts = _sizes(weight, pattern, scores)
    if scope == "row":
        return lowest(scores.flatten(2), share, counts.flatten(2)).reshape(scores.shape)
    return lowest(scores.flatten(), share, counts.flatten()).reshape(scores.shape)


def _lamp(scores: Tensor) -> Tensor:
    """Each score as a share of itself and all larger ones: 1 for the largest, whatever its size."""
    order = scores.argsort(descending=True, stable=True)
    total = scores[order].double().cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
    shares = torch.empty_like(scores)
    shares[order] = (scores[order] / total).to(scores.dtype)
    return shares


def check_scope(scope: str, sparsity: Sparsity, pattern: str, what: str) -> None:
    """ValueError unless the scope is one and goes with sparsity and pattern."""
    if scope not in ("layer", "global", "lamp"):
        raise ValueError(f"{what}: scope is {scope!r}, but must be 'layer', 'global' or 'lamp'")
    if scope != "layer" and isinstance(sparsity, Mapping):
        raise ValueError(f"{what}: scope '{scope}' shares one sparsity out, but sparsity names several; use 'layer'")
    if scope != "layer" and pattern == "2:4":
        raise ValueError(f"{what}: pattern '2:4' leaves every layer half of its weights; use scope 'layer'")
