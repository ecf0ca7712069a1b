"""The torch.compile backend: capture -> fuse -> choose -> lower.

    fast = torch.compile(model, backend="lamina")
    print(lamina.compile.explain(model, example_inputs))

Dynamo captures the graph, the passes of `fuse` rewrite it to lamina's ops, each where it measures faster, and what no
pass takes stays in eager PyTorch, or goes to Inductor with options={"fallback": "inductor"}. Installing lamina is
enough: the backend is an entry point, found by name without an import.

Nothing is made less precise unless asked for: float layers stay float. A model whose layers were swapped before
(`lamina.swap_(model, lamina.Int8Dynamic())`) keeps them, and they get batch norm, activation, residual sum and merged
projections in one call; between layers of `lamina.Int8Static` go int8 codes. options={"config": lamina.Int8Dynamic()}
makes linear layers int8 while compiling and keeps the float weights too.

Graphs that need gradients run as they were captured: call the model under torch.no_grad or torch.inference_mode. So do
graphs of tensors on a GPU, for which options={"fallback": "inductor"} or backend="inductor" is what makes them faster:
lamina's ops are ops of the graph for both.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from lamina.compile.capture import Captured, CaptureError, is_free, kind
from lamina.compile.fuse import fuse
from lamina.compile.lower import Lowered, lower
from lamina.configs import Config, FusedAttention, Int8Dynamic

__all__ = ["CaptureError", "CompileReport", "GraphReport", "backend", "compile_", "explain", "uncompile_"]

NOT_FOR_GPUS = "fusions and plans are for the CPU"

_log = logging.getLogger(__name__)
_OPTIONS = ("config", "fallback", "measure", "plan")


@dataclass(frozen=True)
class GraphReport:
    """What became of one captured graph.

    fused: (pattern, module of the model) of every rewrite; eager: (operation, why, how often) of the calls that stay in
    PyTorch; whole: why the graph was left as it is, or None.
    """

    fused: tuple[tuple[str, str], ...] = ()
    eager: tuple[tuple[str, str, int], ...] = ()
    whole: str | None = None

    def counts(self) -> Counter[str]:
        """How often each pattern was fused."""
        return Counter(pattern for pattern, _ in self.fused)


@dataclass
class CompileReport:
    """What became of a model: one GraphReport for each graph Dynamo captured; printing it shows tables."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def fused(self) -> Counter[str]:
        return sum((graph.counts() for graph in self.graphs), Counter())

    @property
    def eager(self) -> int:
        """Calls left to eager, over all graphs; views and sizes do not count."""
        return sum(count for graph in self.graphs for _, _, count in graph.eager)

    def summary(self) -> str:
        patterns = ", ".join(f"{count} x {pattern}" for pattern, count in sorted(self.fused.items())) or "nothing fused"
        graphs = "1 graph" if len(self.graphs) == 1 else f"{len(self.graphs)} graphs"
        return f"{graphs}; {patterns}; {self.eager} calls left in eager PyTorch"

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=120)
        for i, graph in enumerate(self.graphs):
            table = Table("what", "count", "why", title=f"graph {i}" + (f": {graph.whole}" if graph.whole else ""))
            for pattern, count in sorted(graph.counts().items()):
                table.add_row(pattern, str(count), "fused")
            for operation, reason, count in graph.eager:
                table.add_row(operation, str(count), reason)
            console.print(table)
        return f"{self.summary()}\n{console.file.getvalue()}"


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The function behind `torch.compile(model, backend="lamina")`.

    Options: "config", a config or a sequence of them (default: nothing lossy; Int8Dynamic makes linear layers int8);
    "fallback", "eager" (default) or "inductor", for what is left; "measure", False to take every fusion and every plan
    without timing it against what it replaces; "plan", False to call the graph's functions one by one, never as a plan
    (`lamina.plan`). Raises ValueError for another option or value.
    """
    return _compile(gm, example_inputs, options or {}, None)


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any], report: CompileReport | None
) -> Callable[..., Any]:
    int8, fallback, measure, plan = _parse(options)
    example_inputs = list(example_inputs)
    reason = _not_ours(example_inputs)
    if reason is not None:
        return _unfused(gm, example_inputs, reason, fallback, report)
    captured = Captured(gm, example_inputs, measure, move_parameters=fallback == "eager")
    try:
        fuse(captured, int8)
    except Exception as failure:  # a graph that the passes misread is no reason to stop somebody's model
        reason = f"the passes failed: {type(failure).__name__}: {failure}"
        warnings.warn(f"lamina backend: {reason}; the graph runs as it was captured", stacklevel=2)
        _log.info("the passes failed", exc_info=True)
        return _unfused(gm, example_inputs, reason, fallback, report)
    if report is not None:
        report.graphs.append(
            GraphReport(tuple(captured.fused), _left(captured.graph, captured.left, "no lamina op for it"))
        )
    return lower(captured, fallback, plan)


def _unfused(
    gm: fx.GraphModule, example_inputs: list[Any], reason: str, fallback: str, report: CompileReport | None
) -> Callable[..., Any]:
    _log.info("graph left as it is: %s", reason)
    if report is not None:
        report.graphs.append(GraphReport(whole=reason, eager=_left(gm.graph, {}, reason)))
    if fallback == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, example_inputs)
    return gm.forward


def _not_ours(example_inputs: list[Any]) -> str | None:
    tensors = [t for t in example_inputs if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "it needs gradients; run it under torch.no_grad or torch.inference_mode"
    if on_gpu := next((t.device for t in tensors if t.is_cuda), None):
        return f"its tensors are on {on_gpu}, and {NOT_FOR_GPUS}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast decides its dtypes call by call"
    return None


def _left(graph: fx.Graph, reasons: Mapping[fx.Node, str], default: str) -> tuple[tuple[str, str, int], ...]:
    """The calls that stay in PyTorch, counted."""
    counts: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        if is_free(node):
            continue
        target = node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if (getattr(target, "namespace", None) or getattr(target, "__module__", "")).startswith("lamina"):
            continue
        counts[kind(node) or name, reasons.get(node, default)] += 1
    return tuple((name, reason, count) for (name, reason), count in counts.items())


def _parse(options: Mapping[str, Any]) -> tuple[bool, str, bool, bool]:
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(f"lamina backend: option '{name}' is unknown; use {', '.join(_OPTIONS)}")
    fallback = options.get("fallback", "eager")
    if fallback not in ("eager", "inductor"):
        raise ValueError(f"lamina backend: fallback '{fallback}' is unknown; use 'eager' or 'inductor'")
    config = options.get("config")
    configs = () if config is None else (config,) if isinstance(config, Config) else tuple(config)
    for item in configs:
        if not isinstance(item, Int8Dynamic | FusedAttention):
            raise ValueError(
                f"lamina backend: {item!r} cannot be applied while compiling; swap the layers first with lamina.swap_, "
                "then compile"
            )
    int8 = any(isinstance(item, Int8Dynamic) for item in configs)
    return int8, fallback, options.get("measure", True), options.get("plan", True)


def compile_(
    module: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    guards_state: bool = True,
) -> CompileReport:
    """Compile a module in place for inference and run it once on `example_inputs`; returns what was fused.

    The module stays itself: type, attributes, parameters' names, state_dict and saving are as before, only its call
    goes through the compiled graph (`nn.Module.compile`). `uncompile_` takes that back.

    Args:
        module: float, or with swapped layers; call it under no_grad or inference_mode to be fast.
        example_inputs: tuple of positional or dict of keyword arguments. Other sizes are compiled when they come.
        options: as in `backend`.
        dynamic: as in torch.compile.
        guards_state: whether Dynamo checks torch's global state (number of threads, gradient mode, autocast, default
            dtype, determinism) at each call and compiles anew when it has changed. False is for a caller who checks all
            of it but the number of threads, on which no graph depends.

    Raises CaptureError if Dynamo finds no graph in the module or compiling or running one fails; the module is as
    before then.

    >>> report = lamina.compile.compile_(model, (x,)); print(report)
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(f"{type(module).__name__} cannot be compiled: it is TorchScript, which Dynamo does not read")
    report = CompileReport()
    graph = torch.compile(
        _own_frame(module._call_impl),
        backend=_Reporting(dict(options or {}), report),
        dynamic=dynamic,
        options=None if guards_state else {"guard_filter_fn": _without_global_state},
    )
    module._compiled_call_impl = graph
    try:
        with torch.no_grad():
            if isinstance(example_inputs, Mapping):
                module(**example_inputs)
            else:
                module(*example_inputs)
    except Exception as failure:
        uncompile_(module)
        raise CaptureError(f"{type(module).__name__} cannot be compiled: {_in_short(failure)}") from failure
    if not report.graphs:
        uncompile_(module)
        raise CaptureError(
            f"{type(module).__name__} cannot be compiled: Dynamo found no graph of tensor operations in it"
        )
    return report


