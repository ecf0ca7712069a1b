"""What goes into a model and what comes out, as plain data: names for the tensors inside, and how to put them together.

Objects of other classes that can be iterated count as tuples of their items: so do the caches of keys and values of the
transformers package, whose tensors have the names that they would have as tuples, one for each layer.

A form is a dict with one key: {"tensor": i}, {"value": plain}, {"list": [...]}, {"tuple": [...]} or {"dict": {name:
form}}, so that JSON can hold it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lamina.errors import PlanError

_PLAIN = (bool, int, float, str, type(None))
# What can be iterated and yet is no container of tensors.
_CLASSES = (bytes, type, range, set, frozenset, nn.Module, torch.Generator)


def named_tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments of a call by name: "x", "past.0.1".

    >>> named_tensors({"x": x, "past": (k, v)})
    {"x": x, "past.0": k, "past.1": v}
    """
    return {name: value for name, value in _named(arguments).items() if isinstance(value, Tensor)}


def named_values(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values among the arguments of a call by name.

    >>> named_values({"x": x, "use_cache": True})
    {"use_cache": True}
    """
    return {name: value for name, value in _named(arguments).items() if not isinstance(value, Tensor)}


def _named(arguments: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, (Tensor, *_PLAIN)):
            found[name] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{name}.{key}", item)
        elif is_dataclass(value) and not isinstance(value, type):
            walk(name, _fields(value))
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                walk(f"{name}.{i}", item)
        else:
            for i, item in enumerate(_items(value)):
                walk(f"{name}.{i}", item)

    for name, value in arguments.items():
        walk(name, value)
    return found


def form_of(result: Any, number: Callable[[Tensor], int | None]) -> dict[str, Any]:
    """The form of a model's result. number: which of the known tensors one is, None for an unknown one.

    Mappings and dataclasses, the outputs of transformers among them, become dicts, what can be iterated (a cache of
    keys and values) a tuple of its items, and what torch can flatten otherwise of its tensors. Raises PlanError for
    anything else.
    """
    if isinstance(result, Tensor):
        found = number(result)
        if found is None:
            raise PlanError("plan: a tensor of the model's result is none that its graph computes")
        return {"tensor": found}
    if isinstance(result, _PLAIN):
        return {"value": result}
    if isinstance(result, Mapping):
        return {"dict": {str(name): form_of(value, number) for name, value in result.items()}}
    if is_dataclass(result) and not isinstance(result, type):
        return form_of(_fields(result), number)
    if isinstance(result, list | tuple):
        return {"list" if isinstance(result, list) else "tuple": [form_of(item, number) for item in result]}
    items = _items(result)
    if not items:
        raise PlanError(f"plan: the model's result holds a {type(result).__name__}, which a plan cannot give")
    return {"tuple": [form_of(item, number) for item in items]}


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _items(value: Any) -> list[Any]:
    """What an object of some class is made of; nothing where that cannot be told."""
    if isinstance(value, Iterable) and not isinstance(value, (*_CLASSES, Iterator)):
        return list(value)
    leaves = tree_leaves(value)
    return [] if any(leaf is value for leaf in leaves) else leaves


def build(form: Mapping[str, Any], tensors: Sequence[Tensor]) -> Any:
    """The inverse of `form_of`, over other tensors."""
    ((what, value),) = form.items()
    if what == "tensor":
        return tensors[value]
    if what == "value":
        return value
    if what == "dict":
        return {name: build(item, tensors) for name, item in value.items()}
    items = [build(item, tensors) for item in value]
    return tuple(items) if what == "tuple" else items
