"""SmoothQuant: move outliers of activations into the weights that read them (Xiao et al. 2022, arXiv:2211.10438).

A norm whose output only Linear layers read can be divided by a factor per channel if their weights are multiplied by
it. That nobody else reads it is not guessed from the names of modules, but seen: while calibration runs, every operator
that touches the output or a view of it is watched. The factors are powers of two, so the float model keeps its bits.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lamina.nn.linears import as_linear
from lamina.quant.calibration import Calibration, check_calibration, run_over
from lamina.quant.observers import SMALLEST_RANGE
from lamina.running import FilterFn, first_tensor, tensors

_aten = torch.ops.aten

# f(x s) = s f(x) for s > 0, element by element: a channel factor passes through. For products, through one factor.
_COPIES = (_aten.clone.default, _aten._to_copy.default)
_COMMUTING = (*_COPIES, _aten.relu.default, _aten.relu_.default)
_PRODUCTS = (_aten.mul.Tensor, _aten.div.Tensor)

# Beyond this, weights would leave the range of their dtype before any activation gained from it.
_LARGEST_EXPONENT = 16


@dataclass(frozen=True)
class SmoothedLayer:
    """What became of one norm (or Linear) and the Linear layers that read its output.

    source: name of the module whose output was, or was not, divided; layers: those that read it; folded: whether it was
    done; reason: why, in words; outlier_before, outlier_after: the largest channel of the output over the median one.
    """

    source: str
    layers: tuple[str, ...]
    folded: bool
    reason: str
    outlier_before: float | None = None
    outlier_after: float | None = None


@dataclass(frozen=True)
class SmoothReport:
    """What `smooth_` did, one entry per norm, and per Linear layer that feeds another; printing it shows a table."""

    decisions: tuple[SmoothedLayer, ...]

    @property
    def folded(self) -> tuple[SmoothedLayer, ...]:
        return tuple(d for d in self.decisions if d.folded)

    @property
    def left(self) -> tuple[SmoothedLayer, ...]:
        return tuple(d for d in self.decisions if not d.folded)

    def __str__(self) -> str:
        table = Table("output of", "read by", "largest / median channel", "why")
        for d in self.decisions:
            numbers = "" if d.outlier_before is None else f"{d.outlier_before:.1f} -> {d.outlier_after:.1f}"
            table.add_row(d.source or "(model)", "\n".join(d.layers), numbers, d.reason)
        console = Console(file=StringIO(), width=140)
        console.print(table)
        return f"{len(self.folded)} of {len(self.decisions)} outputs smoothed\n{console.file.getvalue()}"


def smooth_(
    model: nn.Module, calibration: Iterable[Any], alpha: float = 0.5, filter_fn: FilterFn | None = None
) -> SmoothReport:
    """Make the activations of `model` easier to quantize, in place; what it computes stays the same, bit for bit.

    Channel j of a norm's output is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), rounded to a power of two,
    and column j of every Linear that reads it multiplied: int8 then loses less on both sides. The same is done for a
    Linear that feeds others directly, through ReLU or as one factor of a product (the up projection of a gated MLP).
    An output that anything else reads (a residual in a post-norm Transformer, the caller) is left alone, and the report
    says what reads it.

    Args:
        model: float32 or bfloat16; not yet quantized. Runs in eval mode and keeps its modes.
        calibration: an iterable of example inputs, tuples of positional or dicts of keyword arguments; read once. What
            they do not reach is not touched; they must take every path that reads a norm's output.
        alpha: 0 moves nothing out of the activations, 1 everything into the weights.
        filter_fn: `filter_fn(module, fqn) -> bool` of the norm or Linear whose output would be divided.

    Returns a SmoothReport. Raises ValueError for an alpha outside [0, 1] or without inputs, TypeError for inputs of the
    wrong kind; errors of the model pass through. On an error the model is as it was.

    >>> print(lamina.quant.smooth_(model, batches))
    >>> lamina.swap_(model, lamina.Int8Dynamic())
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"smooth_: alpha is {alpha}, but must be between 0 and 1")
    check_calibration("smooth_: calibration", calibration)
    if isinstance(calibration, Calibration):
        raise TypeError(
            "smooth_: a Calibration holds one range per layer, but channels are needed; give example inputs"
        )
    flow = _Flow(model, filter_fn)
    with flow.hooks():
        for output in run_over(model, calibration, "smooth_", around=flow):
            flow.end(output)
    decisions = []
    for source in flow.sources.values():
        if source.affine is None and not source.readers:
            continue  # a Linear that feeds no Linear: nothing to say
        reason = flow.obstacle(source)
        decisions.append(_fold(source, flow, alpha) if reason is None else source.left(flow.names, reason))
    return SmoothReport(tuple(decisions))


