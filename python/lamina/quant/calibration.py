"""Calibration: the range of every layer's input, collected in one pass over example inputs of the whole model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lamina.nn.convs import as_conv
from lamina.nn.linears import as_linear
from lamina.quant.observers import Observer, check_observer, make_observer
from lamina.running import FilterFn, caller, evaluating, first_tensor


@dataclass(frozen=True)
class Calibration:
    """Input scales of layers by name, from `calibrate`. Holds numbers, not data, and can be used any number of times.

    scales: name of a layer -> step of its int8 input codes; reasons: name -> why a layer has none.
    """

    scales: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)

    def scale(self, fqn: str) -> float:
        """Raises ValueError with the reason if the layer has no scale."""
        if fqn not in self.scales:
            raise ValueError(self.reasons.get(fqn, "the calibration does not know this layer"))
        return self.scales[fqn]


def takes_static_scale(module: nn.Module) -> bool:
    """Whether an int8 layer with a static input scale can take the module's place."""
    return as_linear(module) is not None or as_conv(module) is not None


def calibrate(
    model: nn.Module,
    calibration: Iterable[Any],
    observer: str = "minmax",
    *,
    percentile: float = 99.99,
    filter_fn: FilterFn | None = None,
) -> Calibration:
    """The input scale of every linear and convolutional layer of `model`, for `Int8Static`, as often as you like.

    Args:
        model: runs in eval mode and keeps its modes.
        calibration: an iterable of example inputs, tuples of positional or dicts of keyword arguments; read once.
        observer, percentile: as in `Int8Static`.
        filter_fn: `filter_fn(module, fqn) -> bool`, False leaves the layer out.

    Returns a Calibration. Raises TypeError for a calibration or an input of the wrong kind, ValueError if there is no
    input; errors of the model pass through and leave it as it was.

    >>> ranges = lamina.quant.calibrate(model, batches, observer="mse")
    >>> lamina.swap_(model, lamina.Int8Static(ranges))
    """
    check_observer(observer, percentile)
    check_calibration("calibrate: calibration", calibration)
    if isinstance(calibration, Calibration):
        return calibration
    observed = {
        fqn: (module, make_observer(observer, percentile))
        for fqn, module in model.named_modules()
        if takes_static_scale(module) and (filter_fn is None or filter_fn(module, fqn))
    }
    return observe(model, calibration, [observed], "calibrate")[0]


def observe(
    model: nn.Module, data: Iterable[Any], observed: Sequence[Mapping[str, tuple[nn.Module, Observer]]], what: str
) -> list[Calibration]:
    """One pass over `data` in which every observer sees the inputs of its module; a Calibration for each mapping."""
    with ExitStack() as stack:
        for pairs in observed:
            for module, observer in pairs.values():
                stack.enter_context(watching(module, observer.update))
        for _ in run_over(model, data, what):
            pass
    return [_scales({fqn: observer for fqn, (_, observer) in pairs.items()}) for pairs in observed]


def _scales(observers: Mapping[str, Observer]) -> Calibration:
    scales, reasons = {}, {}
    for fqn, observer in observers.items():
        if not observer.calls:
            reasons[fqn] = "not called by the calibration inputs"
            continue
        try:
            scales[fqn] = observer.scale()
        except ValueError as error:
            reasons[fqn] = f"its input has no static scale: {error}"
    return Calibration(scales, reasons)


@contextmanager
def watching(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Calls `see` with the input of `module` each time it is called."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found = first_tensor(args, kwargs)
        if found is not None and found.is_floating_point():
            see(found)

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run_over(
    model: nn.Module, data: Iterable[Any], what: str, around: AbstractContextManager | None = None
) -> Iterator[Any]:
    """The outputs of the model, in eval mode and inside `around`, for every input; ValueError if there is no input."""
    empty = True
    for inputs in data:
        call = caller(inputs, f"{what}: an input of calibration")
        with evaluating(model), around or nullcontext():
            output = call(model)
        empty = False
        yield output
    if empty:
        raise ValueError(
            f"{what}: calibration gave no inputs; it is empty, or a generator that was read before: "
            "give a list, or keep what lamina.quant.calibrate returns"
        )


def check_calibration(what: str, calibration: Any) -> None:
    """Raises TypeError unless it can be an iterable of example inputs."""
    if isinstance(calibration, Calibration):
        return
    kind = type(calibration).__name__
    if isinstance(calibration, Mapping | Tensor | str):
        raise TypeError(f"{what} is a {kind}, but must be an iterable of example inputs; wrap a single one as [(x,)]")
    if not isinstance(calibration, Iterable) and not hasattr(calibration, "__getitem__"):
        raise TypeError(f"{what} is a {kind}, but must be an iterable of example inputs, such as [(x,)]")
