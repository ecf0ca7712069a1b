"""Calls of `scaled_dot_product_attention` in a module's own methods, sent to lamina's attention.

A method that calls it is given to the instance once more, with the same code in which one name is another: the global
that leads to torch's function (`F`, `torch`, or the function itself). That costs a call nothing, and torch.compile,
copies and pickles see an ordinary method. Other instances, and everything else in the method, are as they were: its
globals are the very ones, plus the new name.
"""

import dis
import functools
import inspect
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lamina.ops.attention import drop_in_attention

_NAME = "scaled_dot_product_attention"


class _Rerouted(types.ModuleType):
    """A torch module in which one name is another; all others are looked up in the original."""

    def __init__(self, original: types.ModuleType, name: str, value: Any) -> None:
        super().__init__(original.__name__)
        self.__dict__["_original"] = original
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


_FUNCTIONAL = _Rerouted(F, _NAME, drop_in_attention)
_NN = _Rerouted(nn, "functional", _FUNCTIONAL)
# What a global may be, and what takes its place: by the names that lead from it to the function.
_PLACES = (
    (F.scaled_dot_product_attention, (), drop_in_attention),
    (F, (_NAME,), _FUNCTIONAL),
    (nn, ("functional", _NAME), _NN),
    (torch, ("nn", "functional", _NAME), _Rerouted(torch, "nn", _NN)),
)


def rerouted_methods(module: nn.Module) -> dict[str, types.FunctionType]:
    """The methods of a module's class that call torch's function, themselves or by another function, rerouted.

    Empty for most modules. Raises ValueError with the reason if a call cannot be followed.
    """
    kind = type(module)
    if _is_of(kind.__module__, "torch", "lamina"):
        return {}
    if kind not in _FOUND:
        try:
            _FOUND[kind] = dict(_rerouted(kind))
        except ValueError as reason:
            _FOUND[kind] = str(reason)
    found = _FOUND[kind]
    if isinstance(found, str):
        raise ValueError(found)
    return found


# Per class: what was found, or why it cannot be followed.
_FOUND: weakref.WeakKeyDictionary[type, dict[str, types.FunctionType] | str] = weakref.WeakKeyDictionary()


def _is_of(name: str, *packages: str) -> bool:
    return name.partition(".")[0] in packages


def _rerouted(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    seen: dict[str, types.FunctionType] = {}
    for base in kind.__mro__:
        if _is_of(base.__module__, "torch", "builtins"):
            continue
        for name, value in vars(base).items():
            if not isinstance(value, types.FunctionType):
                continue
            inner = inspect.unwrap(value)
            if inner is not value and _mentions(inner.__code__):
                raise ValueError(f"{value.__qualname__}, which calls {_NAME}, is wrapped by a decorator")
            if name not in seen:
                seen[name] = value
                if (new := _reroute(value)) is not None:
                    yield name, new
            elif "super" in seen[name].__code__.co_names and _reroute(value) is not None:
                raise ValueError(f"{seen[name].__qualname__} calls {_NAME} by way of super()")


def _mentions(code: types.CodeType) -> bool:
    return _NAME in code.co_names or any(_mentions(c) for c in code.co_consts if isinstance(c, types.CodeType))


def _reroute(function: types.FunctionType) -> types.FunctionType | None:
    """The function with the globals renamed that lead to torch's; None if it does not call it."""
    scope, code = function.__globals__, function.__code__
    found = _leading_there(code, scope)
    if not found:
        if _mentions(code) and "IMPORT_NAME" in _operations(code):
            raise ValueError(f"{function.__qualname__} imports what it calls {_NAME} by; import it outside")
        return None
    names = {name: f"{name} by lamina" for name in found}
    code = _renamed(code, names, function.__qualname__)
    for name, new in found.items():
        scope[names[name]] = new
    new = types.FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    new.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(new, function, updated=())


def _leading_there(code: types.CodeType, scope: dict[str, Any]) -> dict[str, Any]:
    """The globals through which code, functions inside it included, reaches torch's function -> what to use instead."""
    found = {}
    for c in code.co_consts:
        if isinstance(c, types.CodeType):
            found |= _leading_there(c, scope)
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for i, step in enumerate(steps):
        if step.opname not in ("LOAD_GLOBAL", "LOAD_NAME") or step.argval in found:
            continue
        value = scope.get(step.argval)
        for original, path, new in _PLACES:
            if value is original and tuple(s.argval for s in steps[i + 1 : i + 1 + len(path)]) == path:
                found[step.argval] = new
        if isinstance(value, types.FunctionType) and not _is_of(value.__module__, "torch", "transformers", "lamina"):
            new = _reroute(value) if _mentions(value.__code__) else None
            if new is not None:
                found[step.argval] = new
    return found


def _operations(code: types.CodeType) -> set[str]:
    inner = (_operations(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return {step.opname for step in dis.get_instructions(code)}.union(*inner)


def _renamed(code: types.CodeType, names: dict[str, str], where: str) -> types.CodeType:
    for step in dis.get_instructions(code):
        other = step.opname not in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_CONST", "LOAD_FAST", "STORE_FAST")
        if other and step.argval in names:
            raise ValueError(f"{where} uses the name {step.argval} for something else too")
    return code.replace(
        co_names=tuple(names.get(name, name) for name in code.co_names),
        co_consts=tuple(_renamed(c, names, where) if isinstance(c, types.CodeType) else c for c in code.co_consts),
    )
