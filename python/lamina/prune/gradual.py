"""Pruning while a model trains: masks that hold zeros whatever the optimizer does, and a schedule that adds to them."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lamina.prune.magnitude import Scope, Sparsity, check_scope, magnitudes, prune
from lamina.prune.patterns import Pattern, energies, parse
from lamina.prune.weights import PruneReport, Taken, Weight, describe, weights
from lamina.running import FilterFn

# Of the importance by gradients, so much stays from one step to the next: an average over about fifty steps.
_MEMORY = 0.98


def hold_(model: nn.Module, filter_fn: FilterFn | None = None) -> PruneReport:
    """Put masks on the weights of `model` that have zeros, in place: training keeps the zeros.

    The masks are parametrizations (`torch.nn.utils.parametrize`): the layer computes with the masked weight, and what
    lies below the mask gets no gradient and has no effect. Parameters stay the same objects, so an optimizer that has
    them goes on working. `bake_` takes the masks off again.

    Returns the report; a weight without a single zero is left alone, and so is what `magnitude_` leaves.

    >>> lamina.prune.magnitude_(model, 0.9); lamina.prune.hold_(model)
    >>> train(model)
    >>> lamina.prune.bake_(model)
    """
    taken = Taken(model, "unstructured", filter_fn, "hold_")
    for weight in taken.chosen:
        mask = weight.value() != 0
        if weight.mask is None and bool(mask.all()):
            taken.reasons[weight.fqn] = "it has no zeros to hold"
        elif weight.mask is None:
            weight.hold(mask)
        else:
            weight.keep(mask)
    return taken.report()


def bake_(model: nn.Module) -> PruneReport:
    """Take all masks off the weights of `model`, in place, and leave their zeros: an ordinary model again.

    What `swap_` puts sparse layers in place of. The report says what is zero; weights without a mask are left alone.

    >>> lamina.prune.bake_(model)
    """
    taken = Taken(model, "unstructured", None, "bake_")
    for weight in taken.weights:
        if weight.mask is None:
            taken.reasons[weight.fqn] = "it has no mask"
        elif len(weight.module.parametrizations[weight.name]) == 1:
            weight.bake()
    return taken.report()


def verify(model: nn.Module, report: PruneReport) -> None:
    """Raise ValueError if weights of `model` have fewer zero blocks than `report` says: if training broke the masks.

    >>> pruned = lamina.prune.magnitude_(model, 0.9, "4x4")
    >>> train(model)  # without hold_
    >>> lamina.prune.verify(model, pruned)
    ValueError: verify: training broke the masks of 3 weights, ...
    """
    found = {weight.fqn: weight for weight in weights(model)}
    missing = [item.fqn for item in report.pruned if item.fqn not in found]
    if missing:
        raise ValueError(f"verify: the model has no weight {missing[0]} any more, which the report says was pruned")
    broken = []
    for item in report.pruned:
        now = describe(found[item.fqn], parse(item.pattern, "verify"))
        if now.zero_blocks < item.zero_blocks:
            broken.append((item.zero_blocks - now.zero_blocks, item, now))
    if broken:
        _, was, now = max(broken, key=lambda entry: entry[0])
        raise ValueError(
            f"verify: training broke the masks of {len(broken)} weight{'s' if len(broken) > 1 else ''}, most of all "
            f"{was.fqn}, where {now.zero_blocks:,} of {was.zero_blocks:,} zero blocks are left; put masks on with "
            "lamina.prune.hold_ before training"
        )


class GradualPruner:
    """Prunes while a model trains, more and more, so that it can make up for what goes.

    "To prune, or not to prune" (Zhu & Gupta 2017, arXiv:1710.01878): the sparsity rises from `initial` to `sparsity`
    over `steps` training steps as a cubic, fast first, while there is much that nobody misses. What it has zeroed stays
    zero: masks hold it (see `hold_`), buffers of the model that are saved with it.

    Args:
        model: in place. Masks go on at once, so load a checkpoint of a held model after making the pruner.
        sparsity, pattern, scope, filter_fn: as in `magnitude_`. "2:4" goes in one step, at the end of the schedule.
        steps: training steps from the first change to the last.
        start: training steps before the first change.
        every: training steps between changes. Sorting a large layer takes as long as a step of training.
        score: "magnitude": the sum of squares of a block; "taylor": how much the loss would change without the block,
            to first order, (sum of weight times gradient)^2 ("Importance Estimation for Neural Network Pruning",
            Molchanov et al. 2019, arXiv:1906.10771), averaged over the last steps. Much better for blocks, of which no
            trained model has small ones; made for scope "global", since the loss is everybody's. Needs `start` above 0
            to see gradients first, and `step` to be called while they are there.
        initial: the sparsity to start from; of a model that is pruned already, the sparsity it has.

    Raises ValueError as `magnitude_` does, and for steps, start or every out of range.

    >>> pruner = lamina.prune.GradualPruner(model, 0.9, "4x4", steps=1000, every=10)
    >>> for x, y in batches:
    ...     loss(model(x), y).backward()
    ...     optimizer.step()
    ...     pruner.step()
    ...     optimizer.zero_grad()
    >>> print(pruner.finish())
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: Sparsity = 0.9,
        pattern: str = "unstructured",
        *,
        steps: int,
        start: int = 0,
        every: int = 1,
        initial: float = 0.0,
        scope: Scope = "layer",
        score: Literal["magnitude", "taylor"] = "magnitude",
        filter_fn: FilterFn | None = None,
    ) -> None:
        check_scope(scope, sparsity, pattern, "GradualPruner")
        if score not in ("magnitude", "taylor"):
            raise ValueError(f"GradualPruner: score is {score!r}, but must be 'magnitude' or 'taylor'")
        if steps < 0 or start < 0 or every < 1:
            raise ValueError(
                f"GradualPruner: steps is {steps}, start {start} and every {every}, but must be at least 0, 0 and 1"
            )
        if not 0.0 <= initial <= 1.0:
            raise ValueError(f"GradualPruner: initial is {initial:g}, but must be between 0 and 1")
        self._taken = Taken(model, pattern, filter_fn, "GradualPruner", sparsity)
        self._initial, self._scope = initial, scope
        self._start, self._steps, self._every = start, steps, every
        self._done = 0
        self._by_gradient = score == "taylor"
        for weight in self._taken.chosen:
            if self._by_gradient and not weight.stored.requires_grad:
                self._taken.reasons[weight.fqn] = "it does not train, and has no gradient to be scored by"
                continue
            mask = weight.mask or weight.hold(torch.ones_like(weight.stored, dtype=torch.bool))
            if self._by_gradient:
                mask.importance = torch.zeros_like(magnitudes(weight, self._taken.pattern))
        if start == 0:
            self._prune()

    @property
    def progress(self) -> float:
        """How much of the way from `initial` to `sparsity` is behind, 0 to 1, by the cubic."""
        if self.finished:
            return 1.0
        done = max(0, self._done - self._start) / max(1, self._steps)
        return 1.0 - (1.0 - done) ** 3

    @property
    def finished(self) -> bool:
        """Whether the last change has been made."""
        return self._done >= self._start + self._steps

    def step(self) -> None:
        """Call once after each step of the optimizer, before the gradients are cleared.

        Raises ValueError if a mask is gone: something took the parametrization off during training; and with score
        "taylor" if there are no gradients.
        """
        self._check()
        if self._by_gradient and not self.finished:
            self._observe()
        self._done += 1
        since = self._done - self._start
        if 0 <= since <= self._steps and (since % self._every == 0 or since == self._steps):
            self._prune()

    def finish(self) -> PruneReport:
        """Take the masks off and leave the zeros; returns what is zero. As early as you like: it stays as it is."""
        self._check()
        for weight in self._taken.chosen:
            weight.bake()
        return self._taken.report()

    def report(self) -> PruneReport:
        """What is zero now."""
        return self._taken.report()

    def state_dict(self) -> dict[str, int]:
        """What the model does not save by itself: where in the schedule the pruner is."""
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where the pruner that gave `state` was; load the model's state as well."""
        self._done = int(state["done"])

    def _prune(self) -> None:
        if self._taken.pattern.most is not None:
            shares = self._taken.shares if self.finished else dict.fromkeys(self._taken.shares, 0.0)
        else:
            shares = {
                fqn: share - (share - min(self._initial, share)) * (1.0 - self.progress)
                for fqn, share in self._taken.shares.items()
            }
        prune(self._taken.chosen, shares, self._taken.pattern, self._score, self._scope)

    def _observe(self) -> None:
        """Adds this step's gradients to the importance of every block."""
        pattern = self._taken.pattern
        if all(weight.stored.grad is None for weight in self._taken.chosen):
            raise ValueError(
                "GradualPruner: there are no gradients to score by; call step() after backward() and before zero_grad()"
            )
        for weight in self._taken.chosen:
            if weight.stored.grad is not None:
                change = weight.matrix(weight.stored.detach() * weight.stored.grad).float()
                squares = energies(change, pattern).square()
                if torch.isfinite(squares).all():  # an overflow, as of mixed precision, says nothing
                    weight.mask.importance.lerp_(squares, 1 - _MEMORY)

    def _score(self, weight: Weight, pattern: Pattern) -> Tensor:
        magnitude = magnitudes(weight, pattern)
        if not self._by_gradient or not self._observed():
            return magnitude
        # What is zero already comes first, also before blocks whose gradient happens to be zero.
        importance = weight.mask.importance.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.where(magnitude > 0, importance, 0.0)

    def _observed(self) -> bool:
        return any(bool(weight.mask.importance.any()) for weight in self._taken.chosen)

    def _check(self) -> None:
        gone = [weight.fqn for weight in self._taken.chosen if weight.mask is None]
        if gone:
            raise ValueError(
                f"GradualPruner: the mask of {gone[0]} is gone, taken off while it was pruned; let finish() take masks "
                "off, at the end"
            )
