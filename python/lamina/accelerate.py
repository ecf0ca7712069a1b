"""accelerate: try, measure, keep what wins, verify, report.

The promise is "never slower, and we say why": every replacement is timed against the layer it replaces, on the inputs
that layer sees in the example run; the forms of the whole model (as it was, with swapped layers, compiled) are timed
against each other and checked against the original.
"""

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from itertools import cycle
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lamina.compile import NOT_FOR_GPUS, CaptureError, compile_
from lamina.compile.bound import Bound, settings
from lamina.configs import AUTO_ON_GPU, ConfigLike
from lamina.running import ExampleInputs, caller, copied, floats, outputs, relative_error
from lamina.stopwatch import Stopwatch, device_of, in_turns, on_cpu, stopwatch_of
from lamina.swap import Candidate, FilterFn, LayerDecision, SwapReport, candidates, is_compile_wrapper, ordered

Progress = Callable[[str, int, int], None]

# Layers of one kind are timed together, one after another, for this long for each, but for at least this many rounds:
# enough for ratios that repeat to a few percent, and a BERT-base of 72 layers stays under ten seconds.
_LAYER_SECONDS = 0.06
_MODEL_SECONDS = 1.0
_MIN_ROUNDS = 5

# A compiled graph costs its guards, memory and seconds to make: it must be faster than the layers by this much.
_COMPILED_GAIN = 1.02
# The graph of the float layers is not tried where swapping them brought more than this, unless the model is small: what
# takes most of its time is not the arithmetic, and may be less in float, where nothing has to be quantized.
_FLOAT_MAY_WIN = 1.5
_SMALL_SECONDS = 2e-3

_INPUTS = "accelerate: example_inputs"


@dataclass(frozen=True)
class Form:
    """One way to run the whole model, measured on the example inputs.

    name: "swapped layers", "compiled", "swapped layers, compiled" or "all int8 layers, compiled", with those too that
    are slower by themselves; speedup: original time / its time, None if it was
    not timed; error: as in the report; seconds: what it took to make it; reason: what was fused, why it was not used.
    """

    name: str
    speedup: float | None
    error: float | None
    seconds: float
    reason: str


@dataclass(frozen=True)
class AccelerateReport(SwapReport):
    """The layers' decisions, and the whole model before and after on the example inputs.

    speedup: original time / accelerated time; error: relative error of the model's floating-point outputs
    (|after - before| / |before|, Euclidean); seconds_before, seconds_after: lower quartiles of a call; bytes_before,
    bytes_after: of parameters and buffers; threads: torch's setting during the measurement; form: what `model` is now,
    "original" if nothing won; forms: everything that was tried; seconds: what accelerate took in all; device: the name
    of the GPU that the model ran on, or "cpu".
    """

    speedup: float = 1.0
    error: float = 0.0
    seconds_before: float = 0.0
    seconds_after: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    threads: int = 1
    form: str = "original"
    forms: tuple[Form, ...] = ()
    seconds: float = 0.0
    device: str = "cpu"

    def summary(self) -> str:
        where = f"{self.threads} threads" if self.device == "cpu" else self.device
        return (
            f"{super().summary()}; the model ({self.form}) is {self.speedup:.2f}x as fast "
            f"({self.seconds_before * 1e3:.2f} -> {self.seconds_after * 1e3:.2f} ms, {where}), "
            f"output error {self.error:.1e}, {self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB"
        )

    def __str__(self) -> str:
        if not self.forms:
            return super().__str__()
        table = Table("form of the model", "speedup", "error", "made in", "why")
        for form in self.forms:
            speedup = "" if form.speedup is None else f"{form.speedup:.2f}x"
            error = "" if form.error is None else f"{form.error:.1e}"
            used = "* " if form.name == self.form else "  "
            table.add_row(used + form.name, speedup, error, f"{form.seconds:.1f} s", form.reason)
        console = Console(file=StringIO(), width=140)
        console.print(table)
        return f"{super().__str__()}{console.file.getvalue()}"


