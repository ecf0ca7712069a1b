"""swap_: rewrite a model in place, layer by layer.

A handler turns one config into candidates; it is registered for the config's type with `@handles(Config)`. Nothing here
knows a model by name, and a layer that cannot be taken is never an error: it is left alone and the report says why.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from types import MethodType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from lamina._backends import has_triton
from lamina.configs import (
    Config,
    ConfigLike,
    FusedAttention,
    FusedConv,
    FusedRNN,
    Int4WeightOnly,
    Int8Dynamic,
    Int8RNN,
    Int8Static,
    Int8WeightOnly,
    Sparse,
    SparseInt8,
    resolve,
)
from lamina.nn.attention import LAYERS, ScaledDotProductAttention, adopt, in_proj_of, put_in_proj, release
from lamina.nn.conv import Conv2d
from lamina.nn.convs import Conv, as_conv, conv_class
from lamina.nn.int8_conv import Int8Conv1d, Int8Conv2d, Int8ConvTranspose2d
from lamina.nn.int8_linear import Int8Linear
from lamina.nn.linears import as_linear, stand_in
from lamina.nn.rnn import GRU, LSTM, RNN, GRUCell, Int8GRU, Int8LSTM, LSTMCell, RNNCell
from lamina.nn.sparse_conv import SparseConv2d
from lamina.nn.sparse_int8_linear import SparseInt8Linear
from lamina.nn.sparse_linear import SparseLinear
from lamina.nn.weight_only_linear import Int4WeightOnlyLinear, Int8WeightOnlyLinear
from lamina.ops.sparse_int8_linear import BREAK_EVEN_DENSITY, block_density
from lamina.ops.sparse_linear import sparse_kernel
from lamina.quant.calibration import Calibration, observe, takes_static_scale
from lamina.quant.observers import make_observer
from lamina.rerouted import rerouted_methods
from lamina.running import FilterFn
from lamina.sparsity import choose_pattern, choose_semi_structured


@dataclass(frozen=True)
class LayerDecision:
    """What became of one layer.

    fqn: its name in the model; was, now: what stood and stands there (`now` None: left alone); reason: why, in words;
    speedup, error: measured on the layer's own inputs, where `accelerate` measured (was time / now time; relative error
    of the output, |now - was| / |was|).
    """

    fqn: str
    was: str
    now: str | None
    reason: str
    speedup: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class SwapReport:
    """What became of every layer that a config concerns; printing it shows a table."""

    decisions: tuple[LayerDecision, ...]

    @property
    def swapped(self) -> tuple[LayerDecision, ...]:
        return tuple(d for d in self.decisions if d.now is not None)

    @property
    def left(self) -> tuple[LayerDecision, ...]:
        return tuple(d for d in self.decisions if d.now is None)

    def summary(self) -> str:
        return f"{len(self.swapped)} of {len(self.decisions)} layers replaced"

    def __str__(self) -> str:
        measured = any(d.speedup is not None for d in self.decisions)
        table = Table("layer", "was", "now", *(("speedup", "error") if measured else ()), "why")
        for d in self.decisions:
            numbers = (_ratio(d.speedup), _error(d.error)) if measured else ()
            table.add_row(d.fqn or "(model)", d.was, d.now or "-", *numbers, d.reason)
        console = Console(file=StringIO(), width=140)
        console.print(table)
        return f"{self.summary()}\n{console.file.getvalue()}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


@dataclass(frozen=True)
class Candidate:
    """A replacement that can be put in and taken out again. `before` and `after` compute the same.

    note: what its user should know besides, for the reason in the report. first: to be tried before all others,
    since it changes what is around them.
    """

    fqn: str
    was: str
    now: str
    module: nn.Module
    before: Callable[..., Any]
    after: Callable[..., Any]
    apply: Callable[[], None]
    revert: Callable[[], None]
    note: str = ""
    first: bool = False

    def reason(self, why: str) -> str:
        return f"{why}; {self.note}" if self.note else why


@dataclass(frozen=True)
class Site:
    """A module and all the places where it stands: (parent, attribute) pairs, none for the model itself.

    sharers: (name, module) of the other modules that own its weight too. attention: where `module` is no module of the
    model, but the input projections that this attention layer has as parameters. around:
    the attention layers of torch, or of lamina in their place, that it stands in.
    """

    fqn: str
    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...]
    sharers: tuple[tuple[str, nn.Module], ...] = ()
    attention: nn.MultiheadAttention | None = None
    around: tuple[nn.Module, ...] = ()


# What a handler says of a site: a candidate, a reason to leave it alone, or None if it does not concern the config.
Handler = Callable[[Site, Config], Candidate | str | None]
_HANDLERS: dict[type[Config], Handler] = {}

# Sees the model and, of each config of its type, the sites that the config may take, before the first handler is asked;
# returns what each of these configs is exchanged for, which has a handler of its own.
Preparer = Callable[[nn.Module, dict[Config, list[Site]]], dict[Config, Config]]
_PREPARERS: dict[type[Config], Preparer] = {}


def handles(config: type[Config]) -> Callable[[Handler], Handler]:
    """Registers the handler of a config type."""

    def register(handler: Handler) -> Handler:
        _HANDLERS[config] = handler
        return handler

    return register


def prepares(config: type[Config]) -> Callable[[Preparer], Preparer]:
    """Registers what a config type needs to know of the whole model before its layers are judged."""

    def register(preparer: Preparer) -> Preparer:
        _PREPARERS[config] = preparer
        return preparer

    return register


def sites(model: nn.Module) -> Iterator[Site]:
    """Every module of `model` once, with all its places, in the order of named_modules."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    weights: dict[nn.Module, nn.Parameter] = {}
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for fqn, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((fqn, module))
            if name == "weight":
                weights[module] = parameter
    layers: dict[str, nn.Module] = {}
    for fqn, module in model.named_modules():
        around = tuple(layer for name, layer in layers.items() if not name or fqn.startswith(f"{name}."))
        sharers = tuple(s for s in owners.get(weights.get(module), ()) if s[1] is not module)
        yield Site(fqn, module, tuple(places.get(module, ())), sharers, None, around)
        if _original(module) is None:
            continue
        layers[fqn] = module
        if isinstance(module, nn.MultiheadAttention) and module._parameters["in_proj_weight"] is not None:
            name = f"{fqn}.in_proj" if fqn else "in_proj"
            yield Site(name, in_proj_of(module), (), (), module, (*around, module))


