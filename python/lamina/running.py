"""Running a model on inputs somebody gave: what goes in, what comes out, and how far two outputs are apart."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

# One call of a model: a tuple of positional or a dict of keyword arguments.
ExampleInputs = tuple[Any, ...] | Mapping[str, Any]

# filter_fn(module, fqn) -> whether the layer may be touched.
FilterFn = Callable[[nn.Module, str], bool]


def caller(example_inputs: ExampleInputs, what: str) -> Callable[[nn.Module], Any]:
    """Calls a model on a copy of the inputs, which the model may overwrite. `what` names them in the error."""
    if isinstance(example_inputs, Mapping):
        kwargs = copied(dict(example_inputs))
        return lambda model: model(**kwargs)
    if isinstance(example_inputs, tuple):
        args = copied(tuple(example_inputs))
        return lambda model: model(*args)
    raise TypeError(
        f"{what} must be a tuple of positional or a dict of keyword arguments, got "
        f"{type(example_inputs).__name__}; wrap a single tensor as (x,)"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, without gradients and from a fixed seed; every module gets its mode back, torch its generator."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=_gpus()):
            torch.manual_seed(0)
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _gpus() -> list[int]:
    """Those whose generators a seed would set: none before CUDA is in use."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def copied(inputs: Any) -> Any:
    """The same structure with every tensor cloned, and a copy of every object that may hold some."""

    def copied_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        return leaf if isinstance(leaf, nn.Module) or not hasattr(leaf, "__dict__") else copy.deepcopy(leaf)

    return tree_map(copied_leaf, inputs)


def outputs(call: Callable[[nn.Module], Any], model: nn.Module) -> list[Tensor]:
    """The floating-point tensors among the outputs, the same for the same seed."""
    with torch.random.fork_rng(devices=_gpus()):
        torch.manual_seed(0)
        return floats(call(model))


def first_tensor(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input of a layer that has one, however its argument was passed and whatever it is called."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def tensors(output: Any) -> list[Tensor]:
    """Every tensor in a structure of containers and dataclasses, in order."""
    found = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):  # pytrees take the plain containers only
            found += tensors([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def floats(output: Any) -> list[Tensor]:
    """The floating-point ones of `tensors`."""
    return [t for t in tensors(output) if t.is_floating_point()]


def squares(actual: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """(|actual - expected|^2, |expected|^2) over all tensors; the first is infinite if a shape or a NaN differs."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return float("inf"), 0.0
    difference = norm = 0.0
    for a, e in zip(actual, expected, strict=True):
        a, e = a.double(), e.double()
        same = (a == e) | (a.isnan() & e.isnan())  # infinities and NaN that agree are no error
        delta = torch.where(same, 0.0, a - e)
        if not torch.isfinite(delta).all():
            return float("inf"), 0.0
        difference += delta.square().sum().item()
        norm += torch.where(torch.isfinite(e), e, 0.0).square().sum().item()
    return difference, norm


def ratio(difference: float, norm: float) -> float:
    """The relative Euclidean error of `squares`: |actual - expected| / |expected|."""
    if difference == 0.0:
        return 0.0
    return (difference / norm) ** 0.5 if norm > 0 else float("inf")


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """|actual - expected| / |expected| over all tensors; infinite if a shape or a NaN differs."""
    return ratio(*squares(actual, expected))