@dataclass(frozen=True)
class Accelerated:
    """`model`: a copy in eval mode in its fastest form; `report`: what was done, measured and left, and why."""

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
    compile: Literal["auto", False] = "auto",
    filter_fn: FilterFn | None = None,
    progress: Progress | None = None,
) -> Accelerated:
    """A faster copy of `model` for inference; the original is not touched.

    Layers first: every layer that `config` concerns is timed against its replacement on the inputs it sees in a run on
    `example_inputs`. A replacement stays if it is at least `min_speedup` times as fast and its output is within
    `max_error`; while the model's output differs by more than `max_model_error`, the replacements with the largest
    error go back. Layers of one kind are timed in turn, so that their weights come from where they lie in a real run.

    Then the whole model: the copy with its new layers is timed against the original and, with `compile="auto"`, against
    its compiled graph (`lamina.compile`), which fuses what lies between the layers. The fastest form within
    `max_model_error` stays. If none is at least `min_speedup` times as fast as the original, the copy is as it was.

    The result is an ordinary module with the same names, attributes and state_dict layout; it can be saved
    (`lamina.save`), loaded into, copied and moved.

    A model on a GPU is timed there, by CUDA events. Linear layers may become int8, with or without their inputs,
    attention is exchanged and pruned layers become sparse; recurrent layers and float convolutions stay cuDNN's.
    Compiled graphs and plans are for the CPU and are not tried: `torch.compile(fast.model)` or a CUDA graph takes the
    result.

    On the CPU the compiled graph serves calls without gradients whose inputs have the sizes of `example_inputs`, on any
    number of threads; every other call runs the new layers one by one, so that no call waits for a compiler. The graph
    follows changes of layers, parameters and attributes; global variables that the model reads count as they were. A
    copy, or a saved and loaded model, has the layers without the graph.

    Args:
        model: runs on the CPU or on one GPU in float32 or bfloat16; layers in other dtypes are left alone. Evaluated in
            eval mode.
        example_inputs: tuple of positional or dict of keyword arguments, of realistic sizes: speed is judged on them.
        config: "auto", or as in `swap_`.
        min_speedup: ratio of times (lower quartiles of calls in turn: a busy machine only ever adds time).
        max_error: relative Euclidean error, |new - old| / |old|, of a layer's output.
        max_model_error: the same for the model's outputs; by default 5 * max_error, since the errors of layers add up
            like a random walk and 25 layers at the bound give 5 times it.
        compile: "auto" tries the compiled graph, which takes seconds (the report says how many); False does not.
        filter_fn: `filter_fn(module, fqn) -> bool`, False leaves the layer alone.
        progress: called as progress(description, done, total).

    Raises TypeError for example inputs that are neither tuple nor dict, ValueError if the model gives no floating-point
    output for them, is on meta or on several GPUs or is wrapped by torch.compile already, or `compile` is neither
    "auto" nor False; errors of the model itself pass through.

    >>> fast = lamina.accelerate(model, (x,))
    >>> fast.model(x); print(fast.report)
    """
    started = time.perf_counter()
    if compile not in ("auto", False):
        raise ValueError(f"accelerate: compile is {compile!r}; use 'auto' or False")
    if is_compile_wrapper(model):
        raise ValueError(
            "accelerate: the model is wrapped by torch.compile; give the one inside, model._orig_mod, which is "
            "compiled here where that is faster"
        )
    call = caller(example_inputs, _INPUTS)
    if max_model_error is None:
        max_model_error = 5 * max_error
    work = copy.deepcopy(model).eval()
    # The original itself where it is in eval mode already, so that a large model is not held three times.
    original = copy.deepcopy(work) if any(module.training for module in model.modules()) else model
    tell = progress or (lambda description, done, total: None)

    # no_grad, not inference_mode: what is made here stays, and inference tensors can never be loaded into or trained
    # through again.
    with torch.inference_mode(False), torch.no_grad():
        tell("running the original", 0, 1)
        expected = outputs(caller(example_inputs, _INPUTS), original)
        if not expected:
            raise ValueError("accelerate: the model gives no floating-point output for the example inputs")
        if any(output.is_meta for output in expected):
            raise ValueError(
                "accelerate: the model is on meta and has no values to compute with; load its weights first"
            )
        device = device_of([*original.parameters(), *original.buffers(), *expected])
        on_gpu, stopwatch = device.type == "cuda", stopwatch_of(device)
        if on_gpu and config == "auto":
            config = AUTO_ON_GPU
        found = list(candidates(work, config, filter_fn, alternatives=True))
        decided = {c.fqn: c for c in found if isinstance(c, LayerDecision)}
        tried = ordered([c for c in found if isinstance(c, Candidate)])
        inputs = _captured_inputs(work, caller(example_inputs, _INPUTS), tried)
        kept, waiting = _faster_layers(tried, inputs, decided, min_speedup, max_error, tell, stopwatch)

        tell("checking the whole model", len(tried), len(tried))
        race = _Race(original, work, call, example_inputs, expected, min_speedup, max_model_error, stopwatch)
        race.swapped_layers(kept, decided, time.perf_counter() - started)
        if compile == "auto" and on_gpu:
            race.forms.append(Form("compiled", None, None, 0.0, f"not tried on {device}: {NOT_FOR_GPUS}"))
        elif compile == "auto":
            tell("compiling", len(tried), len(tried))
            race.compiled(kept, waiting, decided)

    # In the order of the model; one layer may be concerned by several configs, but has one decision.
    names = list(dict.fromkeys(c.fqn for c in found))
    return Accelerated(
        work,
        AccelerateReport(
            decisions=tuple(decided[name] for name in names),
            speedup=race.before / race.after,
            error=race.error,
            seconds_before=race.before,
            seconds_after=race.after,
            bytes_before=model_bytes(original),
            bytes_after=model_bytes(work),
            threads=torch.get_num_threads(),
            form=race.form,
            forms=tuple(race.forms),
            seconds=time.perf_counter() - started,
            device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        ),
    )