def _in_short(failure: BaseException) -> str:
    """The first line of what went wrong, without Dynamo's advice and traces."""
    inner = getattr(failure, "inner_exception", None) or failure
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return lines[0] if lines else type(inner).__name__


def _without_global_state(guards: Sequence[Any]) -> list[bool]:
    return [guard.guard_type != "GLOBAL_STATE" for guard in guards]


def uncompile_(module: nn.Module) -> None:
    """Undo `compile_`: calls run the module's own forward again."""
    module._compiled_call_impl = None


def _own_frame(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` from a frame with code of its own.

    Dynamo reads no frame of torch itself, such as nn.Sequential.forward, unless another one calls it. And it keeps
    graphs by code, a few for each: models of one class would use up each other's.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    run.__code__ = run.__code__.replace()
    return run


class _Reporting:
    """A backend that writes what it does into a report."""

    def __init__(self, options: Mapping[str, Any], report: CompileReport) -> None:
        self.options = options
        self.report = report
        _parse(options)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        run = _compile(gm, example_inputs, self.options, self.report)
        if isinstance(run, Lowered):
            run.whole, run.updates = _is_whole(gm)
        return run


def _is_whole(gm: fx.GraphModule) -> tuple[bool, bool]:
    """Whether a graph is all that a module compiled by `compile_` does, no break and nothing written elsewhere; and
    whether it is but for what is set in objects among the arguments."""
    from torch._dynamo.symbolic_convert import InstructionTranslator  # takes a second, and has happened by now
    from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew

    output = InstructionTranslator.current_tx().output
    if output.root_tx.f_code.co_filename != __file__ or gm.compile_subgraph_reason.graph_break:
        return False, False
    effects = output.side_effects
    if effects.tensor_hooks or effects.save_for_backward:
        return False, False
    written = [
        value
        for value in effects.id_to_variable.values()
        if not isinstance(value.mutation_type, AttributeMutationNew | ValueMutationNew)
        and effects.is_modified(value)
        and not _is_as_before(value, effects.store_attr_mutations.get(value))
    ]
    of_arguments = all(v.source is not None and v.source.name.startswith(("L['args']", "L['kwargs']")) for v in written)
    return not written, bool(written) and of_arguments


def _is_as_before(variable: Any, attributes: Mapping[str, Any] | None) -> bool:
    """Whether all that was set in an object are plain values that it had: set and set back."""
    before = vars(getattr(variable, "value", None)) if hasattr(getattr(variable, "value", None), "__dict__") else {}
    return bool(attributes) and all(
        name in before
        and value.is_python_constant()
        and type(before[name]) in (bool, int, float, str, type(None))
        and value.as_python_constant() is before[name]
        for name, value in attributes.items()
    )


def explain(
    model: nn.Module | Callable[..., Any],
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> CompileReport:
    """What the backend makes of a model: which patterns it fuses, what stays in eager PyTorch, and why.

    Runs the model once under no_grad and leaves it as it is. Raises CaptureError as `compile_` does.

    >>> print(lamina.compile.explain(model, (input_ids,)))
    """
    report = CompileReport()
    # Of an accelerated model, whose call is a graph already, the layers.
    accelerated = isinstance(model, nn.Module) and model._compiled_call_impl is not None
    call = _own_frame(model._call_impl) if accelerated else model
    compiled = torch.compile(call, backend=_Reporting(dict(options or {}), report))
    try:
        with torch.no_grad():
            if isinstance(example_inputs, Mapping):
                compiled(**example_inputs)
            else:
                compiled(*example_inputs)
    except Exception as failure:
        raise CaptureError(f"the model cannot be compiled: {_in_short(failure)}") from failure
    return report
