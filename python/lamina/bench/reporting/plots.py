"""The pages' plots, as inline SVG whose colours are the page's CSS variables, so that they turn dark with it."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.bench.machine import PRIVATE, Machine
from lamina.bench.results import Measurement
from lamina.bench.text import SAME

# Every colour drawn is one of these unlikely ones, replaced by its variable in the finished SVG.
COLORS = {
    "ink": "#010203",
    "muted": "#040506",
    "line": "#070809",
    "accent": "#0a0b0c",
    "second": "#0d0e0f",
    "third": "#101112",
    "loss": "#131415",
}
# Inches at 72 units: the SVG is 360 units wide, so that 10 pt text is readable both on a phone (about 360 pixels) and
# in the page's two columns.
SIZE = (5.0, 4.1)


@dataclass(frozen=True)
class Kept:
    """One line of the quality plot: a model's speed-up, and its quality (0 to 1) before and after.

    `peer_speedup`, `peer_quality`: the same of PyTorch's own int8, None where it was not timed.
    """

    title: str
    speedup: float
    before: float
    after: float
    peer_speedup: float | None
    peer_quality: float


def quality_against_speed(points: Sequence[Kept]) -> str:
    """A line for each model, from eager (1x, quality before) to accelerated; a cross for PyTorch's own int8."""
    figure, axes = _figure()
    peers = [(point.peer_speedup, point.peer_quality) for point in points if point.peer_speedup]
    speeds = [1.0, *(point.speedup for point in points), *(x for x, _ in peers)]
    lowest = min([0.985, *(min(point.before, point.after) for point in points), *(y for _, y in peers)])
    room = 0.06 * (1.0 - lowest)
    axes.set_xlim(min(speeds) - 0.2, max([2.0, *speeds]) * 1.12)
    axes.set_ylim(lowest - 2 * room, 1.0 + room)
    axes.axvline(1.0, color=COLORS["line"], linewidth=1.2)
    for point in points:
        moved = abs(point.speedup - 1) > SAME
        color = COLORS["muted" if not moved else "accent" if point.speedup > 1 else "loss"]
        axes.plot(1.0, point.before, "o", color=COLORS["muted"], markersize=4.5, zorder=3)
        axes.annotate(
            "",
            xy=(point.speedup, point.after),
            xytext=(1.0, point.before),
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 1.4, "shrinkA": 2, "shrinkB": 2},
        )
        axes.plot(point.speedup, point.after, "o", color=color, markersize=6.5, zorder=4)
    for point in points:
        if point.peer_speedup:
            ends = (1.0, point.peer_speedup), (point.before, point.peer_quality)
            axes.plot(*ends, color=COLORS["third"], linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
            axes.plot(*(end[1] for end in ends), "x", color=COLORS["third"], markersize=6, markeredgewidth=1.5)
    for point, (x, y, side) in zip(points, _spread_labels(axes, points), strict=True):
        axes.text(x, y, point.title, fontsize=9, color=COLORS["ink"], ha=side, va="center")
    axes.set_xlabel("times as fast as eager PyTorch")
    axes.set_ylabel("accuracy, or lowest cosine similarity")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.1f}%" if value <= 1 else "")
    return _svg(figure, "quality")


def _spread_labels(axes, points: Sequence[Kept]) -> list[tuple[float, float, str]]:
    """Where the names go: under the dot, or right of one that did not move; pushed down where two would overlap."""
    left, right = axes.get_xlim()
    low, high = axes.get_ylim()
    gap = 0.05 * (high - low)
    placed: dict[int, tuple[float, float, str]] = {}
    for index in sorted(range(len(points)), key=lambda index: -points[index].after):
        point = points[index]
        moved = point.speedup > left + 0.3 * (right - left)
        x = point.speedup if moved else point.speedup + 0.025 * (right - left)
        y = point.after - gap if moved else point.after
        while any(
            abs(y - other_y) < gap and abs(x - other_x) < 0.3 * (right - left)
            for other_x, other_y, _ in placed.values()
        ):
            y -= gap / 4
        placed[index] = (x, y, "center" if moved else "left")
    return [placed[index] for index in range(len(points))]


def sensitivity(layers: Sequence[Mapping[str, Any]], baseline: float) -> str:
    """What the model reaches with one layer pruned alone, over that layer's sparsity; the three worst have names.

    layers: each with "fqn" and "scores", pairs of sparsity and share.
    """
    figure, axes = _figure()
    order = sorted(layers, key=lambda layer: sum(score for _, score in layer["scores"]))
    named = {id(layer): color for layer, color in zip(order, ("loss", "third", "second"), strict=False)}
    axes.axhline(baseline, color=COLORS["line"], linewidth=1.2)
    for layer in reversed(order):
        color = named.get(id(layer))
        axes.plot(
            *zip(*layer["scores"], strict=True),
            color=COLORS[color or "muted"],
            linewidth=1.6 if color else 0.8,
            marker="o",
            markersize=4 if color else 2.5,
            zorder=3 if color else 2,
        )
    shares = sorted({share for layer in layers for share, _ in layer["scores"]})
    lowest = min([baseline, *(score for layer in layers for _, score in layer["scores"])])
    axes.set_ylim(max(0.0, lowest - 0.05), min(1.02, baseline + 0.05))
    axes.set_xticks(shares)
    axes.margins(x=0.06)
    axes.set_xlabel("share of one layer's weights that is zero")
    axes.set_ylabel("accuracy without training")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%" if value <= 1 else "")
    for place, layer in enumerate(order[:3]):
        axes.text(
            0.03,
            0.05 + 0.06 * (2 - place),
            layer["fqn"],
            fontsize=9,
            color=COLORS[named[id(layer)]],
            transform=axes.transAxes,
        )
    return _svg(figure, "sensitivity")


