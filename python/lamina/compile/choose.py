"""Which candidate computes a node: measured, once per shape.

A candidate replaces what is there only if it is clearly faster on tensors of the node's own shapes and strides. The
answer is kept by operation, shapes, dtypes, threads and instruction set for the life of the process.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lamina import _C
from lamina.stopwatch import in_turns

# The first candidate is what stands there already: it stays unless another takes this share of its time or less.
_CLEARLY = 0.97
_SECONDS = 0.015
_MIN_ROUNDS = 3

_chosen: dict[tuple, str] = {}


def fastest(key: tuple, candidates: dict[str, Callable[[], Any]]) -> str:
    """The name of the fastest candidate by its best time; the first one unless another is clearly faster.

    >>> fastest(("relu", x.shape), {"torch": lambda: F.relu(x), "lamina": lambda: ops.relu(x)})
    """
    key = (*key, torch.get_num_threads(), _C.active_isa())
    if key not in _chosen:
        best = best_times(candidates, _SECONDS)
        incumbent = next(iter(candidates))
        winner = min(best, key=best.__getitem__)
        _chosen[key] = winner if best[winner] <= _CLEARLY * best[incumbent] else incumbent
    return _chosen[key]


def best_times(candidates: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """The best time of each, called in turn for so long, but for a few rounds at least, after one call for nothing."""
    with torch.no_grad():
        return {name: min(times) for name, times in in_turns(candidates, seconds, _MIN_ROUNDS).items()}


def describe(args: Any) -> tuple:
    """Shapes, strides and dtypes of the tensors among the arguments, for a key."""
    found: list[Any] = []

    def add(node: fx.Node) -> fx.Node:
        value = node.meta["example_value"]
        if isinstance(value, Tensor):
            found.append((tuple(map(hint, value.shape)), tuple(map(hint, value.stride())), value.dtype))
        return node

    map_arg(args, add)
    return tuple(found)


def random_like(args: Any) -> Any:
    """The arguments with a random tensor of the same layout in place of every node."""

    def make(node: fx.Node) -> Any:
        value = node.meta["example_value"]
        if not isinstance(value, Tensor):
            return hint(value)
        made = torch.empty_strided(tuple(map(hint, value.shape)), tuple(map(hint, value.stride())), dtype=value.dtype)
        if value.dtype is torch.bool:
            return made.fill_(True)
        return made.normal_() if value.is_floating_point() else made.zero_()

    return map_arg(args, make)


def hint(size: Any) -> Any:
    """The size seen at capture where it may vary: asking a symbol itself would fix it."""
    node = getattr(size, "node", None)
    return size if node is None else node.hint if getattr(node, "hint", None) is not None else 128
