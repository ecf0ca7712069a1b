"""A whole model as a plan: called without its code, saved, loaded, looked at.

plan = lamina.make_plan(model, (x,))
y = plan(x)
plan.save("model.plan.safetensors")
y = lamina.load_plan("model.plan.safetensors")(x)
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
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

# Sizes of inputs whose programs a plan keeps; the one not used for longest goes first.
_MOST_SIZES = 8


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

    Called as the model was, with tensors of the sizes it was made for, or of any, if it was made to be dynamic: other
    sizes take a run of the model's graph once, and then go through the same weights with a layout of memory of their
    own. Values that are no tensors may be left out, and are what they were then. The result is the model's: tensors,
    tuples, lists, and dicts in place of mappings and output classes. A cache of keys and values may be given as an
    object or as tuples, and is given back as tuples, one for each layer; the one that was given stays as it was. Safe
    to call from several threads at once. No gradients.

    Weights are those of the model, not copies, where they are used as they are; of those that are packed the plan has a
    copy. Do not train the model on beside it. A saved plan has weights of its own.

    inputs: what it takes, in the sizes that it ran last.
    """

    def __init__(
        self,
        sized: Sequence["_Sized"],
        form: Mapping[str, Any],
        parameters: Sequence[str],
        values: Mapping[str, Any],
        other_sizes: Callable[[Mapping[str, Any]], "Plan"] | None = None,
    ) -> None:
        self._sized = list(sized)
        self._form = dict(form)
        self._parameters = list(parameters)
        self._values = dict(values)
        self._other_sizes = other_sizes
        first = self._sized[0]
        # Which of the program's results the plan's is, where it is just one tensor.
        only = form.get("tensor")
        self._only = only if only is not None and only < len(first.program.recording.outputs) else None
        self._plain = [i.name for i in first.inputs] == self._parameters[: len(first.inputs)]

    @property
    def inputs(self) -> tuple[PlanInput, ...]:
        return self._sized[0].inputs

    @property
    def program(self) -> Program:
        """What runs those inputs."""
        return self._sized[0].program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plan. Raises PlanError for inputs that it was not made for."""
        sized = self._sized[0]
        given: Sequence[Tensor] = args
        if kwargs or not self._as_made_for(sized, args):
            sized, given = self._given(args, kwargs)
        tensors = sized.program.run(sized.take(given))
        if self._only is not None:
            return tensors[self._only]
        return build(self._form, [*tensors, *given])

    def save(self, path: str | Path) -> None:
        """Write the plan, weights and all, to one safetensors file that `load_plan` reads.

        The file appears whole or not at all.

        >>> plan.save("model.plan.safetensors")
        """
        sized = [(s.program.recording, s.inputs, s.order) for s in self._sized]
        write(Path(path), sized, self._form, self._parameters, self._values)

    def profile(self, *args: Any, **kwargs: Any) -> Profile:
        """What each step takes: medians of several runs on these inputs, and how near that is to the machine's limits.

        >>> print(plan.profile(x))
        """
        sized, given = self._given(args, kwargs)
        return profile(sized.program, sized.take(given))

    @property
    def coverage(self) -> float:
        """The share of the calls that are lamina's own; the others are torch's, between two segments."""
        return coverage(self.program.recording)

    @property
    def arena_bytes(self) -> int:
        """The memory that what lies between the first and the last step shares; one run at a time needs it once."""
        return self.program.arena_bytes()

    def covered(self, *args: Any, **kwargs: Any) -> Coverage:
        """How much of the steps and of the time is lamina's on these inputs, and why the rest stays in torch.

        >>> print(plan.covered(x))
        """
        return covered(self.program.recording, self.profile(*args, **kwargs))

    def __str__(self) -> str:
        return table(self.program, [str(i) for i in self.inputs])

    def _as_made_for(self, sized: "_Sized", args: tuple) -> bool:
        """Whether the arguments are the inputs, one tensor for each name."""
        try:
            return self._plain and sized.guard.fits(args)
        except TypeError:  # one of them is no tensor
            return False

    def _check(self, values: Mapping[str, Any]) -> None:
        """Raises PlanError for a plain value other than the one that the plan was made with."""
        for name, value in values.items():
            made_for = self._values.get(name)
            if type(value) is not type(made_for) or value != made_for:
                those = repr(made_for) if name in self._values else "the model's default"
                raise PlanError(f"plan: {name} is {value!r}, but this plan was made for {those}")

    def _given(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple["_Sized", list[Tensor]]:
        """The tensors among the arguments, in order, and what runs them."""
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
        for sized in self._sized:
            if sized.takes(given):
                break
        else:
            sized = self._made_for(arguments, given)
        if sized is not self._sized[0]:
            self._sized = [sized, *(s for s in self._sized if s is not sized)][:_MOST_SIZES]
        return sized, [_as_strided_as(i, tensor) for i, tensor in zip(sized.inputs, given, strict=True)]

    def _made_for(self, arguments: Mapping[str, Any], given: Sequence[Tensor]) -> "_Sized":
        """What runs inputs of sizes that did not come before."""
        for i, tensor in zip(self.inputs, given, strict=True):
            fits = tensor.ndim == len(i.shape) if self._other_sizes else tensor.shape == i.shape
            if not fits or tensor.dtype is not i.dtype:
                raise PlanError(
                    f"plan: {i.name} is {_text(tensor.dtype, tensor.shape)}, but this plan was made for "
                    f"{_text(i.dtype, i.shape)}; make one for it with lamina.make_plan"
                )
        complete = {**self._values, **arguments}
        other = self._other_sizes({name: complete[name] for name in self._parameters if name in complete})
        if other._form != self._form or other._parameters != self._parameters:
            raise PlanError("plan: for inputs of these sizes the model's result has another form")
        return other._sized[0]


class _Sized:
    """A program for inputs of one size.

    order: for each input of the recorded graph, which of `inputs` it is, or -1 for what needs none: a weight, or a
    number that says a size.
    """

    def __init__(self, program: Program, inputs: Sequence[PlanInput], order: Sequence[int]) -> None:
        self.program, self.inputs, self.order = program, tuple(inputs), list(order)
        self.take = picker([order[i] for i in program.live])
        self.guard = _C.Guard([torch.empty_strided(i.shape, i.strides, dtype=i.dtype) for i in self.inputs])

    def takes(self, given: Sequence[Tensor]) -> bool:
        """Whether it runs tensors of these sizes, however they lie."""
        return all(t.dtype is i.dtype and t.shape == i.shape for i, t in zip(self.inputs, given, strict=True))


def make_plan(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    options: Mapping[str, Any] | None = None,
    dynamic: bool = False,
) -> Plan:
    """A plan of `model` for inputs of the sizes of `example_inputs`, or of any.

    The model is captured and fused as by `torch.compile(model, backend="lamina")`, runs once, and what it called is the
    plan. Layers that were swapped or accelerated before stay as they are; the model itself is not changed.

    Args:
        model: in eval mode, on the CPU.
        example_inputs: tuple of positional or dict of keyword arguments.
        options: as of the compile backend: {"config": lamina.Int8Dynamic()} makes linear layers int8.
        dynamic: whether inputs of other sizes make a layout of memory for themselves when they come, over the same
            weights; eight are kept, and saved with the plan. The model must live as long as that is wanted.

    Raises CaptureError if Dynamo cannot capture the model, PlanError if it is in training mode, is not one graph (its
    control flow hangs on data), writes to its inputs or buffers, or gives what a plan cannot.

    >>> plan = lamina.make_plan(model, (x,)); print(plan)
    """
    if any(module.training for module in model.modules() if isinstance(module, _BatchNorm | _DropoutNd)):
        raise PlanError("plan: the model is in training mode, where it changes with each call; call model.eval() first")
    arguments = _by_parameter(model, example_inputs)
    before = model._compiled_call_impl
    # Of what varies only sizes count: a float that the model was made with, such as eps, stays that.
    config = torch._dynamo.config.patch(specialize_float=True)
    with torch.inference_mode(False), torch.no_grad(), config:
        try:
            compile_(model, copied(example_inputs), options=options, dynamic=dynamic)
            graph = model._compiled_call_impl
        finally:
            model._compiled_call_impl = before

    def plan_for(arguments: Mapping[str, Any]) -> Plan:
        with torch.inference_mode(False), torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
            inputs = copied(dict(arguments))
            named, values = named_tensors(inputs), named_values(inputs)
            with recorded() as calls:
                result = graph(**inputs) if isinstance(example_inputs, Mapping) else graph(*inputs.values())
            return _plan_of(model, calls, named, named_tensors(inputs), result, list(inputs), values)

    plan = plan_for(arguments)
    if dynamic:
        plan._other_sizes = plan_for
    return plan


def load_plan(path: str | Path) -> Plan:
    """A plan that `Plan.save` wrote. It needs neither the model's code nor torch.compile, and gives the same bits.

    Raises FileNotFoundError, and FormatError for a file that is truncated, damaged, no plan, or from a newer lamina.

    >>> plan = lamina.load_plan("model.plan.safetensors"); y = plan(x)
    """
    sized, form, parameters, values = read(Path(path))
    pool = _C.ArenaPool()
    try:
        programs = [_Sized(Program(r, pool), [PlanInput(*i) for i in inputs], order) for r, inputs, order in sized]
    except Refused as refusal:
        raise FormatError(f"{Path(path).name} is a damaged plan: {refusal}") from refusal
    return Plan(programs, form, parameters, values)


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
    given_back = {id(tensor) for tensor in named_tensors({"": result}).values()}
    for argument, tensor in after.items():
        if named.get(argument) is not tensor and id(tensor) not in given_back:
            raise PlanError(f"plan: {name} sets {argument} in its arguments to what is no part of its result")
    number_of = {id(tensor): i for i, tensor in enumerate(named.values())}
    order = [number_of.get(id(value), -1) for value in given]
    static = lowered.static
    unknown = [i for i, n in enumerate(order) if n < 0 and i not in static and isinstance(given[i], Tensor)]
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
    return Plan([_Sized(entry.program, used, order)], form, parameters, values)


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