def _original(module: nn.Module) -> type[nn.Module] | None:
    """Which of torch's attention layers `module` is, by either class; None for subclasses too."""
    return next((theirs for theirs, ours in LAYERS.items() if type(module) in (theirs, ours)), None)


def candidates(
    model: nn.Module,
    config: ConfigLike | str,
    filter_fn: FilterFn | None,
    handlers: Mapping[type[Config], Handler] = _HANDLERS,
    *,
    alternatives: bool = False,
) -> Iterator[Candidate | LayerDecision]:
    """For every layer that `config` concerns: a candidate, or the decision to leave it alone and why.

    The first config that concerns a layer has the word; with `alternatives` all have, and a layer may come with several
    candidates, to choose from. `handlers`: what a config asks for, by its type; the default builds inference layers.
    """
    policy = resolve(config)
    places = list(sites(model))
    prepared = _prepare(model, policy, places)
    for site in places:
        reason = taken = None
        for item in policy(site.fqn):
            item = prepared.get(item, item)
            handler = handlers.get(type(item))
            if handler is None:
                raise TypeError(f"{item!r} has no handler")
            found = handler(site, item)
            if found is None:
                continue
            if filter_fn is not None and not filter_fn(site.module, site.fqn):
                found = "excluded by filter_fn"
            if isinstance(found, Candidate):
                taken = found
                yield found
            else:
                reason = reason or found
            if not alternatives:
                break
        if reason is not None and taken is None:
            yield LayerDecision(site.fqn, describe(site.module), None, reason)


