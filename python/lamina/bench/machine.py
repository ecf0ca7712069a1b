"""The machine a measurement belongs to: what it is, and how fast it can possibly be, measured in the same run."""

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import lamina
from lamina import _C
from lamina.bench import gpu
from lamina.bench.gpu import Gpu
from lamina.bench.timing import measure, threads

PRECISIONS = ("float32", "bf16", "int8")
# Flags that decide which kernels can run; the rest of the list says nothing here.
RELEVANT_FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
)
# A large matrix product scales this well on idle cores; less means that one is missing or busy elsewhere.
SCALING_FLOOR = 0.8
SCALING_SIZE = 768
# Data that fills more of a cache than this does not stay in it beside everything else that wants a place there.
FILL = 0.75
PRIVATE = ("L1d", "L2")
PROBE_SECONDS = 0.03
PROBE_REPEATS = 3
_SYSTEM = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Machine:
    """What the machine is and what was measured on it.

    `caches`: level -> bytes of one such cache (`L2` belongs to one core). `peaks`: precision -> threads -> GFLOP/s
    (int8: GOP/s), 0.0 when the CPU lacks the instruction. `bandwidth`: memory level -> threads -> GB/s read.
    `scaling`: how much faster one matrix product was on all threads than on one, divided by the number of threads.
    `gpu`: the GPU that workloads ran on, if they did.
    """

    cpu: str
    cores: int
    threads: int
    memory: int
    caches: Mapping[str, int]
    flags: Sequence[str]
    system: str
    versions: Mapping[str, str]
    isa: str
    peaks: Mapping[str, Mapping[int, float]]
    bandwidth: Mapping[str, Mapping[int, float]]
    scaling: float
    gpu: Gpu | None = None

    @property
    def scales(self) -> bool:
        """Whether more threads were really faster; if not, figures on all threads say little."""
        ideal = self.threads * self.peak("float32", 1)
        return self.threads == 1 or min(self.scaling, self.peak("float32", self.threads) / ideal) >= SCALING_FLOOR

    def peak(self, precision: str, threads: int, device: str = "cpu") -> float:
        """Measured peak in FLOP/s, 0.0 when unknown for that thread count. Example: `machine.peak("int8", 1)`."""
        if device == "cuda":
            return self.gpu.peaks.get(precision, 0.0) if self.gpu else 0.0
        return self.peaks.get(precision, {}).get(threads, 0.0) * 1e9

    def read_bandwidth(self, level: str, threads: int, device: str = "cpu") -> float:
        """Measured bytes a second read from a level, 0.0 when unknown. Example: `machine.read_bandwidth("L3", 1)`."""
        if device == "cuda":
            return self.gpu.bandwidth if self.gpu and level == "HBM" else 0.0
        return self.bandwidth.get(level, {}).get(threads, 0.0) * 1e9

    def level(self, count: int, threads: int) -> str:
        """The level that `count` bytes stay in when all threads together go through them again and again."""
        for level in self.bandwidth:
            cores = threads if level in PRIVATE else 1
            if count <= FILL * cores * self.caches.get(level, 0):
                return level
        return "DRAM"

    def to_json(self) -> dict:
        """Plain values; thread counts become strings, as JSON keys must be."""
        return asdict(self) | {"scales": self.scales}

    @classmethod
    def from_json(cls, values: dict) -> "Machine":
        """The inverse of `to_json`."""
        fields = {name: value for name, value in values.items() if name != "scales"}
        fields["gpu"] = Gpu(**fields["gpu"]) if fields.get("gpu") else None
        for name in ("peaks", "bandwidth"):
            fields[name] = {
                row: {int(threads): rate for threads, rate in rates.items()} for row, rates in fields[name].items()
            }
        return cls(**fields)


def thread_counts() -> list[int]:
    """One thread and all of them (what torch uses by default here): the counts that everything is timed at."""
    return sorted({1, torch.get_num_threads()})


