"""The file that measurements are kept in: one versioned JSON schema for `lamina bench --json` and `lamina report`."""

import dataclasses
import datetime
import fnmatch
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lamina
from lamina.bench.machine import Machine
from lamina.bench.timing import Timing, speedup
from lamina.bench.workloads import Gate

# What our own contender is called among the times of a measurement.
LAMINA = "lamina"
SCHEMA = "lamina-results"
VERSION = 1
# A ratio that may be off by more than this says nothing: the machine was busy with something else.
UNSTEADY = 0.25
# A plain loop of multiply-adds, run in turns with the contenders, is this close to ideal on cores that are free.
# Virtual machines take a core away for seconds; then a time on all threads is about the neighbours.
SCALING_FLOOR = 0.8


@dataclass(frozen=True)
class Measurement:
    """One workload at one thread count.

    `times` has lamina's timing under "lamina" and one entry a contender; it is empty when the `gate` is red.
    `failures`: contender -> why it has no time. `cache`: "warm" or "cold". `isa`: the kernels that ran last, "" when
    no lamina kernel did. `resident`: bytes that calls one after the other go through. `scaling`: how much faster a loop
    of multiply-adds was on all these threads than on one while this was measured, divided by the number of threads.
    `memory`: contender -> the most bytes that one call of it needs at once, where that was asked for. `device`: "cpu"
    or "cuda"; on a GPU `isa` is its architecture and threads are 1.
    """

    workload: str
    op: str
    shape: str
    dims: Mapping[str, int]
    threads: int
    cache: str
    isa: str
    precision: str
    flops: int
    bytes: int
    gate: Gate
    times: Mapping[str, Timing]
    failures: Mapping[str, str] = field(default_factory=dict)
    resident: int = 0
    scaling: float = 1.0
    memory: Mapping[str, int] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def key(self) -> tuple[str, int, str]:
        """What identifies a measurement across two files."""
        return self.workload, self.threads, self.cache

    @property
    def candidate(self) -> Timing | None:
        """lamina's own timing, None behind a red gate."""
        return self.times.get(LAMINA)

    @property
    def rivals(self) -> list[str]:
        """Who was timed beside lamina, without other calls of lamina's own."""
        return [name for name in self.times if not name.startswith(LAMINA)]

    @property
    def scales(self) -> bool:
        """Whether all threads had a core of their own; if not, the times say little and are not judged."""
        return self.threads == 1 or self.scaling >= SCALING_FLOOR

    def rival(self, pattern: str) -> str:
        """The contender that is called so or, of several that match a pattern such as "sdpa *", the fastest."""
        found = [name for name in self.times if fnmatch.fnmatchcase(name, pattern)]
        return min(found, key=lambda name: self.times[name].q50, default=pattern)

    def speedup(self, baseline: str) -> float | None:
        """Times faster than a baseline, by the ratio of medians; None when either was not timed."""
        if self.candidate is None or baseline not in self.times:
            return None
        return speedup(self.times[baseline], self.candidate)

    def memory_share(self, baseline: str) -> float | None:
        """The memory of a call as a share of a baseline's; None when either was not taken."""
        if LAMINA not in self.memory or not self.memory.get(baseline):
            return None
        return self.memory[LAMINA] / self.memory[baseline]

    def noise(self, baseline: str) -> float:
        """How far, relatively, `speedup(baseline)` may be off: the noise of both medians together."""
        return math.hypot(self.candidate.noise, self.times[baseline].noise)

    def steady(self, baseline: str) -> bool:
        """Whether the speed-up over a timed baseline is known well enough to be called a win or a loss."""
        return self.noise(baseline) <= UNSTEADY

    def doubt(self, baseline: str) -> str:
        """Why the times against `baseline` should not be judged, e.g. "the second core was busy at ..."; "" if sure."""
        if not self.scales:
            missing = "the second core was busy" if self.threads == 2 else f"not all {self.threads} cores were free"
            return f"{missing} at {self.workload}"
        if not self.steady(baseline):
            return f"the machine was busy: ±{self.noise(baseline):.0%} at {self.workload}"
        return ""

    def rate(self, contender: str = LAMINA) -> float | None:
        """FLOP/s reached (int8: integer operations a second); None where nothing is computed, only moved."""
        return self.flops / self.times[contender].q50 if self.flops and contender in self.times else None

    def peak_fraction(self, machine: Machine) -> float | None:
        """Share of the measured peak of the same precision and thread count that lamina reached, 1.0 being all."""
        peak = machine.peak(self.precision, self.threads, self.device)
        rate = self.rate()
        return rate / peak if rate is not None and peak else None

    def traffic(self) -> float | None:
        """Bytes a second, counting what has to be read and written once; what bounds work on a few rows."""
        return self.bytes / self.candidate.q50 if self.candidate is not None else None

    def level(self, machine: Machine) -> str:
        """The level of memory that the data comes from, e.g. "L3"; main memory when the caches were flushed."""
        count = max(self.bytes, self.resident)
        if self.device == "cuda":
            return machine.gpu.level(count) if machine.gpu else "HBM"
        return machine.level(count, self.threads) if self.cache == "warm" else "DRAM"

    def bandwidth_fraction(self, machine: Machine) -> float | None:
        """Share of the measured read bandwidth of that level which `traffic` reached, 1.0 being all."""
        bandwidth = machine.read_bandwidth(self.level(machine), self.threads, self.device)
        traffic = self.traffic()
        return traffic / bandwidth if traffic is not None and bandwidth else None

    @classmethod
    def from_json(cls, values: dict) -> "Measurement":
        """The inverse of `dataclasses.asdict`."""
        parsed = dict(values)
        parsed["gate"] = Gate(**values["gate"])
        parsed["times"] = {name: Timing(**timing) for name, timing in values["times"].items()}
        return cls(**parsed)


