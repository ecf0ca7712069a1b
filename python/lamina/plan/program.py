"""A recording as something that runs: segments of steps, one call of `_C.Plan` each, and torch's ops between them.

Most of a recording's memory is needed inside one segment only and lies in its arena. What leaves a segment (outputs,
and what torch's ops read or write) is allocated through torch at each run, so that it may outlive the run. Constants
keep the addresses they have.
"""

import functools
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lamina import _C
from lamina.plan.memory import Need, layout
from lamina.plan.record import Buffer, Recording, Ref, Refused, Step, TorchCall

_DTYPE_NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    )
}


@dataclass
class Segment:
    """Steps one after the other.

    plan: over the arena, the constants and the tensors in `slots`; allocate: (slot, how) of what it makes; release:
    slots that nothing reads afterwards.
    """

    steps: list[Step]
    plan: Any
    arena: int
    offsets: dict[Buffer, int]
    slots: list[int]
    allocate: list[tuple[int, Callable[[], Tensor]]]
    release: list[int]


@dataclass
class Call:
    """A call of one of torch's ops; arguments: from the slots; outputs: (which of its results, slot)."""

    step: TorchCall
    arguments: Callable[[list[Tensor | None]], tuple[tuple, dict[str, Any]]]
    outputs: list[tuple[int, int]]
    allocate: list[tuple[int, Callable[[], Tensor]]]
    release: list[int]

    def run(self, slots: list[Tensor | None]) -> None:
        args, kwargs = self.arguments(slots)
        out = self.step.op(*args, **kwargs)
        leaves = out if isinstance(out, tuple | list) else (out,)
        for which, slot in self.outputs:
            slots[slot] = leaves[which]


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple]:
    """The function that takes the items at these positions out of a sequence."""
    if len(positions) == 1:
        only = positions[0]
        return lambda items: (items[only],)
    return operator.itemgetter(*positions) if positions else lambda items: ()