def describe(progress: Callable[[str, int, int], None] | None = None) -> Machine:
    """Describe this machine and probe its peaks (about 3 seconds). `progress` gets (what, done, total)."""
    counts = thread_counts()
    caches = _caches()
    levels = _probe_sizes(caches)
    total = (len(PRECISIONS) + len(levels)) * len(counts) + 1
    done = 0

    def probed(what: str, probe: Callable[[], float]) -> float:
        nonlocal done
        if progress:
            progress(what, done, total)
        done += 1
        return max(probe() for _ in range(PROBE_REPEATS))

    peaks = {
        precision: _at_least_one_thread(
            {
                count: probed(f"{precision} peak", lambda p=precision, c=count: _C.probe_peak(p, c, PROBE_SECONDS))
                for count in counts
            }
        )
        for precision in PRECISIONS
    }
    bandwidth = {
        level: _at_least_one_thread(
            {
                count: probed(f"{level} read", lambda b=size, c=count: _C.probe_read_bandwidth(b(c), c, PROBE_SECONDS))
                for count in counts
            }
        )
        for level, size in levels.items()
    }
    if progress:
        progress("thread scaling", done, total)
    most = counts[-1]
    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        threads=most,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        caches=caches,
        flags=_flags(),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        versions=_versions(),
        isa=lamina.info()["isa"],
        peaks=peaks,
        bandwidth=bandwidth,
        scaling=_scaling(most),
    )


def describe_without_probes() -> Machine:
    """What this machine is, with nothing measured."""
    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        threads=1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        caches=_caches(),
        flags=_flags(),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        versions=_versions(),
        isa=lamina.info()["isa"],
        peaks={},
        bandwidth={},
        scaling=1.0,
    )


def describe_gpu() -> Machine:
    """This machine and its first GPU, which is probed for some seconds; of the CPU only what it is."""
    here = describe_without_probes()
    return replace(here, versions={**here.versions, **gpu.versions()}, gpu=gpu.describe())


def _at_least_one_thread(rates: Mapping[int, float]) -> dict[int, float]:
    # A probe whose threads waited for a busy core reads less than one thread alone, which the machine can do anyway.
    return {count: max(rate, rates[1]) for count, rate in rates.items()}


def combine(before: Machine, after: Machine) -> Machine:
    """One machine out of descriptions from before and after a run: the higher peaks, the worse scaling.

    A peak that the machine reached at any moment is one that the kernels could have been given.
    """

    def highest(a: Mapping[str, Mapping[int, float]], b: Mapping[str, Mapping[int, float]]) -> dict:
        return {row: {count: max(rate, b[row][count]) for count, rate in rates.items()} for row, rates in a.items()}

    return replace(
        before,
        peaks=highest(before.peaks, after.peaks),
        bandwidth=highest(before.bandwidth, after.bandwidth),
        scaling=min(before.scaling, after.scaling),
        gpu=gpu.combine(before.gpu, after.gpu),
    )


def cache_bytes(machine: Machine) -> int:
    """Bytes of the largest cache: what has to be flushed for a cold call."""
    return max(machine.caches.values(), default=32 << 20)


def _scaling(count: int) -> float:
    if count == 1:
        return 1.0
    a, b = torch.ones(2, SCALING_SIZE, SCALING_SIZE)

    def product(used: int) -> None:
        with threads(used):
            a @ b

    timings = measure({"one": lambda: product(1), "all": lambda: product(count)}, budget=0.3)
    return timings["one"].q50 / timings["all"].q50 / count


def _probe_sizes(caches: Mapping[str, int]) -> dict[str, Callable[[int], int]]:
    """Memory level -> threads -> bytes to read so that they fit that level and no smaller one."""
    sizes: dict[str, Callable[[int], int]] = {}
    for level in PRIVATE:
        if level in caches:
            sizes[level] = lambda threads, level=level: threads * caches[level] // 2
    if "L3" in caches:
        sizes["L3"] = lambda threads: caches["L3"] // 2
    largest = max(caches.values(), default=32 << 20)
    sizes["DRAM"] = lambda threads: max(4 * largest, 64 << 20)
    return sizes


def _caches() -> dict[str, int]:
    """Level -> bytes, e.g. {"L1d": 32768, "L2": 1048576, "L3": 33554432}; empty where the system does not tell."""
    found = {}
    for folder in sorted(_SYSTEM.glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
            found[f"L{level}" + ("d" if kind == "Data" else "")] = int(re.sub(r"\D", "", size)) * unit
    return found


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    match = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
    return match.group(1).strip() if match else ""


def cpu_name() -> str:
    """What the CPU calls itself."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _flags() -> list[str]:
    present = set(_cpuinfo("flags").split())
    return [flag for flag in RELEVANT_FLAGS if flag in present]


def _versions() -> dict[str, str]:
    return {"lamina": lamina.__version__, "torch": torch.__version__}