def _prepare(
    model: nn.Module, policy: Callable[[str], tuple[Config, ...]], places: Sequence[Site]
) -> dict[Config, Config]:
    """What each config with a preparer is exchanged for. One call for all configs of a type: they may share a pass."""
    asked: dict[type[Config], dict[Config, list[Site]]] = {}
    for site in places:
        for item in policy(site.fqn):
            if type(item) in _PREPARERS:
                asked.setdefault(type(item), {}).setdefault(item, []).append(site)
    prepared: dict[Config, Config] = {}
    for kind, items in asked.items():
        prepared |= _PREPARERS[kind](model, items)
    return prepared


_FUSED_RNNS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
}


def describe(module: nn.Module) -> str:
    """ "Linear(768, 3072)": the type and, where the layer has them, inputs, outputs and the size of its kernel."""
    if type(module) in LAYERS.values():
        return f"lamina {type(module).__name__}"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        ours = "lamina " if type(module) in _FUSED_RNNS.values() else ""
        return f"{ours}{type(module).__name__}({module.input_size}, {module.hidden_size})"
    if isinstance(module, nn.modules.conv._ConvNd):
        ours = "lamina " if type(module) is Conv2d else ""
        kernel = "x".join(map(str, module.kernel_size))
        return f"{ours}{type(module).__name__}({module.in_channels}, {module.out_channels}, {kernel})"
    linear = module if isinstance(module, nn.Linear) else as_linear(module)
    if linear is None:
        return type(module).__name__
    name = "Linear" if isinstance(module, NonDynamicallyQuantizableLinear) else type(module).__name__
    return f"{name}({linear.in_features}, {linear.out_features})"


def swap_(model: nn.Module, config: ConfigLike, filter_fn: FilterFn | None = None) -> SwapReport:
    """Replace the layers of `model` that `config` concerns, in place; nothing is measured.

    Works on the layers a model is made of, whatever the model. Linear configs take nn.Linear, transformers' Conv1D and
    the projections of nn.MultiheadAttention; the int8 ones nn.Conv1d, nn.Conv2d and nn.ConvTranspose2d too.
    FusedAttention takes nn.MultiheadAttention and torch's Transformer layers, the attention of any transformers model
    that can exchange it, and the calls of scaled_dot_product_attention in a model's own modules, which get their
    methods with that one call exchanged. A module that stands in several places is replaced in all of them. A head that
    shares its weight with an embedding gets a copy of its own while the embedding keeps its floats; the report says by
    how much memory grows then.

    Left alone, with the reason in the report: layers in other dtypes than float32 and bfloat16, on devices that lamina
    has no kernels for (on a GPU those for linear layers, int8 convolutions and attention, by Triton), with NaN or
    infinite weights, with hooks, parametrized or patched, compiled by torch.compile, subclasses that may compute
    something else, and layers whose parent reads their weight instead of calling them.

    Args:
        model: any module. The weights of replaced layers no longer train; gradients still flow through them.
        config: a config, a sequence of configs, or a policy
            `{fqn or "re:pattern": config or None, "_default": config}`.
        filter_fn: `filter_fn(module, fqn) -> bool`, False leaves the layer alone.

    Never raises for a layer it cannot take: the report says why it was left.

    >>> report = lamina.swap_(model, lamina.Int8Dynamic(), filter_fn=lambda module, fqn: "head" not in fqn)
    """
    return apply_all(candidates(model, config, filter_fn))


def apply_all(found: Iterable[Candidate | LayerDecision]) -> SwapReport:
    """Puts every candidate in."""
    decisions = []
    # All are judged before the first is applied: an error in filter_fn or in the policy must change nothing.
    for item in list(found):
        if isinstance(item, Candidate):
            item.apply()
            item = LayerDecision(item.fqn, item.was, item.now, item.reason("replaced as asked"))
        decisions.append(item)
    return SwapReport(tuple(decisions))


