"""Chains of arithmetic in a recording, each as one step: what lies between them never leaves the first-level cache."""

from collections import Counter
from typing import Any

import torch

from lamina.ops.elementwise import TRUTHS, elementwise_program, instructions
from lamina.plan.record import Buffer, Recording, Ref, Step, TorchCall

# Of one step: more would not fit in the cache side by side.
_MOST_INPUTS = 12
_MOST_INSTRUCTIONS = 48


def fuse_chains(recording: Recording) -> None:
    """Joins an elementwise step with the one that alone reads its result, where both go through the same elements."""
    uses = Counter(ref.buffer for step in recording.steps for ref in step.refs())
    uses.update(ref.buffer for ref in recording.outputs if ref is not None)
    writers: dict[Buffer, Step] = {}
    gone: set[int] = set()
    for step in recording.steps:
        if isinstance(step, TorchCall):
            if step.op._schema.is_mutable:  # what was read before is something else now
                writers.clear()
            continue
        if step.op != "elementwise":
            continue
        for ref in list(step.arguments[0]):
            first = writers.get(ref.buffer)
            if first is not None and uses[ref.buffer] == 2 and _joinable(first, step, ref):
                step.arguments = _joined(first, step, ref)
                gone.add(id(first))
        writers[step.arguments[3].buffer] = step
    recording.steps = [step for step in recording.steps if id(step) not in gone]


def _joinable(first: Step, second: Step, between: Ref) -> bool:
    inputs, program, _, out = first.arguments
    target = second.arguments[3]
    if between.place() != out.place() or (out.shape, out.strides) != (target.shape, target.strides):
        return False
    # A result that was rounded, or made a truth, on its way through memory must be so in between as well.
    last = instructions(program)[-1][0]
    if not (out.dtype is torch.float32 or (out.dtype is torch.bool and last in TRUTHS)):
        return False
    count = (len(program) + len(second.arguments[1])) // 4
    return count <= _MOST_INSTRUCTIONS and len(inputs) + len(second.arguments[0]) - 1 <= _MOST_INPUTS


def _joined(first: Step, second: Step, between: Ref) -> list[Any]:
    """The arguments of a step that does both."""
    inputs: list[Ref] = []
    constants: list[float] = []
    steps: list[tuple[str, list[tuple[str, int]]]] = []

    def add(step: Step, replaced: Ref | None, replacement: tuple[str, int] | None) -> tuple[str, int]:
        given, program, numbers, _ = step.arguments
        operands: list[tuple[str, int]] = []
        for ref in given:
            if replaced is not None and ref.place() == replaced.place():
                operands.append(replacement)
                continue
            place = next((i for i, known in enumerate(inputs) if known.place() == ref.place()), len(inputs))
            if place == len(inputs):
                inputs.append(ref)
            operands.append(("input", place))
        for number in numbers:
            if number not in constants:
                constants.append(number)
            operands.append(("constant", constants.index(number)))
        for name, *used in instructions(program):
            steps.append((name, [operands[i] for i in used]))
            operands.append(("step", len(steps) - 1))
        return operands[-1]

    add(second, between, add(first, None, None))
    start = {"input": 0, "constant": len(inputs), "step": len(inputs) + len(constants)}
    program = elementwise_program([(name, *(start[kind] + i for kind, i in used)) for name, used in steps])
    return [inputs, list(program), constants, second.arguments[3]]
