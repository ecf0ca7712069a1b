"""Runs workloads: the gate first, then the clock.

A candidate whose answer is wrong gets no time at all. A baseline or peer that fails does not stop the others; its
message takes the place of its number.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lamina import _C
from lamina.bench.peers import Peer
from lamina.bench.results import LAMINA, Measurement
from lamina.bench.timing import Timing, cache_flusher, measure, threads
from lamina.bench.workloads import Gate, Workload

# A run this noisy met something else that wanted the cores; it is repeated once, after which it is what it is. Not
# where it took far more than its budget already: then the cores are wanted all the time, and repeating costs minutes.
RETRY_NOISE = 0.1
RETRY_BUDGETS = 2.0


def run_all(
    workloads: Sequence[Workload],
    thread_counts: Sequence[int],
    *,
    peers: Sequence[Peer] = (),
    budget: float = 1.0,
    cold_cache_bytes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[Measurement], dict[str, str]]:
    """Run many workloads; also with flushed caches when `cold_cache_bytes` says how large those are.

    Returns the measurements, and for each workload that can't run here the reason.
    """
    flushers = [None] if cold_cache_bytes is None else [None, cache_flusher(cold_cache_bytes)]
    measurements: list[Measurement] = []
    skipped: dict[str, str] = {}
    for done, workload in enumerate(workloads):
        if progress:
            progress(workload.id, done, len(workloads))
        reason = workload.missing()
        if reason is not None:
            skipped[workload.id] = reason
            continue
        try:
            inputs = workload.make_inputs()
        except Exception as error:  # accelerate() runs in here for models; see _run_once
            measurements += [_red(workload, count, "warm", one_line(error)) for count in thread_counts]
            continue
        for flush in flushers:
            measurements += run(workload, inputs, thread_counts, peers=peers, budget=budget, flush=flush)
    return measurements, skipped


def run(
    workload: Workload,
    inputs: Any,
    thread_counts: Sequence[int],
    *,
    peers: Sequence[Peer] = (),
    budget: float = 1.0,
    flush: Callable[[], None] | None = None,
) -> Iterator[Measurement]:
    """Check one workload's answer and time it against its baselines and peers, at each thread count.

    Args:
        workload: what to run.
        inputs: what its `make_inputs` gave.
        thread_counts: one measurement is yielded for each.
        peers: more contenders, except those that are among the baselines already or have no weights to quantize.
        budget: seconds of timing for each measurement.
        flush: empties the caches before every timed call, for the cold variant.
    """
    for count in thread_counts:
        with threads(count):
            yield _run_once(workload, inputs, count, peers, budget, flush)


def _run_once(
    workload: Workload,
    inputs: Any,
    count: int,
    peers: Sequence[Peer],
    budget: float,
    flush: Callable[[], None] | None,
) -> Measurement:
    cache = "warm" if flush is None else "cold"
    try:
        candidate = workload.run(inputs)
        with torch.inference_mode():
            output = candidate()
        isa = _C.last_isa() if workload.kernels(inputs) else ""
        gate = workload.check(inputs, output)
    except Exception as error:  # a broken kernel must show as a red line, not end the run of all the others
        return _red(workload, count, cache, one_line(error))
    if not gate.ok:
        return _red(workload, count, cache, gate)
    contenders = {LAMINA: candidate}
    failures: dict[str, str] = {}
    for name, prepare in workload.baselines.items():
        _prepare(name, lambda prepare=prepare: prepare(inputs), contenders, failures)
    module, example_inputs = workload.module(inputs) if workload.module and peers else (None, ())
    for peer in peers:
        if module is None or peer.name in workload.baselines or (peer.quantizes and not list(module.parameters())):
            continue
        _prepare(peer.name, lambda peer=peer: _convert(peer, module, example_inputs), contenders, failures)
    with torch.inference_mode():
        start = time.perf_counter()
        times = measure(contenders, budget=budget, flush=flush)
        if _noise(times) > RETRY_NOISE and time.perf_counter() - start < RETRY_BUDGETS * budget:
            times = min(times, measure(contenders, budget=budget, flush=flush), key=_noise)
    return Measurement(
        **_what(workload, count, cache),
        isa=isa,
        precision=workload.precision(inputs),
        flops=workload.flops(inputs),
        bytes=workload.bytes(inputs),
        gate=gate,
        times=times,
        failures=failures,
    )


def _what(workload: Workload, count: int, cache: str) -> dict[str, object]:
    """The fields that say what was measured, with or without success."""
    return {
        "workload": workload.id,
        "op": workload.op,
        "shape": workload.shape,
        "dims": dict(workload.dims),
        "threads": count,
        "cache": cache,
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


def _convert(peer: Peer, module: torch.nn.Module, example_inputs: tuple | dict) -> Callable[[], object]:
    reason = peer.available()
    if reason is not None:
        raise RuntimeError(reason)
    return peer.prepare(module, example_inputs)


def _prepare(name: str, build: Callable, contenders: dict, failures: dict) -> None:
    try:
        call = build()
        with torch.inference_mode():
            call()
    except Exception as error:  # reported in the table under the contender's name
        failures[name] = one_line(error)
    else:
        contenders[name] = call


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception as one line of text. Example: `one_line(ValueError("no")) == "ValueError: no"`."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