class Program:
    """Runs on the tensors that the inputs at the positions `live` are, in that order; gives the leaves of the result.

    take: those out of all inputs of the recorded graph. Safe to call from several threads at once.
    """

    def __init__(self, recording: Recording, pool: Any) -> None:
        self.recording = recording
        self._pool = pool
        self._uses = _uses(recording)
        self.live = [i for i, b in enumerate(recording.inputs) if b is not None and b.state == "live"]
        self.take = picker(self.live)
        self._slots: dict[Buffer, int] = {recording.inputs[i]: slot for slot, i in enumerate(self.live)}
        self._count = len(self.live)
        groups = _groups(recording.steps)
        self._place_outside(groups)
        self.parts: list[Segment | Call] = []
        first = 0
        for group in groups:
            self.parts.append(self._call(group, first) if isinstance(group, TorchCall) else self._segment(group, first))
            first += 1 if isinstance(group, TorchCall) else len(group)
        self._results = [self._result(ref) for ref in recording.outputs]
        self._empty: list[Any] = [None] * (self._count - len(self.live))
        self._run_at_once = self._in_one_call()

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        if self._run_at_once is not None:
            return self._run_at_once(tensors)
        slots = [*tensors, *self._empty]
        for part in self.parts:
            for slot, make in part.allocate:
                slots[slot] = make()
            if type(part) is Segment:
                part.plan.run([slots[i] for i in part.slots])
            else:
                part.run(slots)
            for slot in part.release:
                slots[slot] = None
        return [result(slots) for result in self._results]

    def _in_one_call(self) -> Callable[[Sequence[Tensor]], list[Tensor]] | None:
        """The run of a program that is one segment and gives what it allocates, whole: a microsecond less."""
        if len(self.parts) != 1 or not isinstance(self.parts[0], Segment):
            return None
        segment = self.parts[0]
        outputs = [ref.buffer for ref in self.recording.outputs if ref is not None and _is_whole(ref)]
        made = [slot for slot, _ in segment.allocate]
        if [self._slots.get(buffer) for buffer in outputs] != made or len(outputs) != len(self.recording.outputs):
            return None
        if [slot for slot in segment.slots if slot >= len(self.live)] != made:
            return None
        given = picker([slot for slot in segment.slots if slot < len(self.live)])
        makers = [make for _, make in segment.allocate]
        run = segment.plan.run

        def run_at_once(tensors: Sequence[Tensor]) -> list[Tensor]:
            results = [make() for make in makers]
            run((*given(tensors), *results))
            return results

        return run_at_once

    def profile(self, tensors: Sequence[Tensor]) -> list[tuple[float, str]]:
        """Seconds of each step and the instruction set of its kernel, "" for a call of torch's; runs once."""
        times: list[tuple[float, str]] = []
        slots = [*tensors, *self._empty]
        for part in self.parts:
            for slot, make in part.allocate:
                slots[slot] = make()
            if isinstance(part, Segment):
                times += part.plan.profile([slots[i] for i in part.slots])
            else:
                start = time.perf_counter()
                part.run(slots)
                times.append((time.perf_counter() - start, ""))
        return times

    def arena_bytes(self) -> int:
        return max((part.arena for part in self.parts if isinstance(part, Segment)), default=0)

    def _place_outside(self, groups: list[list[Step] | TorchCall]) -> None:
        """A slot for everything that does not stay inside one segment."""
        seen: dict[Buffer, int] = {}
        outside: dict[Buffer, None] = {}
        for number, group in enumerate(groups):
            refs = group.refs() if isinstance(group, TorchCall) else [ref for step in group for ref in step.refs()]
            for ref in refs:
                if (
                    isinstance(group, TorchCall)
                    or seen.setdefault(ref.buffer, number) != number
                    or ref.buffer.initial is not None
                ):
                    outside[ref.buffer] = None
        for ref in self.recording.outputs:
            if ref is not None:
                outside[ref.buffer] = None
        for buffer in outside:
            if buffer.state == "live" and buffer not in self._slots:
                self._slots[buffer] = self._count
                self._count += 1

    def _new_slots(self, refs: list[Ref], first: int) -> list[tuple[int, Callable[[], Tensor]]]:
        """What has to be allocated before steps from `first` on that are the first to use it."""
        new = {
            ref.buffer: None
            for ref in refs
            if ref.buffer in self._slots and ref.buffer.source is None and not ref.buffer.made
        }
        return [(self._slots[buffer], _maker(buffer)) for buffer in new if self._uses[buffer][0] >= first]

    def _released(self, refs: list[Ref], last: int) -> list[int]:
        kept = {ref.buffer for ref in self.recording.outputs if ref is not None}
        done = {ref.buffer: None for ref in refs if ref.buffer in self._slots and ref.buffer not in kept}
        return [self._slots[buffer] for buffer in done if buffer.source is None and self._uses[buffer][1] <= last]

    def _segment(self, steps: list[Step], first: int) -> Segment:
        refs = [ref for step in steps for ref in step.refs()]
        buffers = list(dict.fromkeys(ref.buffer for ref in refs))
        constants = [buffer for buffer in buffers if buffer.state == "constant"]
        given = sorted((buffer for buffer in buffers if buffer in self._slots), key=self._slots.__getitem__)
        inner = [buffer for buffer in buffers if buffer.state == "live" and buffer not in self._slots]
        offsets, arena = layout([Need(buffer.size, *self._uses[buffer]) for buffer in inner])
        place = {buffer: (0, offset) for buffer, offset in zip(inner, offsets, strict=True)}
        place |= {buffer: (i, 0) for i, buffer in enumerate(constants + given, start=1)}

        def operand(ref: Ref) -> Any:
            number, offset = place[ref.buffer]
            if ref.dtype not in _DTYPE_NAMES:
                raise Refused(f"a tensor is {ref.dtype}, which no op of lamina takes")
            return _C.Operand(number, offset + ref.offset, _DTYPE_NAMES[ref.dtype], ref.shape, ref.strides)

        plan = _C.Plan(
            self._pool,
            [arena, *(buffer.size for buffer in constants + given)],
            [buffer.whole() for buffer in constants],
            [(step.op, tree_map(lambda a: operand(a) if isinstance(a, Ref) else a, step.arguments)) for step in steps],
        )
        return Segment(
            steps,
            plan,
            arena,
            dict(zip(inner, offsets, strict=True)),
            [self._slots[buffer] for buffer in given],
            self._new_slots(refs, first),
            self._released(refs, first + len(steps) - 1),
        )

    def _call(self, step: TorchCall, first: int) -> Call:
        refs = step.refs()
        made = [(i, self._slots[ref.buffer]) for i, ref in enumerate(step.outputs) if ref is not None]
        given = tree_map(lambda a: self._taken(a) if isinstance(a, Ref) else _Plain(a), (step.args, step.kwargs))

        def arguments(slots: list[Tensor | None]) -> tuple[tuple, dict[str, Any]]:
            return tree_map(lambda take: take(slots), given)

        return Call(step, arguments, made, self._new_slots(refs, first), self._released(refs, first))

    def _taken(self, ref: Ref) -> Callable[[list[Tensor | None]], Tensor]:
        """A tensor from the slots, or a constant."""
        if ref.buffer.state != "live":
            tensor = _view(ref.buffer.tensor, ref, 0)
            return lambda slots: tensor
        slot = self._slots[ref.buffer]
        if _is_whole(ref):
            return lambda slots: slots[slot]
        return lambda slots: _view(slots[slot], ref, slots[slot].storage_offset())

    def _result(self, ref: Ref | None) -> Callable[[list[Tensor | None]], Tensor | None]:
        if ref is None:
            return lambda slots: None
        take = self._taken(ref)
        # A constant that the caller may write to is not given away.
        return take if ref.buffer.state == "live" else lambda slots: take(slots).clone()