def tuning(history: Sequence[Mapping[str, float]], pruning_epochs: int, kept: int, dense: float) -> str:
    """Validation accuracy over the epochs, the dense model's as a line; behind it the share of the pruning done.

    history: each with "validation_accuracy"; pruning_epochs: over which zeros were added; kept: index of the epoch
    whose weights were kept; dense: the dense model's accuracy on the same data.
    """
    figure, axes = _figure()
    epochs = list(range(1, len(history) + 1))
    reached = [epoch["validation_accuracy"] for epoch in history]
    axes.axvspan(0.5, pruning_epochs + 0.5, color=COLORS["line"], alpha=0.35, linewidth=0)
    axes.axhline(dense, color=COLORS["muted"], linewidth=1, linestyle=(0, (3, 3)))
    axes.plot(epochs, reached, color=COLORS["accent"], linewidth=1.6)
    axes.plot(kept + 1, reached[kept], "o", color=COLORS["accent"], markersize=7)
    room = 0.1 * (max(dense, *reached) - min(dense, *reached)) + 0.002
    axes.set_ylim(min(dense, *reached) - room, min(1.0, max(dense, *reached) + room))
    axes.set_xlim(0.5, len(history) + 0.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy on validation samples")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.1f}%")
    return _svg(figure, "tuning")


def roofline(machine: Machine, threads: int, measurements: Sequence[Measurement]) -> str:
    """Operations a second over operations a byte, under the measured compute and bandwidth roofs of the machine."""
    figure, axes = _figure()
    axes.set_xscale("log")
    axes.set_yscale("log")
    points = [item for item in measurements if item.threads == threads and item.rate() is not None and item.bytes]
    rates = [item.rate() / 1e9 for item in points]
    intensities = [item.flops / item.bytes for item in points]
    left, right = min([10.0, *intensities]) * 0.6, max([100.0, *intensities]) * 2
    peaks = {name: rates[threads] for name, rates in machine.peaks.items() if rates.get(threads)}
    top = max([*peaks.values(), *rates, 1.0]) * 2
    axes.set_xlim(left, right)
    axes.set_ylim(min([10.0, *rates]) * 0.5, top)
    _draw_roofs(axes, machine, threads, peaks, (left, right))
    for baseline in ("eager", "sdpa"):
        pairs = [(item.flops / item.bytes, item.rate(baseline)) for item in points if baseline in item.times]
        if pairs:
            axes.plot(
                [x for x, _ in pairs],
                [rate / 1e9 for _, rate in pairs],
                linestyle="none",
                marker="o",
                markersize=3,
                markerfacecolor="none",
                markeredgecolor=COLORS["muted"],
                markeredgewidth=0.8,
            )
    styles = {"int8": ("o", "accent"), "float32": ("^", "second"), "bf16": ("s", "third")}
    for precision, (marker, color) in styles.items():
        chosen = [item for item in points if item.precision == precision]
        axes.plot(
            [item.flops / item.bytes for item in chosen],
            [item.rate() / 1e9 for item in chosen],
            linestyle="none",
            marker=marker,
            markersize=4.5,
            color=COLORS[color],
            zorder=4,
        )
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("billion operations a second")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return _svg(figure, "roofline")


def _draw_roofs(axes, machine: Machine, threads: int, peaks: Mapping[str, float], limits: tuple[float, float]) -> None:
    highest = max(peaks.values(), default=1.0)
    slopes = [
        (level, rates[threads])
        for level, rates in machine.bandwidth.items()
        if level not in PRIVATE and rates.get(threads)
    ]
    for level, bandwidth in slopes:
        axes.plot(
            [limits[0], highest / bandwidth], [limits[0] * bandwidth, highest], color=COLORS["line"], linewidth=1.2
        )
        # Along its line, just above it and near the top end, where there are no points.
        x = highest / bandwidth / 2.2
        axes.text(
            x,
            x * bandwidth * 1.08,
            f"{level} {bandwidth:.0f} GB/s",
            fontsize=8,
            color=COLORS["muted"],
            ha="right",
            va="bottom",
            rotation=math.degrees(math.atan(bandwidth)),
            rotation_mode="anchor",
            transform_rotates_text=True,
        )
    start = max((bandwidth for _, bandwidth in slopes), default=highest / limits[0])
    for precision, peak in peaks.items():
        axes.plot([peak / start, limits[1]], [peak, peak], color=COLORS["line"], linewidth=1.2)
        axes.text(
            limits[1] * 0.93, peak * 1.04, f"{precision} {peak:.0f}", fontsize=8, color=COLORS["muted"], ha="right"
        )


def _figure():
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(COLORS["line"])
    axes.tick_params(which="both", color=COLORS["line"], labelcolor=COLORS["muted"], labelsize=9)
    axes.xaxis.label.set_color(COLORS["muted"])
    axes.yaxis.label.set_color(COLORS["muted"])
    axes.xaxis.label.set_size(10)
    axes.yaxis.label.set_size(10)
    return figure, axes


def _svg(figure, name: str) -> str:
    """The figure as SVG for an HTML page: no metadata, no namespaces (HTML knows them), page fonts and colours."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text, and ids come from the plot's name, so that the same numbers give the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"lamina-{name}"}):
        figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = re.sub(r"(font:[^;\"]*?\d+(?:\.\d+)?px)[^;\"]*", r"\1 var(--font)", svg)
    for variable, color in COLORS.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg
