"""Two result files side by side: which workloads became slower or faster by more than the noise of both.

Absolute times drift with the machine from day to day, so where both runs timed the same baseline the verdict is on
lamina's time in units of that baseline: a slower day is not taken for a slower kernel.
"""

import math
from dataclasses import dataclass

from lamina.bench.results import Measurement, Results

# What two runs of the same code still differ by when every median is exact: code and data land on other addresses.
DRIFT = 0.03


@dataclass(frozen=True)
class Change:
    """One measurement of two runs.

    `old`, `new`: lamina's medians, seconds a call. `ratio`: old / new, above 1 is faster. `drift`: the same ratio of
    the `baseline`. `adjusted`: ratio / drift, what the verdict is on. `noise`: how far from 1 that may be by chance.
    `verdict`: "slower", "faster", "same", "broke" (the gate is red now), "fixed", "gone", "added", or "not judged" on
    several threads that did not scale in one of the runs.
    """

    workload: str
    threads: int
    cache: str
    verdict: str
    old: float | None = None
    new: float | None = None
    ratio: float | None = None
    baseline: str | None = None
    drift: float | None = None
    adjusted: float | None = None
    noise: float | None = None

    def fails(self, floor: float) -> bool:
        """Whether this is a regression: a wrong answer, or a speed below `floor` and out of the noise."""
        return self.verdict == "broke" or (self.verdict == "slower" and self.adjusted < floor)


def compare(old: Results, new: Results) -> list[Change]:
    """Match two runs by workload, thread count and cache state; broken and slower ones come first."""
    before = {item.key: item for item in old.measurements}
    after = {item.key: item for item in new.measurements}
    changes = [_change(key, before.get(key), after.get(key)) for key in before | after]
    order = ("broke", "slower", "fixed", "faster", "same", "not judged", "added", "gone")
    return sorted(changes, key=lambda change: (order.index(change.verdict), change.adjusted or 0.0))


def _change(key: tuple[str, int, str], old: Measurement | None, new: Measurement | None) -> Change:
    if old is None or new is None:
        return Change(*key, verdict="added" if old is None else "gone")
    if old.candidate is None or new.candidate is None:
        verdict = "same" if old.gate.ok == new.gate.ok else ("broke" if old.gate.ok else "fixed")
        return Change(*key, verdict=verdict)
    ratio = old.candidate.q50 / new.candidate.q50
    baseline = next((name for name in old.rivals if name in new.rivals), None)
    pairs = [(old.candidate, new.candidate)]
    drift = 1.0
    if baseline is not None:
        pairs.append((old.times[baseline], new.times[baseline]))
        drift = old.times[baseline].q50 / new.times[baseline].q50
    # The medians are independent, so their relative errors add as squares.
    noise = DRIFT + math.sqrt(sum(a.noise**2 + b.noise**2 for a, b in pairs))
    adjusted = ratio / drift
    verdict = "slower" if adjusted < 1 - noise else "faster" if adjusted > 1 + noise else "same"
    if not (old.scales and new.scales):
        verdict = "not judged"
    return Change(
        *key,
        verdict=verdict,
        old=old.candidate.q50,
        new=new.candidate.q50,
        ratio=ratio,
        baseline=baseline,
        drift=drift if baseline else None,
        adjusted=adjusted,
        noise=noise,
    )