@dataclass(frozen=True)
class Results:
    """Everything one run measured. `extra` holds the sections that only the report fills (models, targets, MiniLM)."""

    machine: Machine
    measurements: Sequence[Measurement]
    created: str
    lamina: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict:
        """The schema as plain values; non-finite numbers become null, which JSON can hold."""
        values = {
            "schema": SCHEMA,
            "version": VERSION,
            "created": self.created,
            "lamina": dict(self.lamina),
            "machine": self.machine.to_json(),
            "measurements": [asdict(measurement) for measurement in self.measurements],
            **self.extra,
        }
        return _plain(values)

    def save(self, path: str | Path) -> None:
        """Write the results as JSON; the file appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", "utf-8")
        partial.replace(path)


def collect(machine: Machine, measurements: Iterable[Measurement], **extra: Any) -> Results:
    """Results of this process and this moment."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Results(machine, list(measurements), now, lamina.info(), extra)


def load(path: str | Path) -> Results:
    """Read a results file. Raises `lamina.FormatError` for one that is truncated, foreign or from a newer version."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise lamina.FormatError(f"{path} can't be read: {error}") from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise lamina.FormatError(f"{path} is not complete JSON (line {error.lineno}): {error.msg}") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise lamina.FormatError(f'{path} is not a lamina results file (no "schema": "{SCHEMA}" in it)')
    if values.get("version") != VERSION:
        raise lamina.FormatError(f"{path} has results version {values.get('version')}, this lamina reads {VERSION}")
    known = {"schema", "version", "created", "lamina", "machine", "measurements"}
    try:
        return Results(
            machine=Machine.from_json(values["machine"]),
            measurements=[Measurement.from_json(item) for item in values["measurements"]],
            created=values["created"],
            lamina=values["lamina"],
            extra={name: value for name, value in values.items() if name not in known},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise lamina.FormatError(f"{path} is a damaged lamina results file: {error!r}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    return value
