"""Numbers and tables for people: the same words in the terminal and on the page."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lamina.bench.break_even import BreakEven
from lamina.bench.compare import Change
from lamina.bench.gpu import Gpu
from lamina.bench.machine import Machine
from lamina.bench.results import LAMINA, Measurement
from lamina.bench.targets import AT_MOST, Verdict
from lamina.bench.timing import Timing

# Within 3% of each other nobody can tell, and neither can two runs of the same code.
SAME = 0.03
STATUS_STYLE = {"met": "green", "missed": "red", "not judged": "yellow"}
VERDICT_STYLE = {"broke": "bold red", "slower": "red", "faster": "green", "fixed": "green"}


def duration(seconds: float | None) -> str:
    """Three significant digits and a unit. Example: `duration(0.00123) == "1.23 ms"`."""
    if seconds is None:
        return "–"
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{_digits(seconds / scale)} {unit}"


def rate(per_second: float | None) -> str:
    """Operations a second. Example: `rate(4.2e11) == "420 GFLOP/s"`."""
    if per_second is None:
        return "–"
    unit, scale = ("TFLOP/s", 1e12) if per_second >= 1e13 else ("GFLOP/s", 1e9)
    return f"{_digits(per_second / scale)} {unit}"


def traffic(per_second: float | None) -> str:
    """Bytes a second. Example: `traffic(2.1e10) == "21.0 GB/s"`."""
    return "–" if per_second is None else f"{_digits(per_second / 1e9)} GB/s"


def size(count: float) -> str:
    """Bytes in decimal units. Example: `size(438_000_000) == "438 MB"`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{_digits(count / scale)} {unit}"
    return f"{count:.0f} B"


def times(ratio: float | None) -> str:
    """A speed-up. Example: `times(3.456) == "3.46x"`."""
    return "–" if ratio is None else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def percent(share: float | None, decimals: int = 0) -> str:
    """A share of one. Example: `percent(0.876) == "88%"`."""
    return "–" if share is None else f"{100 * share:.{decimals}f}%"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def thread_label(count: int) -> str:
    """Example: `thread_label(1) == "1 thread"`."""
    return f"{count} thread" + ("" if count == 1 else "s")


def reads(item: Measurement, machine: Machine) -> str:
    """The share of a memory level's read speed. Example: "81% L3"."""
    share = item.bandwidth_fraction(machine)
    return "–" if share is None else f"{percent(share)} {item.level(machine)}"


def _ratio_text(ratio: float | None, rival: str) -> Text:
    # Against another call of our own there is nothing to win or to lose.
    judged = ratio is not None and not rival.startswith(LAMINA)
    style = ("green" if ratio >= 1.0 else "red") if judged else ""
    return Text(times(ratio), style=style, justify="right")


def bench_table(measurements: Sequence[Measurement], machine: Machine, title: str) -> Table:
    """One row a measurement; a red gate shows its message where the numbers would be."""
    baselines = list(dict.fromkeys(name for item in measurements for name in (*item.times, *item.failures)))
    baselines = [name for name in baselines if name != LAMINA]
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column("workload", no_wrap=True)
    for heading in ("thr", "median", "20-80%", "rate", "% of peak", "traffic", "% of reads"):
        table.add_column(heading, justify="right", no_wrap=not heading.startswith("%"))
    for name in baselines:
        table.add_column(f"vs {name}", justify="right", min_width=6)
    memory = any(item.memory for item in measurements)
    if memory:
        table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("isa", no_wrap=True)
    if not all(item.scales for item in measurements):
        table.caption = "thr!: something else had one of the cores, even after waiting; these times are not judged"
    for item in measurements:
        head = [Text(item.workload.removeprefix(f"{item.op}/")), Text(f"{item.threads}{'' if item.scales else '!'}")]
        if not item.gate.ok:
            table.add_row(*head, Text(f"WRONG: {item.gate.message}", style="bold red"))
            continue
        ours = item.candidate
        ratios = [
            Text("no time", style="yellow") if name in item.failures else _ratio_text(item.speedup(name), name)
            for name in baselines
        ]
        table.add_row(
            *head,
            duration(ours.q50),
            spread(ours),
            rate(item.rate()),
            percent(item.peak_fraction(machine)),
            traffic(item.traffic()),
            reads(item, machine),
            *ratios,
            *([needed(item)] if memory else []),
            item.isa,
        )
    return table


def needed(item: Measurement) -> str:
    """The memory of one call, and of eager's. Example: "38.1 MB, eager 174 MB"."""
    return ", ".join(size(count) if name == LAMINA else f"{name} {size(count)}" for name, count in item.memory.items())


def break_even_table(found: Sequence[BreakEven]) -> Table:
    """One row a sparse work and thread count: how few zeros it needs, and what it gained at those that were timed."""
    table = Table(title="break-even with dense eager", title_justify="left", pad_edge=False)
    for heading in ("work", "threads", "from zeros", "measured"):
        table.add_column(heading, overflow="fold")
    for each in found:
        points = ", ".join(f"{zeros}%: {times(ratio)}" for zeros, ratio in each.points.items())
        table.add_row(each.work, str(each.threads), percent(1 - each.density), points)
    return table


