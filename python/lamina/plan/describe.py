"""A plan as people read it: what each step computes, on what, where it lies, and what it takes."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lamina import _C
from lamina.plan.cost import flops, precision
from lamina.plan.lowering import LOWERINGS
from lamina.plan.program import Call, Program, Segment
from lamina.plan.record import Recording, Ref, Step, TorchCall, refs_of

_RUNS = 7
# The best of several probes counts: what else wants the cores makes some of them slow.
_PROBES = 4
_PROBE_SECONDS = 0.01
# Bytes that a reading probe goes through: as many as the plan, but within these.
_LEAST_READ, _MOST_READ = 1 << 17, 64 << 20


@dataclass(frozen=True)
class StepProfile:
    """One step: what it is, where it comes from, what it takes.

    seconds: median; isa: of the kernel, "" for a call of torch; flops, bytes: of one run, 0 where they are not known;
    of_peak: share of what this machine computes at most in that precision, or reads at most where a plan of this size
    lies, in a cache or in memory; whichever is nearer, measured in the same run.
    """

    op: str
    module: str
    what: str
    seconds: float
    isa: str
    flops: int
    bytes: int
    of_peak: float


@dataclass(frozen=True)
class Profile:
    """All steps of a plan; seconds: of a whole run, of which steps take most; threads: torch's setting."""

    steps: tuple[StepProfile, ...]
    seconds: float
    threads: int

    @property
    def in_segments(self) -> float:
        """The share of the steps' time that lamina's own take."""
        total = sum(step.seconds for step in self.steps)
        return sum(step.seconds for step in self.steps if step.isa) / total if total else 1.0

    def __str__(self) -> str:
        rows = Table("#", "step", "module", "operands", "ISA", "time", "GFLOP/s", "GB/s", "of peak")
        for i, step in enumerate(self.steps):
            rows.add_row(
                str(i),
                step.op,
                step.module,
                step.what,
                step.isa or "torch",
                f"{step.seconds * 1e6:.1f} us",
                f"{step.flops / step.seconds / 1e9:.0f}" if step.flops and step.seconds else "",
                f"{step.bytes / step.seconds / 1e9:.1f}" if step.seconds else "",
                f"{step.of_peak:.0%}",
            )
        total = sum(step.seconds for step in self.steps)
        head = (
            f"{self.seconds * 1e3:.3f} ms a run on {self.threads} threads, {total * 1e3:.3f} ms in {len(self.steps)} "
            f"steps, {self.in_segments:.0%} of that in lamina's\n"
        )
        return head + _printed(rows)


@dataclass(frozen=True)
class Coverage:
    """How much of a plan is lamina's: shares of its steps and of the time they take, and what the rest is.

    left: for each op of torch's that is called between segments, how often, its share of the time, and why.
    """

    steps: float
    time: float
    left: dict[str, tuple[int, float, str]]

    def __str__(self) -> str:
        head = f"lamina's: {self.steps:.0%} of the steps, {self.time:.0%} of the time"
        rest = [f"{count} x {name} ({share:.1%} of the time): {why}" for name, (count, share, why) in self.left.items()]
        return "\n".join([head, *rest])


def covered(recording: Recording, profile: Profile) -> Coverage:
    """What a profile of a plan says about who does the work."""
    total = sum(step.seconds for step in profile.steps) or 1.0
    rest: dict[str, tuple[int, float, str]] = {}
    for step, measured in zip(recording.steps, profile.steps, strict=True):
        if isinstance(step, TorchCall):
            count, share, why = rest.get(name_of(step), (0, 0.0, _why(step)))
            rest[name_of(step)] = (count + 1, share + measured.seconds / total, why)
    return Coverage(coverage(recording), profile.in_segments, rest)


def _why(step: TorchCall) -> str:
    if step.op not in LOWERINGS:
        return "lamina has no op for it"
    given = ", ".join(_text(ref) for ref in refs_of((step.args, step.kwargs)))
    return f"lamina's op does not take these operands, {given}"


def coverage(recording: Recording) -> float:
    """The share of the steps that are lamina's."""
    own = sum(isinstance(step, Step) for step in recording.steps)
    return own / len(recording.steps) if recording.steps else 1.0


def left(recording: Recording) -> dict[str, int]:
    """The calls of torch's ops, counted by name."""
    counts: dict[str, int] = {}
    for step in recording.steps:
        if isinstance(step, TorchCall):
            counts[name_of(step)] = counts.get(name_of(step), 0) + 1
    return counts


def name_of(step: Step | TorchCall) -> str:
    return step.op if isinstance(step, Step) else str(step.op).removesuffix(".default")


