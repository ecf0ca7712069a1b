"""accelerate: try, measure, keep what wins, verify, report.

The promise is "never slower, and we say why": every replacement is timed against the layer it replaces, on the inputs
that layer sees in the example run, and the finished model is timed and checked against the original.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lamina.configs import ConfigLike
from lamina.running import ExampleInputs, caller, copied, floats, outputs, relative_error
from lamina.swap import Candidate, FilterFn, LayerDecision, SwapReport, candidates, ordered

Progress = Callable[[str, int, int], None]

# A layer is timed for this long in all, but for at least this many rounds: enough for a median that repeats to a few
# percent, and a BERT-base of 72 layers stays under ten seconds.
_LAYER_SECONDS = 0.06
_MODEL_SECONDS = 1.0
_MIN_ROUNDS = 5

_INPUTS = "accelerate: example_inputs"


@dataclass(frozen=True)
class AccelerateReport(SwapReport):
    """The layers' decisions, and the whole model before and after on the example inputs.

    speedup: original median time / accelerated median time; error: relative error of the model's floating-point outputs
    (|after - before| / |before|, Euclidean); seconds_before, seconds_after: medians; bytes_before, bytes_after: of
    parameters and buffers; threads: torch's setting during the measurement.
    """

    speedup: float = 1.0
    error: float = 0.0
    seconds_before: float = 0.0
    seconds_after: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    threads: int = 1

    def summary(self) -> str:
        return (
            f"{super().summary()}; the model is {self.speedup:.2f}x as fast "
            f"({self.seconds_before * 1e3:.2f} -> {self.seconds_after * 1e3:.2f} ms, {self.threads} threads), "
            f"output error {self.error:.1e}, {self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB"
        )


@dataclass(frozen=True)
class Accelerated:
    """`model`: a copy in eval mode with the winning layers; `report`: what was done, measured and left, and why."""

    model: nn.Module
    report: AccelerateReport


def accelerate(
    model: nn.Module,
    example_inputs: ExampleInputs,
    config: ConfigLike | str = "auto",
    min_speedup: float = 1.0,
    max_error: float = 0.02,
    *,
    max_model_error: float | None = None,
    filter_fn: FilterFn | None = None,
    progress: Progress | None = None,
) -> Accelerated:
    """A faster copy of `model` for inference; the original is not touched.

    Every layer that `config` concerns is timed against its replacement on the inputs it sees in a run on
    `example_inputs`. A replacement stays if it is at least `min_speedup` times as fast and its output is within
    `max_error`. Then the whole model is checked: while its output differs by more than `max_model_error`, the
    replacements with the largest error go back; if it is not at least `min_speedup` times as fast, all do.

    Args:
        model: runs on the CPU in float32 or bfloat16. Evaluated in eval mode.
        example_inputs: tuple of positional or dict of keyword arguments, of realistic sizes: speed is judged on them.
        config: "auto", or as in `swap_`.
        min_speedup: ratio of median times.
        max_error: relative Euclidean error, |new - old| / |old|, of a layer's output.
        max_model_error: the same for the model's outputs; by default 5 * max_error, since the errors of layers add up
            like a random walk and 25 layers at the bound give 5 times it.
        filter_fn: `filter_fn(module, fqn) -> bool`, False leaves the layer alone.
        progress: called as progress(description, done, total).

    Raises TypeError for example inputs that are neither tuple nor dict, ValueError if the model gives no floating-point
    output for them; errors of the model itself pass through.

    >>> fast = lamina.accelerate(model, (x,))
    >>> fast.model(x); print(fast.report)
    """
    call = caller(example_inputs, _INPUTS)
    if max_model_error is None:
        max_model_error = 5 * max_error
    work = copy.deepcopy(model).eval()
    # The original itself where it is in eval mode already, so that a large model is not held three times.
    original = copy.deepcopy(work) if any(module.training for module in model.modules()) else model
    report_progress = progress or (lambda description, done, total: None)

    # no_grad, not inference_mode: what is made here stays, and inference tensors can never be loaded into or trained
    # through again.
    with torch.inference_mode(False), torch.no_grad():
        report_progress("running the original", 0, 1)
        expected = outputs(caller(example_inputs, _INPUTS), original)
        if not expected:
            raise ValueError("accelerate: the model gives no floating-point output for the example inputs")
        found = list(candidates(work, config, filter_fn))
        tried = ordered([c for c in found if isinstance(c, Candidate)])
        inputs = _captured_inputs(work, caller(example_inputs, _INPUTS), tried)
        decided = {c.fqn: c for c in found if isinstance(c, LayerDecision)}
        kept: list[Candidate] = []
        for done, candidate in enumerate(tried):
            report_progress(f"measuring {candidate.fqn or 'the model'}", done, len(tried))
            decision = _judge(candidate, inputs.get(candidate.module), min_speedup, max_error)
            decided[candidate.fqn] = decision
            if decision.now is not None:
                candidate.apply()
                kept.append(candidate)
            else:
                candidate.revert()

        report_progress("checking the whole model", len(tried), len(tried))

        def error_now() -> float:
            return relative_error(outputs(caller(example_inputs, _INPUTS), work), expected)

        error = _reduce_error(kept, decided, error_now, max_model_error)
        before, after = _interleaved(lambda: call(original), lambda: call(work), _MODEL_SECONDS)
        if kept and before / after < min_speedup:
            # One noisy moment of a busy machine must not take everything back: only a longer look may.
            before, after = _interleaved(lambda: call(original), lambda: call(work), 3 * _MODEL_SECONDS)
        if kept and before / after < min_speedup:
            for candidate in kept:
                candidate.revert()
                decided[candidate.fqn] = replace(
                    decided[candidate.fqn],
                    now=None,
                    reason=f"faster by itself, but the whole model came out at {before / after:.2f}x",
                )
            error, after = 0.0, before

    # In the order of the model; one layer may be concerned by several configs, but has one decision.
    names = list(dict.fromkeys(c.fqn for c in found))
    return Accelerated(
        work,
        AccelerateReport(
            decisions=tuple(decided[name] for name in names),
            speedup=before / after,
            error=error,
            seconds_before=before,
            seconds_after=after,
            bytes_before=model_bytes(original),
            bytes_after=model_bytes(work),
            threads=torch.get_num_threads(),
        ),
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared storage counted once."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _captured_inputs(
    model: nn.Module, call: Callable[[nn.Module], Any], tried: list[Candidate]
) -> dict[nn.Module, tuple[tuple, dict]]:
    """The arguments of each candidate module's first call. Copied, since a later layer may overwrite them in place."""
    inputs: dict[nn.Module, tuple[tuple, dict]] = {}

    def capture(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module not in inputs:
            inputs[module] = copied((args, kwargs))

    hooks = [c.module.register_forward_pre_hook(capture, with_kwargs=True) for c in tried]
    try:
        call(model)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _judge(
    candidate: Candidate, inputs: tuple[tuple, dict] | None, min_speedup: float, max_error: float
) -> LayerDecision:
    """Times and checks one candidate on its inputs."""
    left = LayerDecision(candidate.fqn, candidate.was, None, "not called by the example inputs")
    if inputs is None:
        return left
    args, kwargs = inputs
    try:
        expected = floats(candidate.before(*args, **kwargs))
        error = relative_error(floats(candidate.after(*args, **kwargs)), expected)
    except (RuntimeError, ValueError, TypeError) as failure:
        return replace(left, reason=f"the replacement does not take these inputs: {failure}")
    if error > max_error:
        return replace(left, reason=f"error {error:.1e} is above max_error {max_error:g}", error=error)
    before, after = _interleaved(
        lambda: candidate.before(*args, **kwargs), lambda: candidate.after(*args, **kwargs), _LAYER_SECONDS
    )
    speedup = before / after
    if speedup < min_speedup:
        reason = f"{speedup:.2f}x on its inputs is below min_speedup {min_speedup:g}"
        return replace(left, reason=reason, speedup=speedup, error=error)
    return replace(
        left, now=candidate.now, reason=candidate.reason("faster and accurate enough"), speedup=speedup, error=error
    )


def _reduce_error(
    kept: list[Candidate], decided: dict[str, LayerDecision], error_of_model: Callable[[], float], most: float
) -> float:
    """Takes back the least accurate quarter of the replacements, again and again, while the model errs too much."""
    error = error_of_model()
    while kept and error > most:
        kept.sort(key=lambda c: decided[c.fqn].error or 0.0)
        keep = len(kept) * 3 // 4
        for candidate in kept[keep:]:
            candidate.revert()
            decided[candidate.fqn] = replace(
                decided[candidate.fqn],
                now=None,
                reason=f"taken back: the model's error was {error:.1e}, above max_model_error {most:g}",
            )
        del kept[keep:]
        error = error_of_model()
    return error


def _interleaved(before: Callable[[], Any], after: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Median seconds of both, called in turn: what disturbs the machine disturbs both."""
    times: tuple[list[float], list[float]] = ([], [])
    before(), after()
    end = time.perf_counter() + seconds
    while len(times[0]) < _MIN_ROUNDS or time.perf_counter() < end:
        for run, record in ((before, times[0]), (after, times[1])):
            start = time.perf_counter()
            run()
            record.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])