def replacement(
    site: Site, build: Callable[[], nn.Module], note: Callable[[nn.Module], str] | None = None
) -> Candidate | str:
    """The candidate that puts `build()` in every place of the site, or why it must not."""
    if not site.places:
        return "it is the model itself, and a model cannot be replaced inside itself; wrap it or use from_float"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(site.module, kind) for kind in hooks):
        return "it has hooks, which a replacement would lose"
    if (reason := _patched(site.module, site.places)) is not None:
        return reason
    try:
        new = build()
    except (ValueError, RuntimeError) as error:
        return str(error)

    def put(module: nn.Module) -> Callable[[], None]:
        def apply() -> None:
            for parent, name in site.places:
                parent._modules[name] = module

        return apply

    return Candidate(
        fqn=site.fqn,
        was=describe(site.module),
        now=describe(new),
        module=site.module,
        before=site.module,
        after=new,
        apply=put(new),
        revert=put(site.module),
        note=note(new) if note is not None else "",
    )


def _patched(module: nn.Module, places: Sequence[tuple[nn.Module, str]]) -> str | None:
    """Why a module must stay what it is, if something else than its class decides what a call of it runs."""
    if "forward" in vars(module):
        return "its forward was replaced by another function, which may compute something else"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "it is compiled by torch.compile; swap first, then compile"
    if any(is_compile_wrapper(parent) for parent, _ in places):
        return "torch.compile holds on to it; swap first, then compile"
    return None


def is_compile_wrapper(module: nn.Module) -> bool:
    """Whether `module` is what torch.compile(module) returns."""
    dynamo = sys.modules.get("torch._dynamo")  # nothing is compiled before it is imported, which takes a second
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


# Modules whose forward reads the weights of their Linear children instead of calling them.
_READS_CHILD_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def read_by_parent(site: Site) -> str | None:
    """Why the layer must stay what it is, if a module around it does not call it."""
    if site.attention is not None:
        return "it is a parameter of its MultiheadAttention, not a layer"
    for parent, _ in site.places:
        if isinstance(parent, _READS_CHILD_WEIGHTS) and type(parent) not in LAYERS.values():
            return f"its parent {type(parent).__name__} reads the weight itself instead of calling the layer"
    return None


def replace_linear(
    site: Site, build: Callable[[nn.Linear], nn.Module], *, kernels: str = "int8 kernels", packed: bool = False
) -> Candidate | str | None:
    """What a handler for linear layers says of a site: the candidate that puts `build(linear)` in its place.

    `build` gets the layer as an nn.Linear (`lamina.nn.linears`) and may raise ValueError or RuntimeError with the
    reason not to take it; everything that holds for every linear layer is refused here. `kernels` names what runs.
    `packed`: build gives a PackedLinear, which may stand in torch's attention layers too; those read weights instead of
    calling layers and become lamina's, which call them.

    >>> @handles(Int8Dynamic)
    ... def _int8_dynamic(site, config):
    ...     return replace_linear(site, Int8Linear.from_float, packed=True)
    """
    module, linear = site.module, as_linear(site.module)
    if linear is None:
        return _refuse_subclass(module) if isinstance(module, nn.Linear) else None
    owner = site.attention or next((p for p, _ in site.places if _original(p) in _READS_CHILD_WEIGHTS), None)
    if (owner is None or not packed) and (reason := read_by_parent(site)) is not None:
        return reason
    if (reason := _off(linear.weight.device, kernels)) is not None:
        return f"the weight is {reason}"
    if linear.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the weight is {linear.weight.dtype}, and {kernels} take float32 and bfloat16"
    if owner is None or not packed:
        return replacement(site, lambda: stand_in(build(linear), module), lambda new: _note_of_shared(site, new))
    if len(site.places) > 1:
        return "it stands in several places, one of them an attention layer"
    for layer in site.around:
        if (reason := _patched(layer, ())) is not None:
            return f"its {type(layer).__name__} must stay: {reason}"
    return _inside_attention(site, owner, lambda: build(linear))


