"""The ratios we promise (`benchmarks/targets.toml`) and whether a run met them.

A target names workloads, a metric and what it must reach at every one of them; it is as good as its worst
workload. Ratios only: an absolute time would promise a machine, not a kernel.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lamina.bench.machine import Machine
from lamina.bench.results import LAMINA, Measurement
from lamina.bench.workloads import matches

METRICS = ("peak", "bandwidth", "speedup", "overhead", "memory")
COMPARING = ("speedup", "overhead", "memory")
# Metrics that are better the smaller they are.
AT_MOST = ("overhead", "memory")
# A target with more workloads than this in doubt (too noisy, a core taken away) is not called met.
MOST_IN_DOUBT = 0.1
ALL_THREADS = "all"
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        id: a short name.
        workloads: pattern of workload ids, as `lamina bench --filter` takes it.
        metric: "peak" (share of the measured peak of the workload's precision), "bandwidth" (share of the measured read
            bandwidth of the level of memory that the data sits in), "speedup" (times faster than `baseline`),
            "overhead" (time beyond that of `baseline`, as a share of it) or "memory" (the most bytes that one call
            needs at once, as a share of what one of `baseline` needs).
        minimum, maximum: the least value that counts as met; of "overhead" and "memory" the most.
        threads: thread counts it holds for; "all" is every thread the machine gives. A GPU has one.
        why: where the number comes from.
        baseline: what "speedup", "overhead" and "memory" are measured against; of several that a pattern such as
            "sdpa *" names, the fastest.
        at_least, at_most: sizes of the workloads meant, e.g. `{"M": 128}`; one without that size is not meant.
        except_for: pattern of workload ids that are not meant.
        device: "cpu" or "cuda", where the workloads run.
    """

    id: str
    workloads: str
    metric: str
    threads: Sequence[int | str]
    why: str
    minimum: float | None = None
    maximum: float | None = None
    baseline: str | None = None
    at_least: Mapping[str, int] = field(default_factory=dict)
    at_most: Mapping[str, int] = field(default_factory=dict)
    except_for: str | None = None
    device: str = "cpu"

    def selects(self, workload_id: str, dims: Mapping[str, int]) -> bool:
        """Whether this target speaks about a workload."""
        fits = all(dims.get(name, -1) >= size for name, size in self.at_least.items()) and all(
            name in dims and dims[name] <= size for name, size in self.at_most.items()
        )
        left_out = self.except_for is not None and matches(workload_id, self.except_for)
        return fits and not left_out and matches(workload_id, self.workloads)

    def value(self, measurement: Measurement, machine: Machine) -> float | None:
        """The metric of one measurement, None when it was not taken."""
        match self.metric:
            case "peak":
                return measurement.peak_fraction(machine)
            case "bandwidth":
                return measurement.bandwidth_fraction(machine)
            case "memory":
                return measurement.memory_share(self.baseline)
        speedup = measurement.speedup(measurement.rival(self.baseline))
        return speedup if self.metric == "speedup" or speedup is None else 1 / speedup - 1

    def reached(self, value: float) -> bool:
        """Whether a value of the metric is good enough."""
        return value <= self.maximum if self.minimum is None else value >= self.minimum

    def doubt(self, measurement: Measurement) -> str:
        """Why a measurement should not be judged, "" if sure; a busy machine does not change what memory is needed."""
        return "" if self.metric == "memory" else measurement.doubt(measurement.rival(self.baseline or LAMINA))

    def worst(self, values: Sequence[tuple[float, str]]) -> tuple[float, str]:
        """The worst of (value, workload) pairs."""
        return (max if self.minimum is None else min)(values, key=lambda pair: pair[0])


