"""From how many zeros on a sparse kernel beats the dense layer: read off what a run measured at several densities."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from lamina.bench.results import Measurement

BASELINE = "eager"


@dataclass(frozen=True)
class BreakEven:
    """work: the workloads' common name, which ends in the pattern; density: the share of values that are not zero at
    which `lamina` takes as long as the dense layer in eager PyTorch, at most 1; points: percent of zeros -> speed-up.
    """

    work: str
    threads: int
    density: float
    points: dict[int, float]


def break_evens(measurements: Sequence[Measurement]) -> list[BreakEven]:
    """One for each work and thread count that was timed at two densities or more, against eager.

    Between the last density that beats the median time of the dense layer and the first that does not, the time is
    taken to rise on a straight line. Where all of them win or all lose, it is the line through all: a sparse product
    takes a time for its inputs and outputs and one that goes with the values. A workload takes part if its `dims` have
    "zeros", in percent, and its id says so in a word of its own.

    >>> break_evens(results.measurements)[0].density
    """
    series: dict[tuple[str, int], list[Measurement]] = {}
    for item in measurements:
        known = item.candidate is not None and BASELINE in item.times
        if "zeros" in item.dims and item.cache == "warm" and known:
            name = re.sub(rf"-{item.dims['zeros']}%?(?=-|$)", "", item.workload)
            series.setdefault((name, item.threads), []).append(item)
    found = []
    for (name, threads), items in series.items():
        items = sorted(items, key=lambda item: item.dims["zeros"])
        densities, seconds = [1 - i.dims["zeros"] / 100 for i in items], [i.candidate.q50 for i in items]
        if len(set(densities)) < 2:
            continue
        density = _meets(densities, seconds, median(item.times[BASELINE].q50 for item in items))
        points = {item.dims["zeros"]: item.speedup(BASELINE) for item in items}
        found.append(BreakEven(name, threads, min(max(density, 0.0), 1.0), points))
    return found


def _meets(densities: Sequence[float], seconds: Sequence[float], dense: float) -> float:
    """Where the times, of falling densities, reach that of the dense layer; beyond [0, 1] if they never do."""
    points = list(zip(densities, seconds, strict=True))
    for (high, slow), (low, fast) in pairwise(points):
        if fast < dense <= slow:
            return low + (high - low) * (dense - fast) / (slow - fast)
    middle = fmean(densities)
    slope = sum((d - middle) * s for d, s in points) / sum((d - middle) ** 2 for d in densities)
    return middle + (dense - fmean(seconds)) / slope if slope > 0 else 1.0
