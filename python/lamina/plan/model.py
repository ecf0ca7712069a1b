"""A whole model as a plan: called without its code, saved, loaded, looked at.

plan = lamina.make_plan(model, (x,))
y = plan(x)
plan.save("model.plan.safetensors")
y = lamina.load_plan("model.plan.safetensors")(x)
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lamina import _C
from lamina.compile import compile_
from lamina.compile.lower import Lowered, recorded
from lamina.errors import FormatError, PlanError
from lamina.plan.describe import Coverage, Profile, coverage, covered, profile, table
from lamina.plan.file import read, write
from lamina.plan.program import Program, picker
from lamina.plan.record import Refused, TorchCall
from lamina.plan.structure import build, form_of, named_tensors, named_values
from lamina.running import ExampleInputs, copied


@dataclass(frozen=True)
class PlanInput:
    """A tensor that a plan takes: its name in the model's call, and what it must be."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {_text(self.dtype, self.shape)}"


class Plan:
    """A model as one list of calls of compiled functions, with all memory planned; made by `make_plan` or `load_plan`.

    Called as the model was, with tensors of the sizes it was made for; values that are no tensors may be left out, and
    are what they were then. The result is the model's: tensors, tuples, lists, and dicts in place of mappings and
    output classes. A cache of keys and values may be given as an object or as tuples, and is given back as tuples, one
    for each layer; the one that was given stays as it was. Safe to call from several threads at once. No gradients.

    Weights are those of the model, not copies, where they are used as they are; of those that are packed the plan has a
    copy. Do not train the model on beside it. A saved plan has weights of its own.

    inputs: what it takes.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[PlanInput],
        order: Sequence[int],
        form: Mapping[str, Any],
        parameters: Sequence[str],
        values: Mapping[str, Any],
    ) -> None:
        self._program = program
        self._form = dict(form)
        # For each input of the recorded graph, which of `inputs` it is, or -1 for a weight, which needs none.
        self._order = list(order)
        self._take = picker([order[i] for i in program.live])
        self.inputs = tuple(inputs)
        self._parameters = list(parameters)
        self._values = dict(values)
        # Which of the program's results the plan's is, where it is just one tensor.
        only = form.get("tensor")
        self._only = only if only is not None and only < len(program.recording.outputs) else None
        self._plain = [i.name for i in self.inputs] == self._parameters[: len(self.inputs)]
        self._guard = _C.Guard([torch.empty_strided(i.shape, i.strides, dtype=i.dtype) for i in self.inputs])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plan. Raises PlanError for inputs that it was not made for."""
        given = args if not kwargs and self._as_made_for(args) else self._given(args, kwargs)
        tensors = self._program.run(self._take(given))
        if self._only is not None:
            return tensors[self._only]
        return build(self._form, [*tensors, *given])

    def save(self, path: str | Path) -> None:
        """Write the plan, weights and all, to one safetensors file that `load_plan` reads.

        The file appears whole or not at all.

        >>> plan.save("model.plan.safetensors")
        """
        recording = self._program.recording
        write(Path(path), recording, self.inputs, self._order, self._form, self._parameters, self._values)

    def profile(self, *args: Any, **kwargs: Any) -> Profile:
        """What each step takes: medians of several runs on these inputs, and how near that is to the machine's limits.

        >>> print(plan.profile(x))
        """
        given = self._given(args, kwargs)
        return profile(self._program, self._take(given))

    @property
    def coverage(self) -> float:
        """The share of the calls that are lamina's own; the others are torch's, between two segments."""
        return coverage(self._program.recording)

    def covered(self, *args: Any, **kwargs: Any) -> Coverage:
        """How much of the steps and of the time is lamina's on these inputs, and why the rest stays in torch.

        >>> print(plan.covered(x))
        """
        return covered(self._program.recording, self.profile(*args, **kwargs))

    def __str__(self) -> str:
        return table(self._program, [str(i) for i in self.inputs])

    def _as_made_for(self, args: tuple) -> bool:
        """Whether the arguments are the inputs, one tensor for each name."""
        return (
            self._plain
            and len(args) == len(self.inputs)
            and all(isinstance(argument, Tensor) for argument in args)
            and self._guard.fits(args)
        )

    def _check(self, values: Mapping[str, Any]) -> None:
        """Raises PlanError for a plain value other than the one that the plan was made with."""
        for name, value in values.items():
            made_for = self._values.get(name)
            if type(value) is not type(made_for) or value != made_for:
                those = repr(made_for) if name in self._values else "the model's default"
                raise PlanError(f"plan: {name} is {value!r}, but this plan was made for {those}")

    def _given(self, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
        if len(args) > len(self._parameters):
            raise PlanError(f"plan: {len(args)} arguments were given, but it takes {', '.join(self._parameters)}")
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        named = named_tensors(arguments)
        if len(named) < len(arguments):
            self._check(named_values(arguments))
        try:
            given = [named.pop(i.name) for i in self.inputs]
        except KeyError as missing:
            raise PlanError(f"plan: the input '{missing.args[0]}' is not given") from None
        if named:
            raise PlanError(
                f"plan: there is no input '{next(iter(named))}'; it takes {', '.join(map(str, self.inputs))}"
            )
        if not self._guard.fits(given):
            for i, tensor in zip(self.inputs, given, strict=True):
                if (tensor.dtype, tuple(tensor.shape)) != (i.dtype, i.shape):
                    raise PlanError(
                        f"plan: {i.name} is {_text(tensor.dtype, tensor.shape)}, but this plan was made for "
                        f"{_text(i.dtype, i.shape)}; make one for it with lamina.make_plan"
                    )
            given = [_as_strided_as(i, tensor) for i, tensor in zip(self.inputs, given, strict=True)]
        return given


def make_plan(model: nn.Module, example_inputs: ExampleInputs, *, options: Mapping[str, Any] | None = None) -> Plan:
    """A plan of `model` for inputs of the sizes of `example_inputs`.

    The model is captured and fused as by `torch.compile(model, backend="lamina")`, runs once, and what it called is the
    plan. Layers that were swapped or accelerated before stay as they are; the model itself is not changed.

    Args:
        model: in eval mode, on the CPU.
        example_inputs: tuple of positional or dict of keyword arguments.
        options: as of the compile backend: {"config": lamina.Int8Dynamic()} makes linear layers int8.

    Raises CaptureError if Dynamo cannot capture the model, PlanError if it is in training mode, is not one graph (its
    control flow hangs on data), writes to its inputs or buffers, or gives what a plan cannot.

    >>> plan = lamina.make_plan(model, (x,)); print(plan)
    """
    if any(module.training for module in model.modules() if isinstance(module, _BatchNorm | _DropoutNd)):
        raise PlanError("plan: the model is in training mode, where it changes with each call; call model.eval() first")
    arguments = _by_parameter(model, example_inputs)
    before = model._compiled_call_impl
    with torch.inference_mode(False), torch.no_grad():
        try:
            compile_(model, copied(example_inputs), options=options, dynamic=False)
            inputs = copied(arguments)
            named, values = named_tensors(inputs), named_values(inputs)
            with recorded() as calls:
                result = model(**inputs) if isinstance(example_inputs, Mapping) else model(*inputs.values())
        finally:
            model._compiled_call_impl = before
        return _plan_of(model, calls, named, named_tensors(inputs), result, list(inputs), values)


def load_plan(path: str | Path) -> Plan:
    """A plan that `Plan.save` wrote. It needs neither the model's code nor torch.compile, and gives the same bits.

    Raises FileNotFoundError, and FormatError for a file that is truncated, damaged, no plan, or from a newer lamina.

    >>> plan = lamina.load_plan("model.plan.safetensors"); y = plan(x)
    """
    recording, inputs, order, form, parameters, values = read(Path(path))
    try:
        program = Program(recording, _C.ArenaPool())
    except Refused as refusal:
        raise FormatError(f"{Path(path).name} is a damaged plan: {refusal}") from refusal
    return Plan(program, [PlanInput(*i) for i in inputs], order, form, parameters, values)


def _plan_of(
    model: nn.Module,
    calls: list[tuple[Lowered, tuple, Any]],
    named: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    result: Any,
    parameters: Sequence[str],
    values: Mapping[str, Any],
) -> Plan:
    """named, after: the tensors among the arguments before and after the call; values: those that are no tensors."""
    name = type(model).__name__
    if len(calls) != 1 or not (calls[0][0].whole or calls[0][0].updates):
        raise PlanError(
            f"plan: {name} is not one graph: its forward calls what Dynamo does not read, or branches on data; "
            "torch.compile and accelerate take it all the same"
        )
    lowered, given, outputs = calls[0]
    if any(isinstance(value, int) for value in given):
        raise PlanError(f"plan: {name} takes plain numbers that vary; give them as tensors")
    given_back = {id(tensor) for tensor in named_tensors({"": result}).values()}
    for argument, tensor in after.items():
        if named.get(argument) is not tensor and id(tensor) not in given_back:
            raise PlanError(f"plan: {name} sets {argument} in its arguments to what is no part of its result")
    number_of = {id(tensor): i for i, tensor in enumerate(named.values())}
    order = [number_of.get(id(value), -1) for value in given]
    static = lowered.static
    unknown = [i for i, number in enumerate(order) if number < 0 and i not in static]
    if unknown:
        raise PlanError(f"plan: {name} reads a tensor that is neither an argument nor one of its parameters or buffers")
    entry = lowered.specialize(given)
    if entry.program is None:
        raise PlanError(f"plan: {name}: {entry.reason}")
    for call in entry.program.recording.steps:
        if isinstance(call, TorchCall) and torch.Tag.nondeterministic_seeded in call.op.tags:
            raise PlanError(f"plan: {name} draws random numbers ({call.op}); call model.eval() first")
    order += [-1] * (len(entry.program.recording.inputs) - len(order))
    leaves = list(outputs)
    tensors = {id(leaf): i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    tensors |= {id(tensor): len(leaves) + i for i, tensor in enumerate(named.values()) if id(tensor) not in tensors}
    form = form_of(result, lambda tensor: tensors.get(id(tensor)))
    used = [PlanInput(n, t.dtype, tuple(t.shape), tuple(t.stride())) for n, t in named.items()]
    return Plan(entry.program, used, order, form, parameters, values)


def _by_parameter(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Any]:
    if isinstance(example_inputs, Mapping):
        return dict(example_inputs)
    if not isinstance(example_inputs, tuple):
        raise TypeError(
            "make_plan: example_inputs must be a tuple of positional or a dict of keyword arguments, got "
            f"{type(example_inputs).__name__}; wrap a single tensor as (x,)"
        )
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)]
    names += [f"argument{i}" for i in range(len(names), len(example_inputs))]
    return dict(zip(names, example_inputs, strict=False))


def _text(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _as_strided_as(like: PlanInput, tensor: Tensor) -> Tensor:
    """The same values, lying as the plan expects them."""
    if tuple(tensor.stride()) == like.strides:
        return tensor
    return torch.empty_strided(like.shape, like.strides, dtype=like.dtype).copy_(tensor)
