"""How a time is taken: fixed threads, contenders interleaved in one run, medians and quantiles.

A machine drifts (clock speed, neighbours), so one contender is never timed after another but in turns: every round
runs each contender once, and the order turns round every time. What is compared is the ratio of the medians of the
same rounds. A turn starts with calls that are not timed, because the contender before it has just filled the caches
with its own data; the cold variant does the opposite and empties the caches before every timed call.
"""

import contextlib
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lamina.stopwatch import Stopwatch, on_cpu

# Below this a sample is mostly the clock itself (reading it costs about 0.05 us), so shorter calls are timed in groups.
SHORTEST_SAMPLE = 20e-6
# Events of a GPU are good to about 1 us, and what lies between two kernels of one stream counts as time: more calls.
SHORTEST_GPU_SAMPLE = 500e-6
# A turn lasts about this long: far above a context switch, far below the seconds over which a machine drifts.
TURN = 2e-3
MAX_SAMPLES_A_TURN = 20
# The calls that warm the caches, so many or so long. One is not enough for data of half a third-level cache, which
# keeps what was read several times: int8 weights of 4096 x 4096 after 64 MiB of others come at 15 GB/s in the first
# call, 30 in the fifth and 48 in the tenth (Zen 4, 32 MiB).
WARM_CALLS = 20
WARM_SECONDS = 8e-3
# A call longer than this touches more memory than the caches keep, so the call that warms them is not worth its time.
WARM_CALL_LIMIT = 20e-3
# The median of 5 rounds lies within their range 94 times in 100: the fewest rounds that say anything about noise.
MIN_ROUNDS = 5
MAX_ROUNDS = 100
# Stop early once every median is known this well (relative half-width of its confidence interval).
SETTLED = 0.005
SETTLED_ROUNDS = 10


@dataclass(frozen=True)
class Timing:
    """What the samples of one contender say, in seconds a call.

    `q20`, `q50`, `q80` are quantiles over all samples; `noise` is the relative half-width of a 95% confidence interval
    of the median over the rounds (0.02: the median is good to about 2%); `count` is the number of samples.
    """

    q20: float
    q50: float
    q80: float
    noise: float
    count: int

    @classmethod
    def from_rounds(cls, rounds: Sequence[Sequence[float]]) -> "Timing":
        """Summarise samples grouped by round. Example: `Timing.from_rounds([[1.0, 2.0], [3.0]]).q50 == 2.0`."""
        samples = sorted(sample for turn in rounds for sample in turn)
        if not samples:
            raise ValueError("a timing needs at least one sample")
        return cls(
            quantile(samples, 0.2), quantile(samples, 0.5), quantile(samples, 0.8), _median_noise(rounds), len(samples)
        )


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Linear-interpolated quantile of a sorted sequence. Example: `quantile([1, 2, 3], 0.5) == 2`."""
    position = (len(ordered) - 1) * fraction
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _median_noise(rounds: Sequence[Sequence[float]]) -> float:
    # Samples of one turn resemble each other, rounds are independent: the interval is taken over the rounds' medians,
    # between the order statistics n/2 -+ 0.98 sqrt(n) (the binomial 95% interval of a median).
    medians = sorted(statistics.median(turn) for turn in rounds)
    n = len(medians)
    reach = 0.98 * math.sqrt(n)
    low = max(0, math.floor(n / 2 - reach))
    high = min(n - 1, math.ceil(n / 2 + reach) - 1)
    return (medians[high] - medians[low]) / 2 / statistics.median(medians)


def speedup(baseline: Timing, candidate: Timing) -> float:
    """How many times faster the candidate is: the ratio of the medians. Above 1 the candidate wins."""
    return baseline.q50 / candidate.q50


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body with `count` torch threads (lamina's kernels use the same pool) and put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cache_flusher(cache_bytes: int) -> Callable[[], None]:
    """A function that pushes everything else out of caches of `cache_bytes` bytes by rewriting twice as much memory."""
    buffer = torch.zeros(max(2 * cache_bytes, 1 << 20) // 8, dtype=torch.int64)
    return lambda: buffer.add_(1)


def measure(
    contenders: Mapping[str, Callable[[], object]],
    *,
    budget: float = 1.0,
    flush: Callable[[], None] | None = None,
    between: Callable[[], None] | None = None,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    stopwatch: Stopwatch | None = None,
) -> dict[str, Timing]:
    """Time several callables against each other.

    Args:
        contenders: name -> callable without arguments; the work must be done when it returns, or be in the queue of
            the GPU whose `stopwatch` it is.
        budget: seconds the timed rounds may take together; `min_rounds` are made whatever they cost.
        flush: called, untimed, before every timed call: the cold variant.
        between: called, untimed, before every turn: what watches the machine meanwhile.
        min_rounds, max_rounds: bounds on how often every contender gets its turn.
        clock: returns seconds; the tests put a false one here.
        stopwatch: what times the calls, if not that clock: `lamina.stopwatch.OnGPU` for work on a GPU.

    Example: `measure({"eager": eager, "lamina": ours}, budget=0.5)["lamina"].q50` is seconds a call.
    """
    shortest = SHORTEST_SAMPLE if stopwatch is None else SHORTEST_GPU_SAMPLE
    timed = stopwatch or functools.partial(on_cpu, clock=clock)
    cold = flush is not None
    plans = {name: _plan(call, cold=cold, timed=timed, shortest=shortest) for name, call in contenders.items()}
    rounds: dict[str, list[list[float]]] = {name: [] for name in contenders}
    order = list(contenders)
    with _no_garbage_collection():
        start = clock()
        for done in range(1, max_rounds + 1):
            round_start = clock()
            for name in order:
                if between is not None:
                    between()
                rounds[name].append(_turn(contenders[name], plans[name], flush, timed))
            order.reverse()
            now = clock()
            if done < min_rounds:
                continue
            if now - start + (now - round_start) > budget:
                break
            if done >= SETTLED_ROUNDS and all(_median_noise(turns) < SETTLED for turns in rounds.values()):
                break
    return {name: Timing.from_rounds(turns) for name, turns in rounds.items()}


@dataclass(frozen=True)
class _Plan:
    """One contender's turn: how many warming calls come first, how many samples, how many calls in each."""

    warm_calls: int
    samples: int
    calls: int


def _plan(call: Callable[[], object], *, cold: bool, timed: Stopwatch, shortest: float) -> _Plan:
    call()  # the first call ever may allocate, pack or compile
    once = max(timed(call, 1), 1e-9)
    if cold:
        return _Plan(warm_calls=0, samples=1, calls=1)
    calls = max(1, math.ceil(shortest / once))
    samples = max(1, min(MAX_SAMPLES_A_TURN, int(TURN / (once * calls))))
    warm_calls = max(1, min(WARM_CALLS, int(WARM_SECONDS / once))) if once < WARM_CALL_LIMIT else 0
    return _Plan(warm_calls, samples, calls)


def _turn(call: Callable[[], object], plan: _Plan, flush: Callable[[], None] | None, timed: Stopwatch) -> list[float]:
    for _ in range(plan.warm_calls):
        call()
    samples = []
    for _ in range(plan.samples):
        if flush is not None:
            flush()
        samples.append(timed(call, plan.calls))
    return samples


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