@dataclass(eq=False)
class _Source:
    """A module whose output may be divided per channel, and what is known of who reads that output.

    affine: "weight" if its output is proportional to (weight, bias), "1 + weight" if to (1 + weight), "unknown" until
    its first call; None for nn.Linear. fixed: why its parameters must stay; obstacles: why its output must.
    """

    module: nn.Module
    fqn: str
    affine: str | None
    channels: int
    fixed: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    readers: dict[nn.Module, None] = field(default_factory=dict)
    largest: Tensor | None = None

    def left(self, names: dict[nn.Module, str], reason: str) -> SmoothedLayer:
        return SmoothedLayer(self.fqn, tuple(names[reader] for reader in self.readers), False, reason)

    def holds(self, x: Tensor, offset: int) -> bool:
        """Whether the last dimension of `x`, in storage that begins at `offset`, is this source's channels."""
        c = self.channels
        return (
            x.shape[-1:] == (c,)
            and (c == 1 or x.stride(-1) == 1)
            and all(stride % c == 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)
            and (x.storage_offset() - offset) % c == 0
        )

    def see(self, x: Tensor) -> None:
        largest = x.detach().float().abs().reshape(-1, self.channels).amax(0) if x.numel() else None
        if largest is not None:
            self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)


class _Flow(TorchDispatchMode):
    """Follows the outputs of sources through every operator to the Linear layers, or to whatever else reads them."""

    def __init__(self, model: nn.Module, filter_fn: FilterFn | None) -> None:
        super().__init__()
        self.names = {module: fqn for fqn, module in model.named_modules()}
        self.sources: dict[nn.Module, _Source] = {}
        self.fed_by: dict[nn.Module, set[_Source | None]] = {}  # Linear -> what its inputs came from
        self.owners: dict[int, set[nn.Module]] = {}  # storage -> modules that hold it as a parameter
        self._tags: dict[int, tuple[_Source, int]] = {}  # storage -> source and the offset its channels count from
        self._alive: list[Tensor] = []  # a storage that was freed would come back under the same number
        self._running: list[nn.Module] = []
        self._paused = False
        for fqn, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners.setdefault(_storage(parameter), set()).add(module)
            if (channels := _channels(module)) is None:
                continue
            source = _Source(module, fqn, None if as_linear(module) is not None else "unknown", channels)
            if filter_fn is not None and not filter_fn(module, fqn):
                source.obstacles.append("excluded by filter_fn")
            elif module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                source.fixed.append("it has hooks or another forward, which may compute something else")
            self.sources[module] = source

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        try:
            for source in self.sources.values():
                handles += self._watch(source)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, source: _Source) -> list[Any]:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._paused:
                return
            if source.affine is None and (x := first_tensor(args, kwargs)) is not None:
                self._read(module, x)
            self._running.append(module)

        def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if self._paused:
                return
            self._running.pop()
            if not isinstance(output, Tensor) or output.shape[-1:] != (source.channels,):
                source.obstacles.append("its output is no tensor with its channels last")
            elif _storage(output) in self._tags or not source.holds(output, output.storage_offset()):
                source.obstacles.append("its output is a view of another tensor")
                self._block(output, "another module's output is a view of it")
            else:
                if source.affine == "unknown" and not source.fixed:
                    source.affine = self._proportional(source, args, kwargs, output)
                self._tag(output, source)

        return [
            source.module.register_forward_pre_hook(before, with_kwargs=True),
            source.module.register_forward_hook(after, with_kwargs=True),
        ]

    def _tag(self, x: Tensor, source: _Source) -> None:
        self._tags[_storage(x)] = (source, x.storage_offset())
        self._alive.append(x)

    def _block(self, x: Tensor, reason: str) -> None:
        if (tag := self._tags.get(_storage(x))) is not None and reason not in tag[0].obstacles:
            tag[0].obstacles.append(reason)

    def _read(self, linear: nn.Module, x: Tensor) -> None:
        """A Linear is about to read `x`."""
        source, offset = self._tags.get(_storage(x), (None, 0))
        if source is not None and not source.holds(x, offset):
            self._block(x, f"{self.names[linear]} reads its channels in another order")
            source = None
        self.fed_by.setdefault(linear, set()).add(source)
        if source is not None:
            source.readers[linear] = None
            self._paused = True
            source.see(x)
            self._paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not self._paused:
            self._operator(func, args, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)], output)
        return output

    def _operator(self, func: Any, args: tuple, read: list[Tensor], output: Any) -> None:
        for x in read:
            for owner in self.owners.get(_storage(x), ()):
                if owner in self.sources and owner not in self._running:
                    self.sources[owner].fixed.append(f"its weight is also read by {_name(func)}")
        if self._running and self.sources[self._running[-1]].affine is None:
            return  # inside a Linear, whose input was judged by its hook
        tagged = [x for x in read if _storage(x) in self._tags]
        if not tagged:
            return
        results = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        storages = {_storage(x) for x in tagged}
        if not func._schema.is_mutable and results and all(_storage(t) in storages for t in results):
            return  # a view
        source, offset = self._tags[_storage(tagged[0])]
        passes = func in _COMMUTING or (func in _PRODUCTS and args[0] is tagged[0]) or func is _aten.mul.Tensor
        if (
            passes
            and len(tagged) == 1
            and len(results) == 1
            and results[0].is_floating_point()
            and results[0].shape == tagged[0].shape
            and source.holds(tagged[0], offset)
            and source.holds(results[0], results[0].storage_offset())
        ):
            if _storage(results[0]) not in self._tags:  # relu_ works in place
                self._tag(results[0], source)
            return
        for x in tagged:
            self._block(x, f"its output is also read by {_name(func)}, which the factors would change")

    def _proportional(self, source: _Source, args: tuple, kwargs: dict, output: Tensor) -> str:
        """Finds out by trying what the output is proportional to."""
        factor = 2.0 ** (torch.arange(source.channels) % 5 - 2)
        self._paused = True
        try:
            for affine in ("weight", "1 + weight"):
                divided = functional_call(source.module, _divided(source.module, affine, factor), args, kwargs)
                off = (divided.double() * factor - output.double()).abs().max() if output.numel() else torch.tensor(0.0)
                if off <= 1e-5 * output.double().abs().max():
                    return affine
        finally:
            self._paused = False
        source.obstacles.append("its output is not proportional to its weight")
        return "unknown"

    def end(self, output: Any) -> None:
        """After each call of the model: its outputs are read by the caller."""
        for x in tensors(output):
            self._block(x, "its output is an output of the model")
        self._tags.clear()
        self._alive.clear()

    def obstacle(self, source: _Source) -> str | None:
        """Why the factors cannot be folded, or None."""
        if source.fixed or source.obstacles:
            return (source.fixed + source.obstacles)[0]
        if source.affine == "unknown":
            return "not called by the calibration inputs"
        if not source.readers:
            return "no Linear layer reads its output"
        for module in (source.module, *source.readers):
            for parameter in module._parameters.values():
                if parameter is not None and len(self.owners[_storage(parameter)]) > 1:
                    return f"{self.names[module] or 'the model'} shares a parameter with another module"
        for reader in source.readers:
            if self.fed_by[reader] != {source}:
                return f"{self.names[reader]}, which reads it, also reads something else"
            if fixed := self.sources[reader].fixed:
                return f"{self.names[reader]} reads it, but {fixed[0]}"
        if source.largest is None or not bool(source.largest.isfinite().all()):
            return "NaN or infinity was observed in its output" if source.largest is not None else "its output is empty"
        return None


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _name(func: Any) -> str:
    return str(func).rpartition(".")[0] or str(func)


