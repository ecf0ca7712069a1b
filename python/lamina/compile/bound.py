"""Calls of a compiled module without Dynamo in between.

Before each run of a graph Dynamo asks thousands of guards and then fetches every parameter by its path. A ResNet-50
pays 1.3 ms for it, a twentieth of its int8 time, most of it spent waiting for memory that the layers pushed out of the
caches. Here one number for each dict tells whether anything in it was ever set again: Python counts the changes of
dicts (PEP 509), and those of a module hold its parameters, buffers, children and attributes. While none has changed,
the graph is called with the inputs it had at the first call and the caller's tensors among them; after a change Dynamo
has the word once, and if it runs a graph as before, calls are bound to that.

Where the graph runs as a plan and all arguments are tensors, even those questions are asked in one call of C++, which
leaves two or three microseconds around the plan: as much as a small layer takes.

Only for a module whose whole forward is one graph and leaves nothing behind but its result, and for arguments that
differ from the first ones in the values of tensors alone, which the caller checks. What forward reads from elsewhere,
such as global variables, counts as it was.
"""

from collections.abc import Callable, Iterable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import dict_version
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lamina import _C
from lamina.compile.lower import Lowered, recorded
from lamina.plan.program import Program, picker

# Attributes that every module has, or gets from torch.compile; those of them that hold what a module is made of are
# watched by themselves.
_MODULE = {*vars(nn.Module()), "_compiled_call_impl"}
_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, Tensor, nn.Module)
_CODE = (type, FunctionType, MethodType, ModuleType, BuiltinFunctionType)
# Of a result's leaves that are no tensors, those that can be given again.
_CONSTANTS = (int, float, bool, str, type(None), torch.dtype)


# Calls after which no plan is looked for any more: a graph has one by then or will have none.
_ATTEMPTS = 8


