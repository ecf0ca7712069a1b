"""A plan as a picture: its steps in time, as inline SVG whose colours are the page's CSS variables."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from lamina.bench import text

# What a step is, for its colour: variable of the page -> ops. All others only move or reshape values.
KINDS: Mapping[str, tuple[str, str]] = {
    "matrix product": ("accent", "linear"),
    "convolution": ("second", "conv2d"),
    "attention": ("third", "attention"),
    "recurrent layer": ("fifth", "lstm gru rnn_tanh rnn_relu"),
    "norm or softmax": ("fourth", "norm softmax"),
    "moving and pooling": ("even", ""),
    "PyTorch's own op": ("loss", ""),
}
MOVING, TORCH = "moving and pooling", "PyTorch's own op"

# Units of the picture, which is as wide as the page's column: a strip of all steps with its axis below, then the rows,
# a line of text and a bar below it each, with theirs.
WIDTH, LABELS, TOTALS = 960, 190, 52
STRIP, ROW, BAR, AXIS = 22, 38, 17, 30
CHARACTER = 6.1
# So many rows can be looked at together; a plan with more steps has a row a block of layers.
MOST_ROWS = 14


def kind(step: Mapping[str, Any]) -> str:
    """What a step of a profile is. Example: `kind({"op": "int8_linear", "isa": "avx2"}) == "matrix product"`."""
    if not step["isa"]:
        return TORCH
    return next(
        (name for name, (_, ops) in KINDS.items() if any(part in step["op"] for part in ops.split())),
        MOVING,
    )


def draw(steps: Sequence[Mapping[str, Any]]) -> str:
    """All steps in a strip, and again enlarged: a row each module or block, read like lines of text.

    A bar is as wide as its step's time and filled as high as its share of peak. steps: as in
    lamina.plan.describe.StepProfile, in order.
    """
    rows = _rows(steps)
    total = _seconds(steps)
    longest = max((_seconds(members) for _, members in rows), default=0.0)
    room = WIDTH - LABELS - TOTALS
    height = STRIP + AXIS + len(rows) * ROW + AXIS
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" class="timeline">']
    parts += _axis(total, room, 0, STRIP)
    parts += _line("all of it", steps, total, (total, room), 0, STRIP, labels=False)
    top = STRIP + AXIS
    parts += _axis(longest, room, top, top + len(rows) * ROW)
    for number, (name, members) in enumerate(rows):
        parts += _line(name, members, total, (longest, room), top + number * ROW, ROW, labels=True)
    return "".join([*parts, "</svg>"])


def _line(
    name: str,
    steps: Sequence[Mapping[str, Any]],
    total: float,
    scale: tuple[float, float],
    y: float,
    height: float,
    labels: bool,
) -> list[str]:
    """One row of bars, one after the other; scale: so many seconds are so many units."""
    middle = y + height - BAR / 2 + 4
    share = text.percent(_seconds(steps) / total if total else 0.0)
    parts = [_text(LABELS - 12, middle, _shortened(name, LABELS - 16), "name", end=True)]
    start = 0.0
    for step in steps:
        x, width = (seconds / scale[0] * scale[1] if scale[0] else 0.0 for seconds in (start, step["seconds"]))
        # Behind the last bar there is room for words.
        room = 0.0 if not labels else width if step is not steps[-1] else WIDTH - TOTALS - LABELS - x
        parts += _bar(step, LABELS + x, y + height - BAR, width, room)
        start += step["seconds"]
    return [*parts, _text(WIDTH, middle, share, "muted", end=True)]


def _seconds(steps: Sequence[Mapping[str, Any]]) -> float:
    return sum(step["seconds"] for step in steps)


def shares(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    """For each kind of step that occurs: its name, its colour, its share of the time."""
    total = _seconds(steps)
    found = {name: _seconds([step for step in steps if kind(step) == name]) for name in KINDS}
    occurring = {kind(step) for step in steps}
    return [(name, KINDS[name][0], found[name] / total if total else 0.0) for name in KINDS if name in occurring]


def _rows(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Neighbours of one module, or of one block where that would be too many."""
    names: list[str] = []
    for step in steps:
        # A step of no module belongs to what comes before it.
        names.append(step["module"] or (names[-1] if names else "the model"))
    for depth in (None, *range(max((name.count(".") for name in names), default=0) + 1, 0, -1)):
        labels = [name if depth is None else ".".join(name.split(".")[:depth]) for name in names]
        rows = [
            (label, [step for _, step in members])
            for label, members in groupby(zip(labels, steps, strict=True), key=lambda pair: pair[0])
        ]
        if len(rows) <= MOST_ROWS:
            return rows
    return rows


def _bar(step: Mapping[str, Any], x: float, top: float, width: float, room: float) -> list[str]:
    """A bar with its words above, those that find room; all of them when it is pointed at."""
    color = KINDS[kind(step)][0]
    # A gap between neighbours, where there is room for one.
    width = max(width - 1.0, 0.6 * width, 0.3)
    filled = BAR * min(1.0, step["of_peak"])
    told = (
        f"{step['op']} {step['module']}\n{step['what']}\n{text.duration(step['seconds'])}, "
        f"{text.percent(step['of_peak'])} of peak, {step['isa'] or 'PyTorch'}"
    )
    parts = [
        f"<g><title>{escape(told)}</title>"
        f'<rect x="{x:.2f}" y="{top:.1f}" width="{width:.2f}" height="{BAR}" fill="var(--{color})" opacity=".26"/>'
        f'<rect x="{x:.2f}" y="{top + BAR - filled:.2f}" width="{width:.2f}" height="{filled:.2f}" '
        f'fill="var(--{color})"/>'
    ]
    label = next((words for words in _labels(step) if len(words) * CHARACTER <= room), None)
    if label:
        parts.append(_text(x, top - 5, label, "muted"))
    return [*parts, "</g>"]


def _labels(step: Mapping[str, Any]) -> list[str]:
    time = text.duration(step["seconds"])
    return [f"{step['op']} {time}, {text.percent(step['of_peak'])}", f"{step['op']} {time}", step["op"], time]


def _axis(seconds: float, room: float, top: float, bottom: float) -> list[str]:
    parts = []
    tick = _tick(seconds)
    for i in range(int(seconds / tick + 1e-9) + 1 if tick else 0):
        x = LABELS + i * tick / seconds * room
        parts.append(f'<path d="M{x:.1f} {top}V{bottom + 5:.1f}" stroke="var(--line)"/>')
        words = text.duration(i * tick) if i else "0"
        parts.append(_text(x, bottom + 16, words.replace(".00 ", " ").replace(".0 ", " "), "muted", middle=True))
    return parts


def _tick(total: float) -> float:
    """A round number of seconds, four to ten of which make the total."""
    if total <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(total))
    return next(power * share for share in (0.2, 0.5, 1.0) if total / (power * share) <= 10)


def _text(x: float, y: float, words: str, style: str, *, end: bool = False, middle: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ' text-anchor="middle"' if middle else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}"{anchor}>{escape(words)}</text>'


def _shortened(name: str, room: float) -> str:
    """The end of a dotted name says most."""
    most = int(room / CHARACTER)
    return name if len(name) <= most else f"…{name[1 - most :]}"
