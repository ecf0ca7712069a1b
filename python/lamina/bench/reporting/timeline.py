"""A plan as a picture: its steps in time, as inline SVG whose colours are the page's CSS variables."""

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

# Units of the picture, which is as wide as the page's column; a row is a line of text and a bar below it.
WIDTH, LABELS, TOTALS = 992, 196, 74
TOP, ROW, BAR, AXIS = 4, 38, 17, 26
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
    """One bar a step, as wide as its time and filled as high as its share of peak; a row each module or block.

    steps: as in lamina.plan.describe.StepProfile, in order.
    """
    rows = _rows(steps)
    total = sum(step["seconds"] for step in steps)
    scale = (WIDTH - LABELS - TOTALS) / total if total else 0.0
    height = TOP + len(rows) * ROW + AXIS
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" class="timeline">']
    parts += _axis(total, scale, TOP + len(rows) * ROW)
    start = 0.0
    for number, (name, members) in enumerate(rows):
        y = TOP + number * ROW
        seconds = sum(step["seconds"] for step in members)
        middle = y + ROW - BAR / 2
        parts.append(_text(LABELS - 12, middle, _shortened(name, LABELS - 16), "name", end=True))
        parts.append(_text(WIDTH, middle, f"{text.percent(seconds / total if total else 0.0)}", "muted", end=True))
        for step in members:
            parts += _bar(step, LABELS + start * scale, y, step["seconds"] * scale)
            start += step["seconds"]
    return "".join([*parts, "</svg>"])


def shares(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    """For each kind of step that occurs: its name, its colour, its share of the time."""
    total = sum(step["seconds"] for step in steps)
    found = {name: sum(step["seconds"] for step in steps if kind(step) == name) for name in KINDS}
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


def _bar(step: Mapping[str, Any], x: float, y: float, width: float) -> list[str]:
    color = KINDS[kind(step)][0]
    top = y + ROW - BAR
    # A gap of a pixel between neighbours, where there is room for one.
    width = max(width - 1.0, 0.6 * width, 0.4)
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
    label = next(
        (words for words in _labels(step) if len(words) * CHARACTER <= width),
        None,
    )
    if label:
        parts.append(_text(x, top - 7, label, "muted"))
    return [*parts, "</g>"]


def _labels(step: Mapping[str, Any]) -> list[str]:
    time = text.duration(step["seconds"])
    return [f"{step['op']} {time}, {text.percent(step['of_peak'])}", f"{step['op']} {time}", step["op"], time]


def _axis(total: float, scale: float, bottom: float) -> list[str]:
    parts = []
    step = _tick(total)
    count = int(total / step + 1e-9) if step else 0
    for i in range(count + 1):
        x = LABELS + i * step * scale
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom + 5:.1f}" stroke="var(--line)"/>')
        parts.append(_text(x, bottom + 16, text.duration(i * step) if i else "0", "muted", middle=True))
    return parts


def _tick(total: float) -> float:
    """A round number of seconds, four to ten of which make the total."""
    if total <= 0:
        return 0.0
    power = 10.0 ** -20
    while power * 10 <= total:
        power *= 10
    return next(power * share for share in (0.2, 0.5, 1.0) if total / (power * share) <= 10)


def _text(x: float, y: float, words: str, style: str, *, end: bool = False, middle: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ' text-anchor="middle"' if middle else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}"{anchor}>{escape(words)}</text>'


def _shortened(name: str, room: float) -> str:
    """The end of a dotted name says most."""
    most = int(room / CHARACTER)
    return name if len(name) <= most else f"…{name[1 - most :]}"