def _off(device: torch.device, kernels: str, *, on_gpu: bool = True) -> str | None:
    """Why `kernels` do not run on a device, with where that is; `on_gpu`: whether there are any for GPUs."""
    if device.type == "cpu" or (on_gpu and device.type == "cuda" and has_triton()):
        return None
    if on_gpu and device.type == "cuda":
        return f"on {device}, and {kernels} need Triton there, which is not installed"
    return f"on {device}, and {kernels} run on the CPU{' and on GPUs' if on_gpu else ''}"


def _inside_attention(site: Site, owner: nn.Module, build: Callable[[], nn.Module]) -> Candidate | str:
    """The candidate for a linear layer in a MultiheadAttention or TransformerEncoderLayer, which becomes lamina's."""
    if site.attention is None:
        found = replacement(site, build)
        if isinstance(found, str):
            return found
        put, back = found.apply, found.revert
    else:
        try:
            projection = build()
        except (ValueError, RuntimeError) as error:
            return str(error)
        undo: list[Callable[[], None]] = []

        def put() -> None:
            if not undo:
                undo.append(put_in_proj(owner, projection))

        def back() -> None:
            if undo:
                undo.pop()()

        found = Candidate(site.fqn, describe(site.module), describe(projection), owner, put, back, put, back)

    def apply() -> None:
        for layer in site.around:
            adopt(layer, site.fqn)
        put()

    def revert() -> None:
        back()
        for layer in site.around:
            release(layer, site.fqn)

    found = replace(found, apply=apply, revert=revert)
    # A feed-forward layer is called and can be measured by itself; a projection is not.
    return _measured_in(owner, found) if isinstance(owner, nn.MultiheadAttention) else found


