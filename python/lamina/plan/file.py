"""A plan as a file: one safetensors file whose tensors are the constants, and whose JSON is the recording.

Buffers and steps refer to each other by number. A tensor is [buffer, offset in bytes, dtype, shape, strides].
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.errors import FormatError
from lamina.plan.record import Buffer, Recording, Ref, Step, TorchCall
from lamina.serialization import load_tensors, save_tensors

# Raised whenever a step's function takes other arguments, or a packed weight is laid out in another way.
VERSION = 1

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def write(
    path: Path,
    sized: Sequence[tuple[Recording, Sequence[Any], Sequence[int]]],
    form: Mapping[str, Any],
    parameters: Sequence[str],
    values: Mapping[str, Any],
) -> None:
    """sized: for each size of inputs the recording, its PlanInputs, and which of them each input of the recording is;
    form: of the result; parameters: the names of the model's arguments; values: those that are no tensors."""
    writer = _Writer()
    content = {
        "plan": VERSION,
        "sizes": [
            {
                "inputs": [[i.name, _name(i.dtype), list(i.shape), list(i.strides)] for i in inputs],
                "order": list(order),
                "given": [None if b is None or b.state != "live" else writer.number(b) for b in recording.inputs],
                "steps": [writer.step(step) for step in recording.steps],
                "outputs": [None if ref is None else writer.ref(ref) for ref in recording.outputs],
                "plain": recording.plain,
            }
            for recording, inputs, order in sized
        ],
        "form": dict(form),
        "parameters": list(parameters),
        "values": dict(values),
    }
    content["buffers"] = [writer.described(buffer) for buffer in writer.buffers]
    save_tensors(writer.tensors, path, content)


def read(
    path: Path,
) -> tuple[list[tuple[Recording, list[tuple], list[int]]], dict[str, Any], list[str], dict[str, Any]]:
    """What `write` was given, inputs as tuples of what makes a PlanInput."""
    tensors, values = load_tensors(path)
    if "plan" not in values:
        raise FormatError(f"{path.name} is no plan that Plan.save wrote")
    if values["plan"] != VERSION:
        raise FormatError(f"{path.name} is a plan of version {values['plan']}, but this lamina reads {VERSION}")
    try:
        buffers = [_buffer(described, tensors) for described in values["buffers"]]
        sized = [_sized(size, buffers) for size in values["sizes"]]
        return sized, values["form"], values["parameters"], values["values"]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as failure:
        raise FormatError(f"{path.name} is a damaged plan: {failure}") from failure


def _sized(size: Mapping[str, Any], buffers: Sequence[Buffer]) -> tuple[Recording, list[tuple], list[int]]:
    steps = [_step(step, buffers) for step in size["steps"]]
    outputs = [None if ref is None else _ref(ref, buffers) for ref in size["outputs"]]
    given = [None if number is None else buffers[number] for number in size["given"]]
    inputs = [(name, _DTYPES[dtype], tuple(shape), tuple(strides)) for name, dtype, shape, strides in size["inputs"]]
    return Recording(steps, outputs, size["plain"], None, given), inputs, size["order"]


class _Writer:
    """Numbers buffers as they come; constants of several recordings that are the same memory are one."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.tensors: dict[str, Tensor] = {}
        self._numbers: dict[Any, int] = {}

    def number(self, buffer: Buffer) -> int:
        key = buffer if buffer.state == "live" else (buffer.start, buffer.size)
        if key not in self._numbers:
            self._numbers[key] = len(self.buffers)
            self.buffers.append(buffer)
        return self._numbers[key]

    def ref(self, ref: Ref) -> list[Any]:
        return [self.number(ref.buffer), ref.offset, _name(ref.dtype), list(ref.shape), list(ref.strides)]

    def step(self, step: Step | TorchCall) -> dict[str, Any]:
        if isinstance(step, Step):
            return {"op": step.op, "module": step.module, "arguments": self.value(step.arguments)}
        return {
            "torch": str(step.op),
            "module": step.module,
            "args": self.value(list(step.args)),
            "kwargs": {name: self.value(value) for name, value in step.kwargs.items()},
            "outputs": [None if ref is None else self.ref(ref) for ref in step.outputs],
        }

    def value(self, value: Any) -> Any:
        """Plain values as they are; what JSON has no word for as a dict with one key."""
        if isinstance(value, Ref):
            return {"ref": self.ref(value)}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        if isinstance(value, torch.dtype):
            return {"dtype": _name(value)}
        if isinstance(value, torch.layout | torch.memory_format | torch.device):
            return {type(value).__name__: str(value).removeprefix("torch.")}
        return value

    def described(self, buffer: Buffer) -> dict[str, Any]:
        if buffer.state != "live":
            # Its bytes, whatever they are seen as.
            return {"constant": self.tensor(buffer.whole())}
        made = buffer.tensor
        described = {
            "size": buffer.size,
            "like": [_name(made.dtype), list(made.shape), list(made.stride())],
            "made": buffer.made,
            "source": buffer.source,
        }
        if buffer.initial is not None:
            described["initial"] = self.tensor(buffer.initial)
        return described

    def tensor(self, tensor: Tensor) -> str:
        name = f"constant.{len(self.tensors)}"
        self.tensors[name] = tensor
        return name


def _buffer(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Buffer:
    if "constant" in described:
        tensor = tensors[described["constant"]].clone()  # a file aligns less than kernels like
        return Buffer(tensor, tensor.data_ptr(), tensor.nbytes, "constant")
    dtype, shape, strides = described["like"]
    tensor = torch.empty_strided(shape, strides, dtype=_DTYPES[dtype], device="meta")
    initial = tensors[described["initial"]] if "initial" in described else None
    return Buffer(tensor, 0, described["size"], "live", True, described["source"], described["made"], initial)


def _ref(values: Sequence[Any], buffers: Sequence[Buffer]) -> Ref:
    number, offset, dtype, shape, strides = values
    return Ref(buffers[number], offset, _DTYPES[dtype], tuple(shape), tuple(strides))


def _step(values: Mapping[str, Any], buffers: Sequence[Buffer]) -> Step | TorchCall:
    if "op" in values:
        return Step(values["op"], [_value(item, buffers) for item in values["arguments"]], values["module"])
    namespace, name, overload = values["torch"].split(".")
    if namespace != "aten":
        raise ValueError(f"it calls {values['torch']}, which is no op of torch's own")
    return TorchCall(
        getattr(getattr(torch.ops.aten, name), overload),
        tuple(_value(item, buffers) for item in values["args"]),
        {name: _value(item, buffers) for name, item in values["kwargs"].items()},
        [None if ref is None else _ref(ref, buffers) for ref in values["outputs"]],
        values["module"],
    )


def _value(value: Any, buffers: Sequence[Buffer]) -> Any:
    if isinstance(value, list):
        return [_value(item, buffers) for item in value]
    if isinstance(value, dict):
        ((what, inner),) = value.items()
        if what == "ref":
            return _ref(inner, buffers)
        if what == "device":
            return torch.device(inner)
        return _DTYPES[inner] if what == "dtype" else getattr(torch, inner)
    return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