@dataclass(frozen=True)
class Verdict:
    """How one target stands at one thread count.

    `status`: "met", "missed" or "not judged". `bound`: what was promised. `value` and `workload`: the worst one. `met`,
    `total`: how many of the target's measurements reach it; `in_doubt`: how many were too unsteady to count.
    `reason`: why it was missed or not judged, where a number does not say it.
    """

    target: str
    threads: int
    status: str
    bound: float
    metric: str
    value: float | None
    workload: str | None
    met: int
    total: int
    why: str
    reason: str = ""
    baseline: str | None = None
    in_doubt: int = 0


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
    bound = "maximum" if entry.get("metric") in AT_MOST else "minimum"
    missing = {"id", "workloads", "metric", bound, "threads", "why"} - entry.keys()
    unknown = entry.keys() - Target.__dataclass_fields__.keys()
    if missing or unknown:
        trouble = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        trouble += [f"has the unknown key {', '.join(sorted(unknown))}"] if unknown else []
        raise ValueError(f"{where} {' and '.join(trouble)}")
    if entry["metric"] not in METRICS:
        raise ValueError(f"{where} has metric {entry['metric']!r}; the metrics are {', '.join(METRICS)}")
    if (entry["metric"] in COMPARING) != ("baseline" in entry):
        comparing = ", ".join(COMPARING)
        raise ValueError(f"{where}: the metrics {comparing} need a baseline, and no other metric takes one")
    if "minimum" in entry and "maximum" in entry:
        most = " and ".join(AT_MOST)
        raise ValueError(f"{where} has a minimum and a maximum; {most} take a maximum, the others a minimum")
    value = entry[bound]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{where} has {bound} {value!r}, which is not a positive number")
    if entry.get("device", "cpu") not in DEVICES:
        raise ValueError(f"{where} has device {entry['device']!r}; the devices are {', '.join(DEVICES)}")
    threads = entry["threads"]
    if not isinstance(threads, list) or not threads or not all(_is_thread_count(count) for count in threads):
        raise ValueError(f'{where} has threads {threads!r}, which is not a list of counts or "all"')
    for name in ("at_least", "at_most"):
        sizes = entry.get(name, {})
        if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
            raise ValueError(f"{where} has {name} {sizes!r}, which is not a table of whole numbers")
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
                if item.device == target.device
                and item.threads == count
                and item.cache == "warm"
                and target.selects(item.workload, item.dims)
            ]
            verdicts.append(_judge_one(target, count, chosen, machine))
    return verdicts


def _judge_one(target: Target, count: int, chosen: Sequence[Measurement], machine: Machine) -> Verdict:
    def verdict(status: str, reason: str = "", worst: tuple[float | None, str | None] = (None, None), **more: int):
        return Verdict(
            target=target.id,
            threads=count,
            status=status,
            bound=target.maximum if target.minimum is None else target.minimum,
            metric=target.metric,
            value=worst[0],
            workload=worst[1],
            met=more.get("met", 0),
            total=len(chosen),
            why=target.why,
            reason=reason,
            baseline=target.baseline,
            in_doubt=more.get("in_doubt", 0),
        )

    if not chosen:
        return verdict("not judged", "none of its workloads ran")
    wrong = [item for item in chosen if not item.gate.ok]
    if wrong:
        return verdict("missed", f"wrong answer: {wrong[0].gate.message}", (None, wrong[0].workload))
    values = [(target.value(item, machine), item) for item in chosen]
    unknown = [item for value, item in values if value is None]
    if unknown:
        return verdict("not judged", _why_unknown(target, unknown[0]))
    doubts = [doubt for _, item in values if (doubt := target.doubt(item))]
    sure = [(value, item.workload) for value, item in values if not target.doubt(item)]
    met = sum(target.reached(value) for value, _ in sure)
    # One miss beyond doubt is enough for "missed", while "met" needs nearly all of them to be beyond doubt.
    if met == len(sure) and len(doubts) > MOST_IN_DOUBT * len(values):
        return verdict("not judged", f"{doubts[0]} ({len(doubts)} of {len(values)} in doubt)", met=met)
    status = "met" if met == len(sure) else "missed"
    return verdict(status, worst=target.worst(sure), met=met, in_doubt=len(doubts))


def _why_unknown(target: Target, item: Measurement) -> str:
    if target.metric == "peak":
        return f"no measured peak at {item.workload}"
    if target.metric == "bandwidth":
        return f"no measured read bandwidth at {item.workload}"
    if target.metric == "memory":
        return f"no memory of {target.baseline} was measured at {item.workload}"
    why = "; ".join(
        f"{name}: {text}" if name != target.baseline else text
        for name, text in item.failures.items()
        if matches(name, target.baseline)
    )
    return f"{target.baseline} was not timed at {item.workload}" + (f": {why}" if why else "")


def needed(targets: Sequence[Target]) -> Callable[[str, Mapping[str, int]], bool]:
    """A test for workloads that any of the targets speaks about."""
    return lambda workload_id, dims: any(target.selects(workload_id, dims) for target in targets)
