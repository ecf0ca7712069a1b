"""Which layers lose accuracy: the error each one causes when it alone is replaced."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from lamina.configs import ConfigLike, Int8Dynamic
from lamina.quant.calibration import Calibration, check_calibration
from lamina.running import ExampleInputs, FilterFn, caller, evaluating, floats, ratio, squares
from lamina.swap import Candidate, LayerDecision, candidates


@dataclass(frozen=True)
class LayerError:
    """What one layer costs when it alone is replaced; the errors are relative, |new - old| / |old| (Euclidean).

    fqn: its name; was, now: what stood and would stand there; layer_error: of its own output on the inputs it sees in
    the original model, None if it was not called by itself; model_error: of the outputs of the model.
    """

    fqn: str
    was: str
    now: str
    layer_error: float | None
    model_error: float


@dataclass(frozen=True)
class QuantizationReport:
    """Layers, the one that costs the model most first; printing it shows a table.

    layers: one LayerError each; left: what the config concerns but cannot replace, and why; error: of the model's
    outputs with all layers replaced at once.
    """

    layers: tuple[LayerError, ...]
    left: tuple[LayerDecision, ...]
    error: float

    def sorted(self, key: str = "model_error", reverse: bool = True) -> "QuantizationReport":
        """The same report in the order of a field of LayerError, the largest first; layers without a value last.

        >>> print(report.sorted("layer_error"))
        """
        if key not in LayerError.__dataclass_fields__:
            known = ", ".join(LayerError.__dataclass_fields__)
            raise ValueError(f"'{key}' is no field of LayerError; use one of {known}")
        known = [layer for layer in self.layers if getattr(layer, key) is not None]
        unknown = [layer for layer in self.layers if getattr(layer, key) is None]
        known.sort(key=lambda layer: getattr(layer, key), reverse=reverse)
        return QuantizationReport((*known, *unknown), self.left, self.error)

    def __str__(self) -> str:
        table = Table("layer", "was", "now", "its error", "model's error", *(("why",) if self.left else ()))
        for layer in self.layers:
            own = "not called" if layer.layer_error is None else f"{layer.layer_error:.1e}"
            table.add_row(layer.fqn or "(model)", layer.was, layer.now, own, f"{layer.model_error:.1e}")
        for decision in self.left:
            table.add_row(decision.fqn or "(model)", decision.was, "-", "", "", decision.reason)
        console = Console(file=StringIO(), width=140)
        console.print(table)
        return (
            f"{len(self.layers)} layers, all replaced at once: output error {self.error:.1e}\n{console.file.getvalue()}"
        )


@dataclass
class _Sums:
    """Squares of differences and of what they are compared with."""

    difference: float = 0.0
    norm: float = 0.0

    def add(self, actual: Any, expected: Any) -> None:
        difference, norm = squares(floats(actual), floats(expected))
        self.difference += difference
        self.norm += norm

    def error(self) -> float:
        return ratio(self.difference, self.norm)


def report(
    model: nn.Module,
    inputs: ExampleInputs | Iterable[ExampleInputs],
    config: ConfigLike | None = None,
    *,
    filter_fn: FilterFn | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> QuantizationReport:
    """Rank the layers of `model` by the error each one causes when it alone is replaced.

    Run it before `swap_` to learn which layers to leave in float. The model runs once per layer and input, in eval mode
    and on a copy: it is not touched.

    Args:
        model: any module.
        inputs: example inputs, a tuple of positional or a dict of keyword arguments; or an iterable of them (any other
            kind, such as a list or a generator), read once.
        config: what to replace, as in `swap_`; default `Int8Dynamic()`.
        filter_fn: `filter_fn(module, fqn) -> bool`, False leaves the layer out.
        progress: called as progress(description, done, total); total is 0 while it is unknown.

    Returns a QuantizationReport. Raises TypeError for inputs of the wrong kind, ValueError if there are none or if the
    model gives no floating-point output; errors of the model pass through.

    >>> ranked = lamina.quant.report(model, (x,))
    >>> worst = {layer.fqn: None for layer in ranked.layers[:3]}
    >>> lamina.swap_(model, {**worst, "_default": lamina.Int8Dynamic()})
    """
    single = isinstance(inputs, tuple | dict)
    if not single:
        check_calibration("report: inputs", inputs)
        if isinstance(inputs, Calibration):
            raise TypeError("report: a Calibration holds ranges, not inputs; give the example inputs themselves")
    tell = progress or (lambda description, done, total: None)
    work = copy.deepcopy(model)
    found = list(candidates(work, config if config is not None else Int8Dynamic(), filter_fn))
    tried = [c for c in found if isinstance(c, Candidate)]
    own: dict[str, _Sums] = {}
    whole = {c.fqn: _Sums() for c in tried}
    together = _Sums()
    seen = 0
    for example in [inputs] if single else inputs:
        call = caller(example, "report: inputs")
        with evaluating(work):
            expected = _with_layers(work, call, tried, own)
            if not floats(expected):
                raise ValueError("report: the model gives no floating-point output for the inputs")
            for index, candidate in enumerate(tried):
                tell(f"input {seen + 1}: {candidate.fqn or 'the model'}", index, len(tried))
                whole[candidate.fqn].add(_replaced(work, caller(example, "report: inputs"), [candidate]), expected)
            together.add(_replaced(work, caller(example, "report: inputs"), tried), expected)
        seen += 1
    if not seen:
        raise ValueError("report: there are no inputs; the iterable is empty, or a generator that was read before")
    tell("done", len(tried), len(tried))
    layers = tuple(
        LayerError(c.fqn, c.was, c.now, own[c.fqn].error() if c.fqn in own else None, whole[c.fqn].error())
        for c in tried
    )
    left = tuple(decision for decision in found if isinstance(decision, LayerDecision))
    return QuantizationReport(layers, left, together.error()).sorted()


def _with_layers(
    model: nn.Module, call: Callable[[nn.Module], Any], tried: list[Candidate], own: dict[str, _Sums]
) -> Any:
    """The original's output; on the way every replacement runs beside its layer, on the same input."""

    def beside(candidate: Candidate) -> Callable[..., None]:
        def compare(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            own.setdefault(candidate.fqn, _Sums()).add(candidate.after(*args, **kwargs), output)

        return compare

    # A candidate that is a way to call the model itself has no output of its own.
    layers = [c for c in tried if isinstance(c.after, nn.Module)]
    handles = [c.module.register_forward_hook(beside(c), with_kwargs=True) for c in layers]
    try:
        return call(model)
    finally:
        for handle in handles:
            handle.remove()


def _replaced(model: nn.Module, call: Callable[[nn.Module], Any], chosen: list[Candidate]) -> Any:
    try:
        for candidate in chosen:
            candidate.apply()
        return call(model)
    finally:
        for candidate in chosen:
            candidate.revert()
