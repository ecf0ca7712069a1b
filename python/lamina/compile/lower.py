"""A fused graph to a callable: generated Python over direct calls, with the folded constants as further arguments.

A call of the result first checks that the parameters behind the constants are the ones they were made from: same
tensor, same memory, same version. One that was replaced or written to makes its constants again.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lamina.compile.capture import Captured, Fold


class Lowered:
    """Callable on the inputs Dynamo passes; safe to call from several threads at once."""

    def __init__(self, run: Callable[..., Any], folds: list[Fold], example_inputs: list[Any]) -> None:
        self._run = run
        self._folds = folds
        self._lock = threading.Lock()
        self._state: tuple[tuple, tuple[Tensor, ...]] = ((), ())
        self._refresh(example_inputs)

    def __call__(self, *inputs: Any) -> Any:
        known, constants = self._state
        for position, tensor, pointer, version in known:
            now = inputs[position]
            if now is not tensor or now._version != version or now.data_ptr() != pointer:
                constants = self._refresh(inputs)
                break
        return self._run(*inputs, *constants)

    def _refresh(self, inputs: Any) -> tuple[Tensor, ...]:
        with self._lock, torch.no_grad():
            made = [tensor for fold in self._folds for tensor in fold.make(*(inputs[i] for i in fold.sources))]
            sources = dict.fromkeys(i for fold in self._folds for i in fold.sources)
            known = tuple((i, inputs[i], inputs[i].data_ptr(), inputs[i]._version) for i in sources)
            self._state = (known, tuple(made))
            return self._state[1]


def lower(captured: Captured, fallback: str) -> Callable[..., Any]:
    """`fallback`: "eager" runs what is left as it is, "inductor" compiles the fused graph with Inductor."""
    captured.drop_unused()
    captured.graph.lint()
    captured.module.recompile()
    # Plain forward: Module.__call__ would look for hooks on every run.
    run: Callable[..., Any] = captured.module.forward
    if fallback == "inductor":
        run = _inductor(captured)
    return Lowered(run, captured.folds, captured.example_inputs) if captured.folds else run


def _inductor(captured: Captured) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    examples = list(captured.example_inputs)
    for fold in captured.folds:
        examples += fold.make(*(captured.example_inputs[i] for i in fold.sources))
    return compile_fx(captured.module, examples)
