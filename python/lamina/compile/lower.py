"""A fused graph to a callable: generated Python over direct calls, with the folded constants as further arguments.

Where that is faster, the graph runs as a plan (`lamina.plan`), one call for all of its steps. Elsewhere lamina's ops
are called past the dispatcher, which costs more than some of them do: the graph is for the CPU, and nothing in it needs
a gradient. Only while something looks on (a profiler, a dispatch mode) are they called as ops that it can see.

A call of the result first checks that the parameters are the ones that constants and plans were made from: same tensor,
same memory, same version. One that was replaced or written to makes them again.
"""

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled

from lamina.compile.capture import Captured, Fold, fake
from lamina.ops.library import CPU_IMPLEMENTATIONS
from lamina.plan.plans import Plans, Specialized
from lamina.plan.program import Program, picker

_version = operator.attrgetter("_version")

# The calls of graphs by this thread, where somebody asked for them.
_recording = threading.local()


@contextmanager
def recorded() -> Iterator[list[tuple["Lowered", tuple, Any]]]:
    """The calls of graphs inside: graph, inputs, outputs.

    >>> with recorded() as calls: module(x)
    """
    outer, _recording.calls = getattr(_recording, "calls", None), []
    try:
        yield _recording.calls
    finally:
        _recording.calls = outer


class _Sources:
    """The tensors behind the constants, as they were when the constants were made."""

    def __init__(self, positions: Sequence[int], inputs: Sequence[Any]) -> None:
        self._get = picker(positions)
        self._tensors = self._get(inputs)
        self._versions = list(map(_version, self._tensors))
        self._pointers = list(map(Tensor.data_ptr, self._tensors))

    def changed(self, inputs: Sequence[Any]) -> bool:
        now = self._get(inputs)
        return (
            not all(map(operator.is_, now, self._tensors))
            or list(map(_version, now)) != self._versions
            or list(map(Tensor.data_ptr, now)) != self._pointers
        )


class Lowered:
    """Callable on the inputs Dynamo passes; safe to call from several threads at once.

    run: takes the graph's inputs and the folded constants; watched: the same over registered ops; static: positions of
    the inputs that are parameters or buffers; plans: of `run`, if it may run as a plan. `whole`: whether the graph is
    all there is to its frame, as far as the caller knows; `updates`: but for attributes of objects among its arguments,
    such as a cache of keys and values, which are set to tensors of the graph.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        watched: Callable[..., Any],
        folds: list[Fold],
        static: Sequence[int],
        plans: Plans | None,
        example_inputs: list[Any],
    ) -> None:
        self._run = run
        self._watched = watched
        self._folds = folds
        self.static = static
        self._lock = threading.Lock()
        self.plans = plans
        self.whole = False
        self.updates = False
        self._state = self._made_of(example_inputs)

    def __call__(self, *inputs: Any) -> Any:
        sources, constants = self._state
        if sources.changed(inputs):
            if self.plans is not None:
                self.plans.clear()
            sources, constants = self._state = self._made_of(inputs)
        outputs = None
        if _len_torch_dispatch_stack() or _profiler_enabled():
            outputs = self._watched(*inputs, *constants)
        elif self.plans is not None:
            outputs = self.plans.run((*inputs, *constants))
        if outputs is None:
            outputs = self._run(*inputs, *constants)
        if getattr(_recording, "calls", None) is not None:
            _recording.calls.append((self, inputs, outputs))
        return outputs

    def specialize(self, inputs: Sequence[Any]) -> Specialized:
        """A plan for inputs of this form, whether it is faster or not."""
        sources, constants = self._state
        if sources.changed(inputs):
            constants = self._made_of(inputs)[1]
        return self.plans.specialize((*inputs, *constants), measure=False)

    def program_for(self, inputs: Sequence[Any]) -> Program | None:
        """The plan that a call with these inputs runs, if it runs one whose results are the graph's as they are."""
        if self.plans is None:
            return None
        program = self.plans.program_for((*inputs, *self._state[1]))
        return program if program is not None and program.recording.flat else None

    def _made_of(self, inputs: Sequence[Any]) -> tuple[_Sources, tuple[Tensor, ...]]:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            made = [tensor for fold in self._folds for tensor in fold.make(*(inputs[i] for i in fold.sources))]
            return _Sources(self.static, inputs), tuple(made)


def lower(captured: Captured, fallback: str, plan: bool = True) -> Callable[..., Any]:
    """A callable for the inputs of a captured graph.

    fallback: "eager" runs what is left as it is, "inductor" compiles the fused graph with Inductor; plan: whether the
    graph may run as a plan, which Inductor's never does.
    """
    captured.drop_unused()
    captured.graph.lint()
    captured.module.recompile()
    own = len(captured.position)
    static = [i for node, i in captured.position.items() if captured.constant(node) is not None]
    if fallback == "inductor":
        run = _inductor(captured)
        return Lowered(run, run, captured.folds, static, None, captured.example_inputs)
    direct = _direct(captured)
    constants = range(own, own + sum(len(fold.outputs) for fold in captured.folds))
    plans = Plans(direct, [*static, *constants], constants.stop, captured.measure) if plan else None
    # Plain forward: Module.__call__ would look for hooks on every run.
    run, watched = direct.forward, captured.module.forward
    return Lowered(run, watched, captured.folds, static, plans, captured.example_inputs)


def _direct(captured: Captured) -> fx.GraphModule:
    """The same graph with lamina's ops replaced by the functions that implement them."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(captured.graph, {}))
    for node in graph.nodes:
        if node.target in CPU_IMPLEMENTATIONS and all(t.device.type == "cpu" for t in _tensors(node)):
            node.target = CPU_IMPLEMENTATIONS[node.target]
    return fx.GraphModule(captured.module, graph)


def _tensors(node: fx.Node) -> list[Tensor]:
    return [fake(n) for n in (node, *node.all_input_nodes) if isinstance(fake(n), Tensor)]


def _inductor(captured: Captured) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    examples = list(captured.example_inputs)
    for fold in captured.folds:
        examples += fold.make(*(captured.example_inputs[i] for i in fold.sources))
    return compile_fx(captured.module, examples)