class Bound:
    """Callable like the compiled module; safe to call from several threads at once.

    compiled: the module's call through Dynamo, with the inputs of one example as the first arguments.
    """

    def __init__(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        self._module, self._compiled = module, compiled
        self._state: _Binding | None = None
        self._planned: _Planned | None = None
        self._attempts = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        binding = self._state
        if binding is not None and not binding.changed():
            result = binding.run(args, kwargs)
            if self._planned is None and not kwargs and self._attempts < _ATTEMPTS:
                self._attempts += 1
                self._planned = binding.planned(args)
            return result
        self._planned, self._attempts = None, 0
        with recorded() as calls:
            result = self._compiled(*args, **kwargs)
        self._state = _bind(self._module, args, kwargs, calls, result)
        return result

    def quick(self, args: tuple) -> Any:
        """The result for tensors like those of a call before, by its plan with next to nothing in between, or None."""
        planned = self._planned
        if planned is None or torch.is_grad_enabled() or not planned.fits(args):
            return None
        return planned.run(args)


class _Binding:
    """A graph, its inputs, where the caller's tensors go among them, and how its outputs make the result."""

    def __init__(
        self,
        graph: Lowered,
        inputs: list[Any],
        places: list[tuple[int, int]],
        rebuild: Callable[[Any, Sequence[Any]], Any],
        dicts: list[dict],
    ) -> None:
        self._graph, self._inputs, self._places, self._rebuild = graph, inputs, places, rebuild
        self._dicts = dicts
        self._versions = list(map(dict_version, dicts))

    def changed(self) -> bool:
        return list(map(dict_version, self._dicts)) != self._versions

    def planned(self, args: tuple) -> "_Planned | None":
        """What calls like this one need of the binding, if a plan runs them and they give nothing but tensors."""
        if not args or not all(type(argument) is Tensor for argument in args):
            return None
        program = self._graph.program_for(self._inputs_with(args))
        if program is None:
            return None
        return _Planned(program, self._inputs, self._places, self._rebuild, self._dicts, self._graph.static, args)

    def run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        leaves = tree_leaves((args, kwargs)) if kwargs or not all(type(a) is Tensor for a in args) else args
        return self._rebuild(self._graph(*self._inputs_with(leaves)), leaves)

    def _inputs_with(self, leaves: Sequence[Any]) -> list[Any]:
        """The graph's inputs for the leaves of a call's arguments."""
        inputs = self._inputs.copy()
        for position, leaf in self._places:
            inputs[position] = leaves[leaf]
        return inputs


class _Planned:
    """A plan as it is called again and again: everything that might have changed is asked for in C++."""

    def __init__(
        self,
        program: Program,
        inputs: list[Any],
        places: list[tuple[int, int]],
        rebuild: Callable[[Any, Sequence[Any]], Any],
        dicts: list[dict],
        static: Sequence[int],
        args: tuple,
    ) -> None:
        self._program, self._rebuild = program, rebuild
        leaf_of = dict(places)
        self._take = picker([leaf_of[position] for position in program.live])
        self._guard = _C.Guard(args)
        self._watch = _C.Watch(dicts, [inputs[i] for i in static])
        self._settings = settings()

    def fits(self, args: tuple) -> bool:
        return (
            len(args) > 0
            and _C.skips_dispatcher(args)
            and all(type(argument) is Tensor for argument in args)
            and self._guard.fits(args)
            and settings() == self._settings
            and not self._watch.changed()
        )

    def run(self, args: tuple) -> Any:
        return self._rebuild(self._program.run(self._take(args)), args)


def settings() -> tuple:
    """What of torch's state results hang on, besides the threads' number."""
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _bind(
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    calls: list[tuple[Lowered, tuple, Any]],
    result: Any,
) -> _Binding | None:
    """None where the call did more than run one graph of nothing but tensors that are known here."""
    if len(calls) != 1 or not calls[0][0].whole:
        return None
    graph, inputs, outputs = calls[0]
    leaves = tree_leaves((args, kwargs))
    of_leaf = {id(leaf): i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    own = {id(t) for t in (*module.parameters(), *module.buffers())}
    places = [(i, of_leaf[id(value)]) for i, value in enumerate(inputs) if id(value) in of_leaf]
    kept: list[Any] = list(inputs)
    for i, leaf in places:
        if id(leaves[leaf]) in own:
            return None
        kept[i] = None
    if any(isinstance(value, Tensor) and id(value) not in own for value in kept):
        return None
    rebuild = _rebuilding(outputs, of_leaf, result)
    return rebuild and _Binding(graph, kept, places, rebuild, list(_dicts_of(module)))


def _rebuilding(outputs: Any, of_leaf: dict[int, int], result: Any) -> Callable[[Any, Sequence[Any]], Any] | None:
    """The function from a graph's outputs and the arguments' leaves to the result that the module makes of them."""
    found = {id(output): i for i, output in enumerate(outputs) if isinstance(output, Tensor)}
    if id(result) in found:
        only = found[id(result)]
        return lambda outputs, leaves: outputs[only]
    parts, structure = tree_flatten(result)
    if not all(id(part) in found or id(part) in of_leaf or type(part) in _CONSTANTS for part in parts):
        return None
    kept = [part if type(part) in _CONSTANTS else None for part in parts]
    made = [(i, found[id(part)]) for i, part in enumerate(parts) if id(part) in found]
    given = [(i, of_leaf[id(part)]) for i, part in enumerate(parts) if id(part) in of_leaf]

    def rebuild(outputs: Any, leaves: Sequence[Any]) -> Any:
        parts = kept.copy()
        for i, place in made:
            parts[i] = outputs[place]
        for i, place in given:
            parts[i] = leaves[place]
        return tree_unflatten(parts, structure)

    return rebuild


def _dicts_of(module: nn.Module) -> Iterable[dict]:
    """The dicts that say what a module and the objects that it refers to are."""
    found: dict[int, dict] = {}
    waiting: list[Any] = [module]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list | tuple):
            waiting += [item for item in value if not isinstance(item, _PLAIN)]
            continue
        own = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        if not isinstance(own, dict) or id(own) in found:
            continue
        found[id(own)] = own
        if not isinstance(value, nn.Module):
            waiting += [item for item in own.values() if not isinstance(item, (*_PLAIN, *_CODE))]
            continue
        for name in ("_parameters", "_buffers", "_modules"):
            found[id(own[name])] = own[name]
        waiting += [child for child in own["_modules"].values() if child is not None]
        rest = (item for name, item in own.items() if name not in _MODULE)
        waiting += [item for item in rest if not isinstance(item, (*_PLAIN, *_CODE))]
    return found.values()