class _Race:
    """The forms of the whole model against each other. Afterwards the working copy is in the fastest one.

    before, after: seconds of a call of the original and of the form that leads; error: of that form.
    """

    def __init__(
        self,
        original: nn.Module,
        work: nn.Module,
        call: Callable[[Callable[..., Any]], Any],
        example_inputs: ExampleInputs,
        expected: list[Tensor],
        min_speedup: float,
        max_model_error: float,
        stopwatch: Stopwatch,
    ) -> None:
        self.stopwatch = stopwatch
        self.original, self.work, self.call = original, work, call
        self.example_inputs, self.expected = example_inputs, expected
        self.min_speedup, self.max_model_error = min_speedup, max_model_error
        self.form, self.forms = "original", []
        self.before = self.after = 1.0
        self.error = 0.0

    def swapped_layers(self, kept: list[Candidate], decided: dict[str, LayerDecision], seconds: float) -> None:
        """Keeps what of the replacements is accurate, and all of that or nothing by speed."""
        error = _reduce_error(kept, decided, self._error_now, self.max_model_error)
        self.before, self.after = before, after = self._against_original()
        if not kept:
            self.after = before
            return
        if before / after < self.min_speedup:
            reason = f"faster by itself, but the whole model came out at {before / after:.2f}x"
            _take_back(kept, decided, reason)
            kept.clear()
            self.after = before
        else:
            self.form, self.error = "swapped layers", error
        why = "" if self.form != "original" else f"below min_speedup {self.min_speedup:g}"
        self.forms.append(Form("swapped layers", before / after, error, seconds, why))

    def compiled(self, kept: list[Candidate], waiting: list[Candidate], decided: dict[str, LayerDecision]) -> None:
        """Puts the compiled graph of the layers, new or float, in front of the leading form where it is faster.

        waiting: accurate replacements that are slower by themselves, but may be faster in a graph.
        """
        if kept:
            self._try_graph("swapped layers, compiled")
        if waiting:
            self._try_waiting(kept, waiting, decided)
        may_win = self.form == "swapped layers" and self.before / self.after < _FLOAT_MAY_WIN
        if kept and (may_win or self.before < _SMALL_SECONDS):
            for candidate in kept:
                candidate.revert()
            if self._try_graph("compiled"):
                _take_back(kept, decided, "faster by itself, but the compiled graph of the float model is faster still")
            else:
                for candidate in kept:
                    candidate.apply()
        elif not kept:
            self._try_graph("compiled")

    def _try_waiting(self, kept: list[Candidate], waiting: list[Candidate], decided: dict[str, LayerDecision]) -> None:
        leading = self.work._compiled_call_impl
        for candidate in waiting:
            candidate.apply()
        if self._try_graph("all int8 layers, compiled"):
            for candidate in waiting:
                why = "slower by itself, faster between layers that hand it codes and take its own"
                decided[candidate.fqn] = replace(
                    decided[candidate.fqn], now=candidate.now, reason=candidate.reason(why)
                )
            kept += waiting
            return
        for candidate in waiting:
            candidate.revert()
        self.work._compiled_call_impl = leading

    def _try_graph(self, name: str) -> bool:
        """Compiles the copy as it is now; whether that leads, and stays."""
        start = time.perf_counter()
        form = Form(name, None, None, 0.0, "")
        leading = self.work._compiled_call_impl
        try:
            report = compile_(self.work, copied(self.example_inputs), guards_state=False)
            self.work._compiled_call_impl = _ForSizes(self.work, self.example_inputs)
            form = replace(form, error=self._error_now(), seconds=time.perf_counter() - start)
        except CaptureError as failure:
            self.work._compiled_call_impl = leading
            seconds = time.perf_counter() - start
            self.forms.append(replace(form, seconds=seconds, reason=" ".join(str(failure).split())[:200]))
            return False
        why = None
        if not report.fused:
            why = "nothing in it to fuse"
        elif form.error > self.max_model_error:
            why = f"error {form.error:.1e} is above max_model_error {self.max_model_error:g}"
        else:
            # The same layers with and without the graph are compared directly, others by way of the original.
            gain = self._against_layers() if name.startswith(self.form) else None
            if gain is None or gain >= _COMPILED_GAIN:
                before, after = self._against_original()
                form = replace(form, speedup=before / after)
                gain = gain or before / after / (self.before / self.after)
            else:
                form = replace(form, speedup=gain * self.before / self.after)
            if gain < _COMPILED_GAIN:
                why = f"{gain:.2f}x the speed of {self.form}, below {_COMPILED_GAIN:g}"
            elif form.speedup < self.min_speedup:
                why = f"below min_speedup {self.min_speedup:g}"
        if why is not None:
            self.work._compiled_call_impl = leading
            self.forms.append(replace(form, reason=f"{why}; {report.summary()}"))
            return False
        self.forms.append(replace(form, reason=report.summary()))
        self.form, self.error, self.before, self.after = name, form.error, before, after
        return True

    def _error_now(self) -> float:
        return relative_error(outputs(caller(self.example_inputs, _INPUTS), self.work), self.expected)

    def _against_original(self) -> tuple[float, float]:
        run = (lambda: self.call(self.original)), (lambda: self.call(self.work))
        before, after = _interleaved(*run, _MODEL_SECONDS, self.stopwatch)
        if before / after < self.min_speedup:
            # One noisy moment of a busy machine must not take everything back: only a longer look may.
            before, after = _interleaved(*run, 3 * _MODEL_SECONDS, self.stopwatch)
        return before, after

    def _against_layers(self) -> float:
        """The speed of the compiled copy against the same copy without its graph."""
        apart, compiled = _interleaved(
            lambda: self.call(self.work._call_impl), lambda: self.call(self.work), _MODEL_SECONDS, self.stopwatch
        )
        return apart / compiled


