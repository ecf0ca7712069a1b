"""Runs workloads: the gate first, then the clock.

A candidate whose answer is wrong gets no time at all. A baseline or peer that fails does not stop the others; its
message takes the place of its number.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lamina import _C
from lamina.bench import gpu
from lamina.bench.peers import Peer, Unavailable, convert
from lamina.bench.results import LAMINA, SCALING_FLOOR, Measurement
from lamina.bench.timing import Timing, cache_flusher, measure, threads
from lamina.bench.workloads import Gate, Workload

# A run this noisy met something else that wanted the cores; it is repeated once, after which it is what it is. Not
# where it took far more than its budget already: then the cores are wanted all the time, and repeating costs minutes.
RETRY_NOISE = 0.1
RETRY_BUDGETS = 2.0
# Where a core was taken away, waiting helps: it comes back after seconds. At most so often for one measurement, so long
# each time, and so long in all for one run; then the measurement stands, marked.
RETRIES = 2
WAIT_SECONDS = 2.0
PATIENCE = 40.0
WATCH_EVERY = 0.02
WATCH_SECONDS = 4e-4


class Patience:
    """The seconds that a run may spend on waiting for cores and on measuring again."""

    def __init__(self, seconds: float = PATIENCE):
        self.left = seconds

    def wait(self, threads: int) -> bool:
        """Wait until `threads` threads have a core each; False when that took too long."""
        start = time.perf_counter()
        limit = min(WAIT_SECONDS, self.left)
        watch = ScalingWatch(threads)
        while not (free := watch.look() >= SCALING_FLOOR) and time.perf_counter() - start < limit:
            time.sleep(0.05)
        self.left -= time.perf_counter() - start
        return free


class ScalingWatch:
    """Sees, in turns with what is being measured, whether `threads` threads are faster than one as they should be.

    Called between the contenders' turns; `value` is the median of a loop's rate on all threads over that on one.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.rates: list[tuple[float, float]] = []
        self.last = 0.0

    def __call__(self) -> None:
        if self.threads > 1 and time.perf_counter() - self.last > WATCH_EVERY:
            self.look()
            self.last = time.perf_counter()

    def look(self) -> float:
        """The scaling at this moment, 1.0 being ideal."""
        one, all_of_them = (_C.probe_peak("float32", count, WATCH_SECONDS) for count in (1, self.threads))
        self.rates.append((one, all_of_them))
        return all_of_them / one / self.threads

    @property
    def value(self) -> float:
        if not self.rates:
            return 1.0
        one, all_of_them = (statistics.median(rates) for rates in zip(*self.rates, strict=True))
        return all_of_them / one / self.threads


def run_all(
    workloads: Sequence[Workload],
    thread_counts: Sequence[int],
    *,
    peers: Sequence[Peer] = (),
    budget: float = 1.0,
    cold_cache_bytes: int | None = None,
    patience: Patience | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    end: float | None = None,
    slow: bool = True,
    keep: Callable[[Sequence[Measurement]], None] = lambda measurements: None,
) -> tuple[list[Measurement], dict[str, str]]:
    """Run many workloads; also with flushed caches when `cold_cache_bytes` says how large those are.

    None is begun after `end`, of time.perf_counter. slow: whether baselines that take long to prepare take part. keep:
    given all measurements so far after each workload, for whoever may be stopped before the last.

    Returns the measurements, and for each workload that can't run here the reason.
    """
    flushers = [None] if cold_cache_bytes is None else [None, cache_flusher(cold_cache_bytes)]
    patience = patience or Patience()
    measurements: list[Measurement] = []
    skipped: dict[str, str] = {}
    for done, workload in enumerate(workloads):

        def note(what: str, name: str = workload.id, done: int = done) -> None:
            if progress:
                progress(f"{name}: {what}", done, len(workloads))

        note("inputs")
        late = end is not None and time.perf_counter() > end
        reason = "left out: the time is over" if late else workload.missing()
        if reason is not None:
            skipped[workload.id] = reason
            continue
        try:
            inputs = workload.make_inputs()
        except Exception as error:  # accelerate() runs in here for models; see _run_once
            measurements += [_red(workload, count, "warm", one_line(error)) for count in thread_counts]
            continue
        for flush in flushers:
            measurements += run(
                workload,
                inputs,
                thread_counts,
                peers=peers,
                budget=budget,
                flush=flush,
                patience=patience,
                note=note,
                slow=slow,
            )
        keep(measurements)
    return measurements, skipped


def run(
    workload: Workload,
    inputs: Any,
    thread_counts: Sequence[int],
    *,
    peers: Sequence[Peer] = (),
    budget: float = 1.0,
    flush: Callable[[], None] | None = None,
    patience: Patience | None = None,
    note: Callable[[str], None] = lambda what: None,
    slow: bool = True,
) -> Iterator[Measurement]:
    """Check one workload's answer and time it against its baselines and peers, at each thread count.

    Args:
        workload: what to run.
        inputs: what its `make_inputs` gave.
        thread_counts: one measurement is yielded for each.
        peers: more contenders, except those that are among the baselines already or have no weights to quantize.
        budget: seconds of timing for each measurement.
        flush: empties the caches before every timed call, for the cold variant.
        patience: what waiting for busy cores may cost; the same object for every call of one run.
        note: told what is being done, for a progress line; preparing a peer can take half a minute.
        slow: whether baselines that the workload calls slow take part.
    """
    patience = patience or Patience()
    for count in [1] if workload.device == "cuda" else thread_counts:
        with threads(count) if workload.device == "cpu" else contextlib.nullcontext():
            yield _run_once(workload, inputs, count, peers, budget, flush, patience, note, slow)


