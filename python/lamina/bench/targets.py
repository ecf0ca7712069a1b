"""The ratios we promise (`benchmarks/targets.toml`) and whether a run met them.

A target names workloads, a metric and the least it must reach at every one of them; it is as good as its worst
workload. Ratios only: an absolute time would promise a machine, not a kernel.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lamina.bench.machine import Machine
from lamina.bench.results import LAMINA, Measurement
from lamina.bench.workloads import matches

METRICS = ("peak", "speedup")
ALL_THREADS = "all"


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        id: a short name.
        workloads: pattern of workload ids, as `lamina bench --filter` takes it.
        metric: "peak" (share of the measured peak of the workload's precision) or "speedup" (over `baseline`).
        minimum: the least value that counts as met.
        threads: thread counts it holds for; "all" is every thread the machine gives.
        why: where the number comes from.
        baseline: what "speedup" is measured against.
        at_least: smallest sizes of the workloads meant, e.g. `{"M": 128}`.
    """

    id: str
    workloads: str
    metric: str
    minimum: float
    threads: Sequence[int | str]
    why: str
    baseline: str | None = None
    at_least: Mapping[str, int] = field(default_factory=dict)

    def selects(self, workload_id: str, dims: Mapping[str, int]) -> bool:
        """Whether this target speaks about a workload."""
        big_enough = all(dims.get(name, 0) >= size for name, size in self.at_least.items())
        return big_enough and matches(workload_id, self.workloads)

    def value(self, measurement: Measurement, machine: Machine) -> float | None:
        """The metric of one measurement, None when it was not taken."""
        if self.metric == "peak":
            return measurement.peak_fraction(machine)
        return measurement.speedup(self.baseline)


@dataclass(frozen=True)
class Verdict:
    """How one target stands at one thread count.

    `status`: "met", "missed" or "not judged". `value` and `workload`: the worst one. `met`, `total`: how many of the
    target's measurements reach the minimum. `reason`: why it was missed or not judged, where a number does not say it.
    """

    target: str
    threads: int
    status: str
    minimum: float
    metric: str
    value: float | None
    workload: str | None
    met: int
    total: int
    why: str
    reason: str = ""
    baseline: str | None = None


def parse(path: str | Path) -> list[Target]:
    """Read a targets file. Raises ValueError, naming the entry, for one that does not make sense."""
    try:
        document = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"targets file {path} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"targets file {path} is not TOML: {error}") from error
    entries = document.get("target")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"targets file {path} has no [[target]] entry")
    targets = [_parse_entry(entry, number, path) for number, entry in enumerate(entries, start=1)]
    ids = [target.id for target in targets]
    repeated = {name for name in ids if ids.count(name) > 1}
    if repeated:
        raise ValueError(f"targets file {path} has two targets called {', '.join(sorted(repeated))}")
    return targets


def _parse_entry(entry: dict, number: int, path: str | Path) -> Target:
    where = f"target {entry.get('id', number)!r} of {path}"
    required = {"id", "workloads", "metric", "minimum", "threads", "why"}
    missing = required - entry.keys()
    unknown = entry.keys() - Target.__dataclass_fields__.keys()
    if missing or unknown:
        trouble = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        trouble += [f"has the unknown key {', '.join(sorted(unknown))}"] if unknown else []
        raise ValueError(f"{where} {' and '.join(trouble)}")
    if entry["metric"] not in METRICS:
        raise ValueError(f"{where} has metric {entry['metric']!r}; the metrics are {', '.join(METRICS)}")
    if (entry["metric"] == "speedup") != ("baseline" in entry):
        raise ValueError(f'{where}: metric "speedup" needs a baseline, and no other metric takes one')
    minimum = entry["minimum"]
    if isinstance(minimum, bool) or not isinstance(minimum, int | float) or not minimum > 0:
        raise ValueError(f"{where} has minimum {minimum!r}, which is not a positive number")
    threads = entry["threads"]
    if not isinstance(threads, list) or not threads or not all(_is_thread_count(count) for count in threads):
        raise ValueError(f'{where} has threads {threads!r}, which is not a list of counts or "all"')
    at_least = entry.get("at_least", {})
    if not isinstance(at_least, dict) or not all(isinstance(size, int) for size in at_least.values()):
        raise ValueError(f"{where} has at_least {at_least!r}, which is not a table of whole numbers")
    return Target(**entry)


def _is_thread_count(count: object) -> bool:
    return count == ALL_THREADS or (isinstance(count, int) and not isinstance(count, bool) and count > 0)


def judge(targets: Sequence[Target], measurements: Sequence[Measurement], machine: Machine) -> list[Verdict]:
    """Hold a run's warm measurements against the targets: one verdict for each target and thread count."""
    verdicts = []
    for target in targets:
        counts = sorted({machine.threads if count == ALL_THREADS else count for count in target.threads})
        for count in counts:
            chosen = [
                item
                for item in measurements
                if item.threads == count and item.cache == "warm" and target.selects(item.workload, item.dims)
            ]
            verdicts.append(_judge_one(target, count, chosen, machine))
    return verdicts


def _judge_one(target: Target, count: int, chosen: Sequence[Measurement], machine: Machine) -> Verdict:
    def verdict(status: str, reason: str = "", worst: tuple[float | None, str | None] = (None, None), met: int = 0):
        return Verdict(
            target=target.id,
            threads=count,
            status=status,
            minimum=target.minimum,
            metric=target.metric,
            value=worst[0],
            workload=worst[1],
            met=met,
            total=len(chosen),
            why=target.why,
            reason=reason,
            baseline=target.baseline,
        )

    if not chosen:
        return verdict("not judged", "none of its workloads ran")
    wrong = [item for item in chosen if not item.gate.ok]
    if wrong:
        return verdict("missed", f"wrong answer: {wrong[0].gate.message}", (None, wrong[0].workload))
    if count > 1 and not machine.scales:
        return verdict(
            "not judged", f"{machine.threads} threads gave only {machine.scaling * machine.threads:.2f}x of one here"
        )
    values = [(target.value(item, machine), item) for item in chosen]
    unknown = [item for value, item in values if value is None]
    if unknown:
        what = "no measured peak" if target.metric == "peak" else f"{target.baseline} was not timed"
        return verdict("not judged", f"{what} at {unknown[0].workload}")
    baseline = target.baseline or LAMINA
    busy = [item for _, item in values if not item.steady(baseline)]
    values = [(value, item) for value, item in values if item not in busy]
    met = sum(value >= target.minimum for value, _ in values)
    # One steady miss is enough for "missed", while "met" needs all of them.
    if busy and met == len(values):
        return verdict("not judged", f"the machine was busy: ±{busy[0].noise(baseline):.0%} at {busy[0].workload}")
    worst, where = min(((value, item.workload) for value, item in values), key=lambda pair: pair[0])
    return verdict("met" if met == len(values) else "missed", "", (worst, where), met)


def needed(targets: Sequence[Target]) -> Callable[[str, Mapping[str, int]], bool]:
    """A test for workloads that any of the targets speaks about."""
    return lambda workload_id, dims: any(target.selects(workload_id, dims) for target in targets)
