"""Which layer bears which sparsity: each pruned alone, and the model judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lamina.prune.magnitude import magnitudes, prune
from lamina.prune.patterns import check_sparsity
from lamina.prune.weights import Taken, Weight
from lamina.running import FilterFn


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer. fqn: its name; elements: of its weights; scores: sparsity -> what the model reached with it."""

    fqn: str
    elements: int
    scores: Mapping[float, float]


@dataclass(frozen=True)
class SensitivityReport:
    """What the model reached with each layer pruned alone; printing it shows a table.

    baseline: with none pruned; pattern: of the zeros; layers: in the model's order.
    """

    baseline: float
    pattern: str
    layers: tuple[LayerSensitivity, ...]

    def policy(self, max_drop: float) -> dict[str, float]:
        """For each layer the highest sparsity that was tried and costs at most `max_drop`: what `magnitude_` takes.

        A layer that bears none is not named, and so is left alone. Layers that err together cost more than each alone:
        fine-tune afterwards, or ask for less.

        >>> lamina.prune.magnitude_(model, scan.policy(max_drop=0.01), "4x4")
        """
        found = {}
        for layer in self.layers:
            borne = [share for share, score in layer.scores.items() if score >= self.baseline - max_drop]
            if borne:
                found[layer.fqn] = max(borne)
        return found

    def __str__(self) -> str:
        shares = list(self.layers[0].scores) if self.layers else []
        table = Table("layer", "weights", *(f"{share:.0%} zeros" for share in shares))
        for layer in self.layers:
            table.add_row(layer.fqn, f"{layer.elements:,}", *(f"{score:.4f}" for score in layer.scores.values()))
        console = Console(file=StringIO(), width=140)
        console.print(table)
        return f"{self.baseline:.4f} with no layer pruned; pattern {self.pattern}\n{console.file.getvalue()}"


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    pattern: str = "unstructured",
    *,
    filter_fn: FilterFn | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> SensitivityReport:
    """Prune each layer of `model` alone by magnitude, without training, and judge the model each time.

    Args:
        model: every weight has its own values back afterwards.
        evaluate: `evaluate(model) -> float`, the higher the better, such as an accuracy; the same for the same weights.
        sparsities: shares of zeros to try; "2:4" has only 0.5.
        pattern, filter_fn: as in `magnitude_`.
        progress: called as progress(description, done, total).

    Raises as `magnitude_` does, and ValueError without sparsities; errors of `evaluate` pass through.

    >>> print(lamina.prune.sensitivity(model, lambda m: evaluate(m, *splits.validation).accuracy, pattern="4x4"))
    """
    taken = Taken(model, pattern, filter_fn, "sensitivity")
    shares = sorted({check_sparsity(share, taken.pattern, "sensitivity") for share in sparsities})
    if not shares:
        raise ValueError("sensitivity: there are no sparsities to try; give for example (0.5, 0.9)")
    layers: dict[str, list[Weight]] = {}
    for weight in taken.chosen:
        layers.setdefault(weight.layer, []).append(weight)
    tell = progress or (lambda description, done, total: None)
    total = len(layers) * len(shares)
    baseline = float(evaluate(model))
    rows = []
    for index, (fqn, members) in enumerate(layers.items()):
        stored = [(weight, weight.stored.detach().clone()) for weight in members]
        masks = [(weight.mask.mask, weight.mask.mask.clone()) for weight in members if weight.mask is not None]
        scores = {}
        try:
            for share in shares:
                tell(f"{fqn or 'the model'} at {share:.0%}", index * len(shares) + len(scores), total)
                prune(members, {weight.fqn: share for weight in members}, taken.pattern, magnitudes)
                scores[share] = float(evaluate(model))
        finally:
            with torch.no_grad():
                for weight, values in stored:
                    weight.stored.copy_(values)
                for mask, values in masks:
                    mask.copy_(values)
        rows.append(LayerSensitivity(fqn, sum(values.numel() for _, values in stored), scores))
    return SensitivityReport(baseline, pattern, tuple(rows))