class _ForSizes:
    """The compiled call of a module for calls like the example; all others run the module's layers.

    Dynamo would compile each new size when it comes, for seconds and in the middle of somebody's work.
    """

    def __init__(self, module: nn.Module, example_inputs: ExampleInputs) -> None:
        self._plain = module._call_impl
        self._compiled = Bound(module, module._compiled_call_impl)
        parameters = inspect.signature(module.forward).parameters.values()
        self._names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        self._positional = isinstance(example_inputs, tuple)
        example = self._named(example_inputs, {}) if self._positional else example_inputs
        self._keys = tuple(example)
        self._like = _describe_call(example)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # somebody else's graph gets the layers
            return self._plain(*args, **kwargs)
        if not kwargs:
            result = self._compiled.quick(args)
            if result is not None:
                return result
        if not torch.is_grad_enabled():
            given = self._named(args, kwargs)
            if _describe_call(given) == self._like and len(given) == len(args) + len(kwargs):
                # Inference mode, tensors made in it, and another way to write the call would each need their own graph.
                with torch.inference_mode(False), torch.no_grad():
                    values = {key: _ordinary(given.get(key)) for key in self._keys}
                    return self._compiled(*values.values()) if self._positional else self._compiled(**values)
        return self._plain(*args, **kwargs)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Any, Any]:
        """The arguments by name; positional ones that have none by position."""
        names = (*self._names, *range(len(self._names), len(args)))
        return {**dict(zip(names, args, strict=False)), **kwargs}