def _channels(module: nn.Module) -> int | None:
    """Of a Linear, or of a module that can be a norm: without children, with one weight, and perhaps a bias, [C]."""
    if (linear := as_linear(module)) is not None:
        return linear.out_features
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    weight = parameters.get("weight")
    if weight is None or weight.ndim != 1 or module._modules or not weight.is_floating_point():
        return None
    if parameters.keys() - {"weight", "bias"} or any(p.shape != weight.shape for p in parameters.values()):
        return None
    return len(weight)


def _divided(module: nn.Module, affine: str | None, factor: Tensor) -> dict[str, Tensor]:
    """The module's parameters with its output divided by `factor` per channel."""
    weight = module.weight.detach()
    factor = factor.to(weight.dtype)
    if affine is None:
        divided = {"weight": weight / factor[:, None]}
    elif affine == "1 + weight":
        divided = {"weight": (1 + weight) / factor - 1}
    else:
        divided = {"weight": weight / factor}
    if module._parameters.get("bias") is not None:
        divided["bias"] = module.bias.detach() / factor
    return divided


def _fold(source: _Source, flow: _Flow, alpha: float) -> SmoothedLayer:
    readers = [as_linear(reader) for reader in source.readers]
    columns = torch.stack([reader.weight.detach().float().abs().amax(0) for reader in readers]).amax(0)
    rows = source.largest
    usable = (rows >= SMALLEST_RANGE) & (columns >= SMALLEST_RANGE) & columns.isfinite()
    exponent = alpha * rows.log2() - (1 - alpha) * columns.log2()
    exponent = torch.where(usable, exponent, 0.0).round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    factor = exponent.exp2()
    with torch.no_grad():
        target = as_linear(source.module) if source.affine is None else source.module
        for name, value in _divided(target, source.affine, factor).items():
            target._parameters[name].copy_(value)
        for reader in readers:
            reader.weight.mul_(factor.to(reader.weight.dtype))
    return SmoothedLayer(
        source.fqn,
        tuple(flow.names[reader] for reader in source.readers),
        True,
        "folded",
        _outlier(rows),
        _outlier(rows / factor),
    )


def _outlier(channels: Tensor) -> float:
    median = channels.median().item()
    return channels.max().item() / median if median > 0 else float("inf")