class _Plain:
    """A value that is the same in every run, for tree_map to call."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self, slots: Any) -> Any:
        return self._value


def _uses(recording: Recording) -> dict[Buffer, tuple[int, int]]:
    """The first and the last step that uses a buffer."""
    uses: dict[Buffer, tuple[int, int]] = {}
    for i, step in enumerate(recording.steps):
        for ref in step.refs():
            uses[ref.buffer] = (uses.get(ref.buffer, (i, i))[0], i)
    return uses


def _groups(steps: list[Step | TorchCall]) -> list[list[Step] | TorchCall]:
    groups: list[list[Step] | TorchCall] = []
    for step in steps:
        if isinstance(step, TorchCall):
            groups.append(step)
        elif groups and isinstance(groups[-1], list):
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _is_whole(ref: Ref) -> bool:
    """Whether a tensor is a buffer as it was made."""
    made = ref.buffer.tensor
    return ref.offset == 0 == made.storage_offset() and (ref.dtype, ref.shape, ref.strides) == (
        made.dtype,
        tuple(made.shape),
        tuple(made.stride()),
    )


def _view(base: Tensor, ref: Ref, start: int) -> Tensor:
    """A tensor in the memory of `base`; start: where the buffer begins in there, in elements of `base`."""
    if base.dtype is ref.dtype:
        return base.as_strided(ref.shape, ref.strides, start + ref.offset // ref.dtype.itemsize)
    offset = (start * base.element_size() + ref.offset) // ref.dtype.itemsize
    return torch.empty(0, dtype=ref.dtype).set_(base.untyped_storage(), offset, ref.shape, ref.strides)


def _maker(buffer: Buffer) -> Callable[[], Tensor]:
    if buffer.initial is not None:
        return buffer.initial.clone
    made = buffer.tensor
    shape, strides, dtype = tuple(made.shape), tuple(made.stride()), made.dtype
    return functools.partial(torch.empty_strided, shape, strides, dtype=dtype)