def _describe_call(arguments: Mapping[Any, Any]) -> tuple[Any, ...]:
    """What a graph is compiled for: the arguments, sizes of tensors, and torch's state as far as results hang on it."""
    return {key: _describe(value) for key, value in arguments.items() if value is not None}, settings()


def _ordinary(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    return tree_map(_ordinary, value) if isinstance(value, tuple | list | dict) else value


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.requires_grad, value.is_cpu
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return type(value), *(_describe(item) for item in value)
    if type(value) is dict:
        return {key: _describe(item) for key, item in value.items()}
    return object()  # equal to nothing: what a graph assumes of such an argument cannot be told


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
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # or torch's Transformer layers would not call what is in them
        call(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for hook in hooks:
            hook.remove()
    return inputs


def _faster_layers(
    tried: list[Candidate],
    inputs: dict[nn.Module, tuple[tuple, dict]],
    decided: dict[str, LayerDecision],
    min_speedup: float,
    max_error: float,
    tell: Progress,
    stopwatch: Stopwatch,
) -> tuple[list[Candidate], list[Candidate]]:
    """Puts in the candidates that are accurate and faster, of several for a layer the fastest, and returns them.

    And those that are accurate and slower, but could take and give codes in a graph.
    """
    kept: dict[str, Candidate] = {}
    slower: list[Candidate] = []
    kinds: dict[Any, list[Candidate]] = {}
    for candidate in tried:
        kinds.setdefault(_kind(candidate, inputs.get(candidate.module)), []).append(candidate)
    done = 0
    for group in kinds.values():
        accurate = []
        for candidate in group:
            tell(f"measuring {candidate.fqn or 'the model'}", done, len(tried))
            done += 1
            decision = _check(candidate, inputs.get(candidate.module), max_error)
            if decision.now is not None:
                accurate.append((candidate, decision))
            elif candidate.fqn in kept:
                kept[candidate.fqn].apply()
            else:
                candidate.revert()
                decided[candidate.fqn] = decision
        if not accurate:
            continue
        speedup = _speedup([candidate for candidate, _ in accurate], inputs, min_speedup, stopwatch)
        for candidate, decision in accurate:
            decision = replace(decision, speedup=speedup)
            best = kept.get(candidate.fqn)
            if best is not None and speedup <= decided[candidate.fqn].speedup:
                best.apply()
            elif speedup < min_speedup:
                reason = f"{speedup:.2f}x on its inputs is below min_speedup {min_speedup:g}"
                decided[candidate.fqn] = replace(decision, now=None, reason=reason)
                candidate.revert()
                if getattr(candidate.after, "input_scale", None) is not None:
                    slower.append(candidate)
            else:
                if best is not None:
                    best.revert()
                candidate.apply()
                kept[candidate.fqn] = candidate
                decided[candidate.fqn] = decision
    return list(kept.values()), [candidate for candidate in slower if candidate.fqn not in kept]


def _kind(candidate: Candidate, inputs: tuple[tuple, dict] | None) -> Any:
    """Candidates of one kind take the same time: the same replacement of the same layer on inputs of the same form."""
    leaves = [
        (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)
        for leaf in tree_leaves(inputs)
    ]
    return candidate.was, candidate.now, tuple(leaves)


def _check(candidate: Candidate, inputs: tuple[tuple, dict] | None, max_error: float) -> LayerDecision:
    """Whether a candidate computes what the layer does."""
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
    return replace(left, now=candidate.now, reason=candidate.reason("faster and accurate enough"), error=error)


def _speedup(
    group: list[Candidate], inputs: dict[nn.Module, tuple[tuple, dict]], min_speedup: float, stopwatch: Stopwatch
) -> float:
    """How much faster candidates of one kind are.

    Each round takes the next of them: by the time it is its turn again, its weights have left the caches as they do in
    a run of the whole model.
    """

    def run(side: str) -> Callable[[], Any]:
        turns = cycle([(getattr(c, side), *inputs[c.module]) for c in group])

        def call() -> Any:
            function, args, kwargs = next(turns)
            return function(*args, **kwargs)

        return call

    def ratio(seconds: float) -> float:
        before, after = _interleaved(run("before"), run("after"), seconds, stopwatch)
        return before / after

    seconds = _LAYER_SECONDS * len(group)
    speedup = ratio(seconds)
    # As with the whole model: a noisy moment must not decide against a replacement.
    return speedup if speedup >= min_speedup else max(speedup, ratio(3 * seconds))


def _reduce_error(
    kept: list[Candidate], decided: dict[str, LayerDecision], error_of_model: Callable[[], float], most: float
) -> float:
    """Takes back the least accurate quarter of the replacements, again and again, while the model errs too much."""
    error = _first_error(kept, decided, error_of_model)
    while kept and error > most:
        kept.sort(key=lambda c: decided[c.fqn].error or 0.0)
        keep = len(kept) * 3 // 4
        reason = f"taken back: the model's error was {error:.1e}, above max_model_error {most:g}"
        _take_back(kept[keep:], decided, reason)
        del kept[keep:]
        error = error_of_model()
    return error


def _first_error(
    kept: list[Candidate], decided: dict[str, LayerDecision], error_of_model: Callable[[], float]
) -> float:
    """The model's error with the replacements, less those of one kind that it cannot run with.

    A layer may be right by itself and its output of a form that the model around it refuses: `.view` of a tensor that
    is channels_last.
    """
    try:
        return error_of_model()
    except (RuntimeError, ValueError, TypeError) as failure:
        reason = f"taken back: the model does not run with it: {' '.join(str(failure).split())[:200]}"
    for kind in dict.fromkeys(type(candidate.after) for candidate in kept):
        taken = [candidate for candidate in kept if type(candidate.after) is kind]
        for candidate in taken:
            candidate.revert()
        try:
            error = error_of_model()
        except (RuntimeError, ValueError, TypeError):
            for candidate in taken:
                candidate.apply()
            continue
        break
    else:
        taken, error = list(kept), 0.0
    _take_back(taken, decided, reason)
    kept[:] = [candidate for candidate in kept if candidate not in taken]
    return error


def _take_back(taken: Sequence[Candidate], decided: dict[str, LayerDecision], reason: str) -> None:
    for candidate in taken:
        candidate.revert()
        decided[candidate.fqn] = replace(decided[candidate.fqn], now=None, reason=reason)


def _interleaved(
    before: Callable[[], Any], after: Callable[[], Any], seconds: float, stopwatch: Stopwatch = on_cpu
) -> tuple[float, float]:
    """Lower quartiles of the seconds of both, called in turn."""
    times = in_turns({"before": before, "after": after}, seconds, _MIN_ROUNDS, stopwatch)
    return _lower_quartile(times["before"]), _lower_quartile(times["after"])


def _lower_quartile(times: list[float]) -> float:
    return sorted(times)[(len(times) - 1) // 4]