def spread(timing: Timing) -> str:
    """The 20% and 80% quantiles relative to the median. Example: "-1% +4%"."""
    return f"{timing.q20 / timing.q50 - 1:+.0%} {timing.q80 / timing.q50 - 1:+.0%}"


def target_table(verdicts: Sequence[Verdict]) -> Table:
    """One row a target and thread count: met, missed or not judged, and by what."""
    table = Table(title="targets", title_justify="left", pad_edge=False)
    for heading in ("target", "threads", "", "worst", "promised", "where or why"):
        table.add_column(heading, overflow="fold")
    for verdict in verdicts:
        table.add_row(
            verdict.target,
            str(verdict.threads),
            Text(verdict.status, style=STATUS_STYLE[verdict.status]),
            metric(verdict, verdict.value),
            bound(verdict),
            verdict.reason or f"{verdict.workload} ({reach(verdict)})",
        )
    return table


def metric(verdict: Verdict, value: float | None) -> str:
    """A target's value in the words of its metric. Example: "72% of peak", "3.10x eager", "+4% time"."""
    if value is None:
        return "–"
    baseline = (verdict.baseline or "").replace(" *", "'s best")
    match verdict.metric:
        case "peak":
            return f"{percent(value)} of peak"
        case "bandwidth":
            return f"{percent(value)} of read speed"
        case "overhead":
            return f"{100 * value:+.0f}% time"
        case "memory":
            return f"{percent(value)} of {baseline}'s memory"
    return f"{times(value)} {baseline}"


def bound(verdict: Verdict) -> str:
    """What was promised. Example: "88% of peak", "at most +6% time"."""
    return ("at most " if verdict.metric in AT_MOST else "") + metric(verdict, verdict.bound)


def reach(verdict: Verdict) -> str:
    """How many of a target's measurements are good enough. Example: "39 of 40 reach it, 1 in doubt"."""
    doubt = f", {verdict.in_doubt} in doubt" if verdict.in_doubt else ""
    return f"{verdict.met} of {verdict.total} reach it{doubt}"


def compare_table(changes: Sequence[Change]) -> Table:
    """One row a workload of two runs."""
    table = Table(title="new against old", title_justify="left", pad_edge=False)
    table.add_column("workload", overflow="fold")
    for heading in ("thr", "cache", "old", "new", "old/new", "baseline", "adjusted", "noise", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in changes:
        table.add_row(
            Text(change.workload),
            str(change.threads),
            change.cache,
            duration(change.old),
            duration(change.new),
            times(change.ratio),
            times(change.drift),
            times(change.adjusted),
            "–" if change.noise is None else f"±{change.noise:.0%}",
            Text(change.verdict, style=VERDICT_STYLE.get(change.verdict, "")),
        )
    return table


def machine_lines(machine: Machine) -> list[tuple[str, str]]:
    """The machine header as (what, value) pairs."""
    caches = ", ".join(f"{level} {count / 1024:.0f} KiB" for level, count in machine.caches.items())
    lines = [
        ("CPU", f"{machine.cpu}, {machine.cores} cores; torch uses {thread_label(machine.threads)}"),
        ("memory", f"{size(machine.memory)}; caches {caches or 'unknown'}"),
        ("instructions", " ".join(machine.flags) or "unknown"),
        ("kernels", machine.isa),
        ("software", ", ".join([machine.system, *(f"{name} {version}" for name, version in machine.versions.items())])),
    ]
    for precision, rates in machine.peaks.items():
        unit = "GOP/s" if precision == "int8" else "GFLOP/s"
        measured = ", ".join(f"{value:.0f} {unit} ({thread_label(count)})" for count, value in rates.items() if value)
        lines.append((f"{precision} peak", measured or f"none with {machine.isa} kernels"))
    for level, rates in machine.bandwidth.items():
        lines.append(
            (f"{level} read", ", ".join(f"{value:.0f} GB/s ({thread_label(count)})" for count, value in rates.items()))
        )
    if machine.gpu is not None:
        lines += gpu_lines(machine.gpu)
    if machine.threads > 1:
        verdict = "good" if machine.scales else "these threads do not scale: distrust figures on all threads"
        lines.append(("scaling", f"{machine.scaling * machine.threads:.2f}x on {machine.threads} threads ({verdict})"))
    return lines


def gpu_lines(gpu: Gpu) -> list[tuple[str, str]]:
    """The GPU as (what, value) pairs."""
    peaks = [(f"{precision} peak", f"{value / 1e12:.0f} TOP/s") for precision, value in gpu.peaks.items()]
    return [
        ("GPU", f"{gpu.name}, {gpu.multiprocessors} multiprocessors, compute capability {gpu.capability}"),
        ("GPU memory", f"{size(gpu.memory)}; L2 {gpu.l2 / 2**20:.0f} MiB"),
        *[(f"GPU {what}", value) for what, value in peaks],
        ("GPU copy", f"{gpu.bandwidth / 1e9:.0f} GB/s, read and written"),
    ]