def _run_once(
    workload: Workload,
    inputs: Any,
    count: int,
    peers: Sequence[Peer],
    budget: float,
    flush: Callable[[], None] | None,
    patience: Patience,
    note: Callable[[str], None],
    slow: bool,
) -> Measurement:
    cache = "warm" if flush is None else "cold"
    try:
        candidate = workload.run(inputs)
        with torch.inference_mode():
            output = candidate()
        isa = _kernels(workload, inputs)
        gate = workload.check(inputs, output)
        memory = workload.memory(inputs) if workload.memory and gate.ok else {}
    except Exception as error:  # a broken kernel must show as a red line, not end the run of all the others
        return _red(workload, count, cache, one_line(error))
    if not gate.ok:
        return _red(workload, count, cache, gate)
    contenders = {LAMINA: candidate}
    failures: dict[str, str] = {}
    others = {f"{LAMINA} {name}": prepare for name, prepare in workload.variants.items()}
    others |= {name: prepare for name, prepare in workload.baselines.items() if slow or name not in workload.slow}
    for name, prepare in others.items():
        note(f"preparing {name}")
        _prepare(name, lambda prepare=prepare: prepare(inputs), contenders, failures, workload.device)
    module, example_inputs = workload.module(inputs) if workload.module and peers else (None, ())
    for peer in peers:
        if module is None or peer.name in workload.baselines or (peer.quantizes and not list(module.parameters())):
            continue
        note(f"preparing {peer.name}")
        build = lambda peer=peer: convert(peer, module, example_inputs)  # noqa: E731
        _prepare(peer.name, build, contenders, failures, workload.device)
    note(f"timing on {count} thread{'' if count == 1 else 's'}" if workload.device == "cpu" else "timing")
    with torch.inference_mode():
        if workload.device == "cuda":
            times, scaling = measure(contenders, budget=budget, stopwatch=gpu.stopwatch()), 1.0
        else:
            times, scaling = _timed(contenders, count, budget, flush, patience)
    return Measurement(
        **_what(workload, count, cache),
        isa=isa,
        precision=workload.precision(inputs),
        flops=workload.flops(inputs),
        bytes=workload.bytes(inputs),
        gate=gate,
        times=times,
        failures=failures,
        resident=workload.resident(inputs) if workload.resident else 0,
        scaling=scaling,
        memory=memory,
    )


def _kernels(workload: Workload, inputs: Any) -> str:
    """What lamina's kernels, which have just run, were compiled for."""
    if not workload.kernels(inputs):
        return ""
    return gpu.architecture() if workload.device == "cuda" else _C.last_isa()


def _timed(
    contenders: Mapping[str, Callable], count: int, budget: float, flush: Callable[[], None] | None, patience: Patience
) -> tuple[dict[str, Timing], float]:
    """The times, and how well `count` threads scaled meanwhile; taken again where something else had the cores."""

    def once() -> tuple[dict[str, Timing], float, float]:
        watch = ScalingWatch(count)
        start = time.perf_counter()
        times = measure(contenders, budget=budget, flush=flush, between=watch)
        return times, watch.value, time.perf_counter() - start

    best, scaling, seconds = once()
    if _noise(best) > RETRY_NOISE and seconds < RETRY_BUDGETS * budget:
        again, its_scaling, _ = once()
        if (its_scaling >= SCALING_FLOOR, -_noise(again)) > (scaling >= SCALING_FLOOR, -_noise(best)):
            best, scaling = again, its_scaling
    for _ in range(RETRIES):
        if scaling >= SCALING_FLOOR or seconds > patience.left or not patience.wait(count):
            break
        again, its_scaling, seconds = once()
        patience.left -= seconds
        if its_scaling > scaling:
            best, scaling = again, its_scaling
    return best, scaling


def _what(workload: Workload, count: int, cache: str) -> dict[str, object]:
    """The fields that say what was measured, with or without success."""
    return {
        "workload": workload.id,
        "op": workload.op,
        "shape": workload.shape,
        "dims": dict(workload.dims),
        "threads": count,
        "cache": cache,
        "device": workload.device,
    }


def _noise(times: Mapping[str, Timing]) -> float:
    return max(timing.noise for timing in times.values())


def _red(workload: Workload, count: int, cache: str, trouble: Gate | str) -> Measurement:
    """A measurement without any number: the answer was wrong, or there was none."""
    gate = trouble if isinstance(trouble, Gate) else Gate(False, None, None, trouble)
    return Measurement(
        **_what(workload, count, cache),
        isa="",
        precision="",
        flops=0,
        bytes=0,
        gate=gate,
        times={},
    )


def _prepare(name: str, build: Callable, contenders: dict, failures: dict, device: str) -> None:
    try:
        call = build()
        with torch.inference_mode():
            call()
            if device == "cuda":  # or what is wrong with its kernels would be another one's error
                torch.cuda.synchronize()
    except Unavailable as error:
        failures[name] = str(error)
    except Exception as error:  # reported in the table under the contender's name
        failures[name] = one_line(error)
    else:
        contenders[name] = call


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception as one line of text. Example: `one_line(ValueError("no")) == "ValueError: no"`."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