def table(program: Program, inputs: Sequence[str]) -> str:
    """All steps of a program, one a line."""
    rows = Table("#", "step", "module", "operands", "layout", "result at", "bytes", "FLOP")
    number = 0
    for part in program.parts:
        for step in part.steps if isinstance(part, Segment) else [part.step]:
            result = _result_of(step)
            rows.add_row(
                str(number),
                name_of(step),
                step.module,
                operands(step),
                "" if result is None else _layout(result),
                _place(part, result),
                _count(_bytes(step)),
                _count(flops(step)),
            )
            number += 1
    recording = program.recording
    segments = sum(isinstance(part, Segment) for part in program.parts)
    calls = ", ".join(f"{count} x {name}" for name, count in left(recording).items()) or "none"
    head = (
        f"plan of {', '.join(inputs)}: {number} steps, segments: {segments}, arena: {_count(program.arena_bytes())}B, "
        f"calls of torch: {calls}\n"
    )
    return head + _printed(rows)


def profile(program: Program, inputs: Sequence[Any]) -> Profile:
    """Medians of several runs, step by step, on the machine as it is now."""
    times: list[list[tuple[float, str]]] = [program.profile(inputs) for _ in range(_RUNS + 1)][1:]
    whole = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        program.run(inputs)
        whole.append(time.perf_counter() - start)
    threads = torch.get_num_threads()
    used = {ref.buffer: ref.buffer.size for step in program.recording.steps for ref in step.refs()}
    constants = sum(size for buffer, size in used.items() if buffer.state == "constant")
    lies = min(max(constants + program.arena_bytes(), _LEAST_READ), _MOST_READ)
    peaks = {
        name: _fastest(lambda count, name=name: _C.probe_peak(name, count, _PROBE_SECONDS), threads)
        for name in {precision(s) for s in program.recording.steps}
    }
    read = _fastest(lambda count: _C.probe_read_bandwidth(max(lies, 1024 * count), count, _PROBE_SECONDS), threads)
    steps = []
    for i, step in enumerate(program.recording.steps):
        seconds, isa = statistics.median(t[i][0] for t in times), times[-1][i][1]
        computed = flops(step) / seconds / (peaks[precision(step)] * 1e9) if peaks[precision(step)] else 0.0
        moved = _bytes(step) / seconds / (read * 1e9)
        steps.append(
            StepProfile(
                name_of(step),
                step.module,
                operands(step),
                seconds,
                isa,
                flops(step),
                _bytes(step),
                min(1.0, max(computed, moved)),
            )
        )
    return Profile(tuple(steps), statistics.median(whole), threads)


def _fastest(probe: Callable[[int], float], threads: int) -> float:
    # Threads that wait for a busy core do less than one alone, which the machine can do anyway.
    return max(probe(count) for count in {1, threads} for _ in range(_PROBES))


def operands(step: Step | TorchCall) -> str:
    """The forms of the tensors that a step reads and writes, weights left out: "[1, 128, 768] -> [1, 128, 3072]"."""
    refs = [ref for ref in step.refs() if ref.buffer.state == "live"]
    result = _result_of(step)
    given = [_text(ref) for ref in refs if result is None or ref.place() != result.place()]
    return f"{', '.join(dict.fromkeys(given))} -> {'' if result is None else _text(result)}"


def _result_of(step: Step | TorchCall) -> Ref | None:
    """The output of a step: functions of csrc/ops take it last."""
    if isinstance(step, TorchCall):
        return next((ref for ref in step.outputs if ref is not None), None)
    refs = [ref for ref in step.refs() if ref.buffer.state == "live"]
    return refs[-1] if refs else None


def _text(ref: Ref) -> str:
    name = {"float32": "", "bfloat16": "bf16", "float16": "f16"}.get(str(ref.dtype).removeprefix("torch."))
    return f"{str(ref.dtype).removeprefix('torch.') if name is None else name}{list(ref.shape)}"


def _layout(ref: Ref) -> str:
    like = torch.empty_strided(ref.shape, ref.strides, dtype=ref.dtype, device="meta")
    if like.is_contiguous():
        return "contiguous"
    return "channels_last" if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last) else "strided"


def _place(part: Segment | Call, result: Ref | None) -> str:
    if result is None:
        return ""
    if isinstance(part, Segment) and result.buffer in part.offsets:
        return f"arena + {part.offsets[result.buffer] + result.offset}"
    return "torch" if isinstance(part, Call) else "output"


def _bytes(step: Step | TorchCall) -> int:
    """Of all operands, each place counted once."""
    return sum(_size(ref) for ref in {ref.place(): ref for ref in step.refs()}.values())


def _size(ref: Ref) -> int:
    return ref.numel * ref.dtype.itemsize


def _count(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{unit}" if unit else f"{number:g}"
        number /= 1000
    return f"{number:.3g}T"


def _printed(rows: Table) -> str:
    console = Console(file=StringIO(), width=170)
    console.print(rows)
    return console.file.getvalue()
