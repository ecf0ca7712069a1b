"""Numbers and tables for people: the same words in the terminal and on the page."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lamina.bench.compare import Change
from lamina.bench.machine import Machine
from lamina.bench.results import LAMINA, Measurement
from lamina.bench.targets import Verdict
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
    return "–" if per_second is None else f"{_digits(per_second / 1e9)} GFLOP/s"


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


def _ratio_text(ratio: float | None) -> Text:
    style = "" if ratio is None else "green" if ratio >= 1.0 else "red"
    return Text(times(ratio), style=style, justify="right")


def bench_table(measurements: Sequence[Measurement], machine: Machine, title: str) -> Table:
    """One row a measurement; a red gate shows its message where the numbers would be."""
    baselines = list(dict.fromkeys(name for item in measurements for name in (*item.times, *item.failures)))
    baselines = [name for name in baselines if name != LAMINA]
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column("workload", no_wrap=True)
    for heading in ("thr", "median", "20-80%", "rate", "traffic", "% of peak"):
        table.add_column(heading, justify="right", no_wrap=heading != "% of peak")
    for name in baselines:
        table.add_column(f"vs {name}", justify="right", min_width=6)
    table.add_column("isa", no_wrap=True)
    for item in measurements:
        head = [Text(item.workload.removeprefix(f"{item.op}/")), str(item.threads)]
        if not item.gate.ok:
            table.add_row(*head, Text(f"WRONG: {item.gate.message}", style="bold red"))
            continue
        ours = item.candidate
        ratios = [
            Text("failed", style="yellow") if name in item.failures else _ratio_text(item.speedup(name))
            for name in baselines
        ]
        table.add_row(
            *head,
            duration(ours.q50),
            spread(ours),
            rate(item.rate()),
            traffic(item.traffic()),
            percent(item.peak_fraction(machine)),
            *ratios,
            item.isa,
        )
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
            metric(verdict, verdict.minimum),
            verdict.reason or f"{verdict.workload} ({verdict.met} of {verdict.total} reach it)",
        )
    return table


def metric(verdict: Verdict, value: float | None) -> str:
    """A target's value in the words of its metric. Example: "72% of peak", "3.10x eager"."""
    if value is None:
        return "–"
    return f"{percent(value)} of peak" if verdict.metric == "peak" else f"{times(value)} {verdict.baseline}"


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
    if machine.threads > 1:
        verdict = "good" if machine.scales else "these threads do not scale: distrust figures on all threads"
        lines.append(("scaling", f"{machine.scaling * machine.threads:.2f}x on {machine.threads} threads ({verdict})"))
    return lines