def _measured_in(module: nn.Module, candidate: Candidate) -> Candidate:
    """The candidate measured by calls of `module` with it and without."""

    def run(switch: Callable[[], None]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            switch()
            return module(*args, **kwargs)

        return call

    before, after = run(candidate.revert), run(candidate.apply)
    return replace(candidate, module=module, before=before, after=after)


def _refuse_subclass(module: nn.Module) -> str | None:
    if type(module).__module__.startswith("lamina.nn."):
        return None  # one of ours: nothing is left to do
    if parametrize.is_parametrized(module):
        return "its weight is parametrized, and is computed anew at every call"
    kind = next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules."))
    return f"{type(module).__name__} is a subclass of nn.{kind.__name__} and may compute something else"


def _note_of_shared(site: Site, new: nn.Module) -> str:
    """What becomes of a weight that other modules own too."""
    if not site.sharers:
        return ""
    names = ", ".join(name for name, _ in site.sharers)
    if all(as_linear(module) is not None for _, module in site.sharers):
        return f"it shared its weight with {names} and has a copy of its own now"
    size = sum(buffer.nbytes for buffer in new.buffers())
    return f"{names} keeps the weight it shared, so that memory grows by {size / 1e6:.1f} MB"


_INT8_CONVS = {nn.Conv1d: Int8Conv1d, nn.Conv2d: Int8Conv2d, nn.ConvTranspose2d: Int8ConvTranspose2d}


def replace_conv(
    site: Site, build: Callable[[Conv], nn.Module], *, kernels: str = "int8 kernels", on_gpu: bool = True
) -> Candidate | str | None:
    """What a handler for convolutions says of a site, as `replace_linear` does for linear layers."""
    module, conv = site.module, as_conv(site.module)
    if conv is None:
        return _refuse_subclass(module) if isinstance(module, tuple(_INT8_CONVS)) else None
    if (reason := _off(conv.weight.device, kernels, on_gpu=on_gpu)) is not None:
        return f"the weight is {reason}"
    if conv.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the weight is {conv.weight.dtype}, and {kernels} take float32 and bfloat16"
    return replacement(site, lambda: build(conv), lambda new: _note_of_shared(site, new))


def replace_int8(site: Site, input_scale: Callable[[], float | None]) -> Candidate | str | None:
    """The int8 layer in place of a linear layer or a convolution; `input_scale` may raise ValueError with a reason."""
    if isinstance(site.module, tuple(_INT8_CONVS)):
        return replace_conv(
            site, lambda conv: _INT8_CONVS[conv_class(conv)].from_float(conv, input_scale=input_scale())
        )
    return replace_linear(site, lambda linear: Int8Linear.from_float(linear, input_scale=input_scale()), packed=True)


@handles(Int8Dynamic)
def _int8_dynamic(site: Site, config: Config) -> Candidate | str | None:
    return replace_int8(site, lambda: None)


@dataclass(frozen=True)
class CalibratedInt8(Config):
    """An Int8Static after its pass over the data."""

    calibration: Calibration


@prepares(Int8Static)
def _calibrate(model: nn.Module, asked: dict[Config, list[Site]]) -> dict[Config, Config]:
    prepared: dict[Config, Config] = {
        c: CalibratedInt8(c.calibration) for c in asked if isinstance(c.calibration, Calibration)
    }
    sharing: dict[int, list[Config]] = {}
    for config in (c for c in asked if c not in prepared):
        sharing.setdefault(id(config.calibration), []).append(config)
    for configs in sharing.values():
        observed = [
            {
                site.fqn: (site.module, make_observer(config.observer, config.percentile))
                for site in asked[config]
                if takes_static_scale(site.module)
            }
            for config in configs
        ]
        found = observe(model, configs[0].calibration, observed, "Int8Static")
        prepared |= {config: CalibratedInt8(scales) for config, scales in zip(configs, found, strict=True)}
    return prepared


@handles(CalibratedInt8)
def _int8_static(site: Site, config: Config) -> Candidate | str | None:
    return replace_int8(site, lambda: config.calibration.scale(site.fqn))


@handles(SparseInt8)
def _sparse_int8(site: Site, config: SparseInt8) -> Candidate | str | None:
    def build(linear: nn.Linear) -> nn.Module:
        density, limit = block_density(linear.weight, config.pattern), BREAK_EVEN_DENSITY[config.pattern]
        if density >= limit:
            raise ValueError(
                f"{density:.0%} of its {config.pattern} blocks hold a nonzero, and above {limit:.0%} the dense int8 "
                "layer is as fast"
            )
        return SparseInt8Linear.from_float(linear, pattern=config.pattern)

    return _with_kernel(replace_linear(site, build, packed=True), site, config.pattern)


def _with_kernel(found: Candidate | str | None, site: Site, pattern: str) -> Candidate | str | None:
    """`found`, with a note where the device of the layer has no sparse kernel for the pattern."""
    weight = getattr(site.module, "weight", None)
    if not isinstance(found, Candidate) or weight is None:
        return found
    kernel = sparse_kernel(pattern, weight.device, weight.detach())
    return _noted(found, kernel) if kernel.startswith("dense") else found


def _noted(found: Candidate, note: str) -> Candidate:
    return replace(found, note="; ".join([note, *([found.note] if found.note else [])]))


@handles(Int8WeightOnly)
def _int8_weight_only(site: Site, config: Config) -> Candidate | str | None:
    return replace_linear(site, Int8WeightOnlyLinear.from_float, packed=True)


@handles(Int4WeightOnly)
def _int4_weight_only(site: Site, config: Int4WeightOnly) -> Candidate | str | None:
    build = functools.partial(Int4WeightOnlyLinear.from_float, group_size=config.group_size)
    return replace_linear(site, build, kernels="int4 kernels", packed=True)


@handles(Sparse)
def _sparse(site: Site, config: Sparse) -> Candidate | str | None:
    if isinstance(site.module, nn.Conv2d):
        build_conv = lambda conv: _sparse_conv(conv, config)  # noqa: E731
        return replace_conv(site, build_conv, kernels="sparse convolutions", on_gpu=False)
    chosen: list[str] = []

    def build(linear: nn.Linear) -> nn.Module:
        if linear.weight.numel() and bool(linear.weight.all()):
            raise ValueError("its weight has no zeros; prune it first")
        pattern = config.pattern
        if pattern == "auto":
            choice = choose_pattern(linear.weight, config.rows)
            if choice.pattern is None:
                raise ValueError(choice.reason)
            pattern = choice.pattern
            chosen.append(choice.reason)
        elif pattern == "2:4" and linear.weight.is_cuda and config.rows is not None:
            choice = choose_semi_structured(linear.weight, config.rows)
            if choice.speedup is not None and choice.pattern is None:
                raise ValueError(choice.reason)
        return SparseLinear.from_float(linear, pattern=pattern)

    found = replace_linear(site, build, kernels="sparse kernels", packed=True)
    if config.pattern != "auto":
        return _with_kernel(found, site, config.pattern)
    return _noted(found, *chosen) if isinstance(found, Candidate) else found


def _sparse_conv(conv: nn.Conv2d, config: Sparse) -> nn.Module:
    if conv.weight.numel() and bool(conv.weight.all()):
        raise ValueError("its weight has no zeros; prune it first")
    pattern = config.pattern
    if pattern == "auto":
        # Without the size of the images there is nothing to time: zeros are counted.
        choice = choose_pattern(conv.weight.flatten(1), None)
        if choice.pattern is None or choice.density > _CONV_DENSITY:
            raise ValueError(f"{choice.reason}, too few for a sparse convolution")
        pattern = choice.pattern
    return SparseConv2d.from_float(conv, pattern=pattern)


# The share of stored values up to which sparse convolutions beat dense ones at the sizes of ResNet.
_CONV_DENSITY = 0.25


@handles(FusedAttention)
def _fused_attention(site: Site, config: Config) -> Candidate | str | None:
    from lamina.models.attention import ScaledDotProductAttention as ReferenceAttention

    if type(site.module) is ReferenceAttention:
        return replacement(site, lambda: ScaledDotProductAttention.from_float(site.module))
    if (found := _own_calls(site)) is not None:
        return found
    if isinstance(site.module, tuple(LAYERS)):
        return _torch_attention(site)
    transformers = sys.modules.get("transformers")  # a model of it cannot exist before the import
    if transformers is None or not isinstance(site.module, transformers.PreTrainedModel):
        return None
    if any(isinstance(parent, transformers.PreTrainedModel) for parent, _ in site.places):
        return None  # the outer model decides for its parts
    return _transformers_attention(site)


def _own_calls(site: Site) -> Candidate | str | None:
    """For a module whose own methods call scaled_dot_product_attention: they are exchanged, on this instance."""
    module = site.module
    try:
        methods = rerouted_methods(module)
    except ValueError as reason:
        return str(reason)
    if not methods:
        return None
    own = vars(module)
    if all(isinstance(own.get(name), MethodType) and own[name].__func__ is new for name, new in methods.items()):
        return "it already uses lamina's attention"
    if (reason := _patched(module, site.places)) is not None:
        return reason

    def apply() -> None:
        own.update({name: MethodType(new, module) for name, new in methods.items()})

    def revert() -> None:
        for name in methods:
            own.pop(name, None)

    was, now = (f"{describe(module)} calling {whose} attention" for whose in ("torch's", "lamina's"))
    found = Candidate(site.fqn, was, now, module, module, module, apply, revert)
    return replace(_measured_in(module, found), first=True)


def _torch_attention(site: Site) -> Candidate | str:
    """nn.MultiheadAttention and the Transformer layers: they change their class and nothing else."""
    module = site.module
    original = _original(module)
    if original is None:
        base = next(kind for kind in LAYERS if isinstance(module, kind))
        return f"{type(module).__name__} is a subclass of nn.{base.__name__} and may compute something else"
    if type(module) is not original:
        return "it already uses lamina's attention"
    for parent, _ in site.places:
        if isinstance(parent, nn.TransformerEncoderLayer) and _original(parent) is None:
            return f"its parent {type(parent).__name__} reads its weights in evaluation instead of calling it"
    if (reason := _patched(module, site.places)) is not None:
        return reason
    for parameter in module.parameters():
        if (reason := _off(parameter.device, "attention kernels")) is not None:
            return f"it is {reason}"
    apply, revert = functools.partial(adopt, module, "attention"), functools.partial(release, module, "attention")
    now = f"lamina {original.__name__}"
    found = Candidate(site.fqn, describe(module), now, module, module, module, apply, revert)
    return replace(_measured_in(module, found), first=True)


def _transformers_attention(site: Site) -> Candidate | str:
    from lamina.integrations.transformers import register

    module = site.module
    was = module.config._attn_implementation
    if was == "lamina":
        return "it already uses lamina's attention"
    if was not in ("sdpa", "eager"):
        return f"it uses attn_implementation '{was}', which may compute something else"
    if not (getattr(module, "_supports_sdpa", False) or getattr(module, "_supports_attention_backend", False)):
        return "this transformers model does not support exchangeable attention"
    register()

    def switch(name: str) -> Callable[[], None]:
        return lambda: module.set_attn_implementation(name)

    found = Candidate(
        fqn=site.fqn,
        was=f"attention '{was}'",
        now="attention 'lamina'",
        module=module,
        before=module,
        after=module,
        apply=switch("lamina"),
        revert=switch(was),
    )
    return _measured_in(module, found)


def _replace_rnn(site: Site, kinds: Mapping[type[nn.Module], type[nn.Module]], what: str) -> Candidate | str | None:
    """The candidate that puts one of `kinds`, by the torch class, in the site's place, or why it must not."""
    module = site.module
    if not isinstance(module, tuple(kinds)) or type(module) in kinds.values():
        return None
    kind = kinds.get(type(module))
    name = next(base.__name__ for base in type(module).__mro__ if base in kinds)
    if kind is None:
        return f"{type(module).__name__} is a subclass of nn.{name} and may compute something else"
    weight = next(module.parameters())
    if (reason := _off(weight.device, f"{what} {name} kernels", on_gpu=False)) is not None:
        return f"the weights are {reason}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the weights are {weight.dtype}, and the {what} {name} takes float32 and bfloat16"
    return replacement(site, lambda: kind.from_float(module))


@handles(FusedRNN)
def _fused_rnn(site: Site, config: Config) -> Candidate | str | None:
    return _replace_rnn(site, _FUSED_RNNS, "fused")


@handles(Int8RNN)
def _int8_rnn(site: Site, config: Config) -> Candidate | str | None:
    return _replace_rnn(site, {nn.LSTM: Int8LSTM, nn.GRU: Int8GRU}, "int8")


@handles(FusedConv)
def _fused_conv(site: Site, config: FusedConv) -> Candidate | str | None:
    module = site.module
    if not isinstance(module, nn.Conv2d) or isinstance(module, Conv2d):
        return None
    if conv_class(module) is None:
        return _refuse_subclass(module)
    if (reason := _off(module.weight.device, "fused convolutions", on_gpu=False)) is not None:
        return f"the weight is {reason}"
    if module.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the weight is {module.weight.dtype}, and the fused convolution takes float32 and bfloat16"

    def build() -> nn.Module:
        layer = Conv2d.from_float(module, winograd=config.winograd)
        if config.channels_last:
            weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
            layer.weight = nn.Parameter(weight, module.weight.requires_grad)
        return layer

    return replacement(site, build)


def ordered(found: Sequence[Candidate]) -> list[Candidate]:
    """Inner layers first: a candidate that is measured through its parts must meet them as they will be."""

    def order(candidate: Candidate) -> tuple[bool, int]:
        return candidate.first, candidate.fqn.count(".") if candidate.fqn else -1

    return sorted(found, key=order, reverse=True)
