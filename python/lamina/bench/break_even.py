"""From how many zeros on a sparse kernel beats the dense layer: read off what a run measured at several densities."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
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

    A sparse product takes a time for its inputs and outputs and one that goes with the values: a line through the
    measured points, which is met by the median time of the dense layer. A workload takes part if its `dims` have
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
        spread = sum((d - fmean(densities)) ** 2 for d in densities)
        if spread == 0:
            continue
        slope = sum((d - fmean(densities)) * s for d, s in zip(densities, seconds, strict=True)) / spread
        dense = median(item.times[BASELINE].q50 for item in items)
        density = fmean(densities) + (dense - fmean(seconds)) / slope if slope > 0 else 1.0
        points = {item.dims["zeros"]: item.speedup(BASELINE) for item in items}
        found.append(BreakEven(name, threads, min(max(density, 0.0), 1.0), points))
    return found
