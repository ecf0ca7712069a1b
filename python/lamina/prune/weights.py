"""The weights that can be pruned, where they are and how they are laid out; the masks that hold their zeros."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from lamina.configs import by_name
from lamina.prune.patterns import Pattern, check_sparsity, energies, parse
from lamina.running import FilterFn

# Layers, by the class they have without parametrizations, and how their weights become [groups, outputs, taps, inputs].
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)
_RNNS = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_IN_PROJ = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Mask(nn.Module):
    """The parametrization that holds zeros: weight -> weight where the mask is True, 0 elsewhere.

    mask: bool, of the weight's shape, a buffer that is saved with the model. Gradients of what is masked are zero, and
    whatever an optimizer does to it (momentum, weight decay) never reaches the layer. importance: one number a block,
    a buffer too where a `GradualPruner` scores by gradients, else None.
    """

    def __init__(self, mask: Tensor, importance: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("importance", importance)

    def forward(self, weight: Tensor) -> Tensor:
        return weight.masked_fill(~self.mask, 0.0)


@dataclass(frozen=True)
class Weight:
    """One weight of one layer.

    fqn: the parameter's name in the model; layer: the module's; module, name: where it is; layout: "linear" (outputs
    first), "conv", "transposed conv" or "transposed" (inputs first); groups: of a convolution.
    """

    fqn: str
    layer: str
    module: nn.Module
    name: str
    layout: str = "linear"
    groups: int = 1

    @property
    def mask(self) -> Mask | None:
        """The mask that holds its zeros, if one does."""
        if not parametrize.is_parametrized(self.module, self.name):
            return None
        return next((p for p in self.module.parametrizations[self.name] if isinstance(p, Mask)), None)

    @property
    def stored(self) -> Tensor:
        """The parameter that an optimizer has: with a mask on it, what is below."""
        if parametrize.is_parametrized(self.module, self.name):
            return self.module.parametrizations[self.name].original
        return self.module._parameters[self.name]

    def value(self) -> Tensor:
        """What the layer computes with, without gradients."""
        return getattr(self.module, self.name).detach()

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [groups, outputs, taps, inputs]."""
        if self.layout == "linear":
            return tensor[None, :, None, :]
        if self.layout == "transposed":
            return tensor.t()[None, :, None, :]
        first, second = tensor.shape[0] // self.groups, tensor.shape[1]
        grouped = tensor.reshape(self.groups, first, second, -1)
        return grouped.permute(0, 1, 3, 2) if self.layout == "conv" else grouped.permute(0, 2, 3, 1)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`, contiguous."""
        if self.layout == "linear":
            return matrix[0, :, 0].contiguous()
        if self.layout == "transposed":
            return matrix[0, :, 0].t().contiguous()
        grouped = matrix.permute(0, 1, 3, 2) if self.layout == "conv" else matrix.permute(0, 3, 1, 2)
        return grouped.reshape(self.stored.shape).contiguous()

    def keep(self, mask: Tensor) -> None:
        """Zeroes what is False in a mask of the weight's shape, and for good where a mask holds the weight."""
        with torch.no_grad():
            self.stored.masked_fill_(~mask, 0.0)
            if self.mask is not None:
                self.mask.mask.logical_and_(mask)

    def hold(self, mask: Tensor) -> Mask:
        """Puts a mask on the weight; the parameter stays the same object, for optimizers that have it already."""
        held = Mask(mask)
        parametrize.register_parametrization(self.module, self.name, held)
        return held

    def bake(self) -> None:
        """Takes the mask off and leaves the zeros in the parameter."""
        parametrize.remove_parametrizations(self.module, self.name, leave_parametrized=True)
        # The flat list that nn.LSTM and its like compute from follows assignments only.
        setattr(self.module, self.name, self.module._parameters[self.name])


@dataclass(frozen=True)
class WeightReport:
    """What is zero of one weight. `reason`: why it was left alone, "" if it was not.

    sparsity: share of its elements that are zero; blocks: of the pattern; zero_blocks: how many of them are all zeros.
    """

    fqn: str
    shape: tuple[int, ...]
    pattern: str
    sparsity: float
    blocks: int
    zero_blocks: int
    reason: str = ""

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class PruneReport:
    """What became of every weight that can be pruned; printing it shows a table."""

    weights: tuple[WeightReport, ...]

    @property
    def pruned(self) -> tuple[WeightReport, ...]:
        return tuple(weight for weight in self.weights if not weight.reason)

    @property
    def left(self) -> tuple[WeightReport, ...]:
        return tuple(weight for weight in self.weights if weight.reason)

    @property
    def sparsity(self) -> float:
        """Share of zeros in all pruned weights together."""
        elements = sum(weight.elements for weight in self.pruned)
        return sum(weight.sparsity * weight.elements for weight in self.pruned) / elements if elements else 0.0

    def summary(self) -> str:
        return f"{self.sparsity:.1%} of {len(self.pruned)} weights are zero, {len(self.left)} were left alone"

    def __str__(self) -> str:
        table = Table("weight", "shape", "pattern", "zeros", "blocks left", "why left alone")
        for weight in self.weights:
            kept = f"{weight.blocks - weight.zero_blocks:,} of {weight.blocks:,}"
            shape = "x".join(map(str, weight.shape))
            table.add_row(weight.fqn, shape, weight.pattern, f"{weight.sparsity:.1%}", kept, weight.reason)
        console = Console(file=StringIO(), width=140)
        console.print(table)
        return f"{self.summary()}\n{console.file.getvalue()}"


def describe(weight: Weight, pattern: Pattern, reason: str = "") -> WeightReport:
    """What of a weight is zero now."""
    value = weight.value()
    if value.is_meta or not value.numel():
        return WeightReport(weight.fqn, tuple(value.shape), pattern.name, 0.0, 0, 0, reason)
    nonzero = weight.matrix(value) != 0
    blocks = energies(nonzero.float(), pattern)
    return WeightReport(
        fqn=weight.fqn,
        shape=tuple(value.shape),
        pattern=pattern.name,
        sparsity=(nonzero.numel() - int(nonzero.sum())) / nonzero.numel(),
        blocks=blocks.numel(),
        zero_blocks=int((blocks == 0).sum()),
        reason=reason,
    )


def weights(model: nn.Module) -> Iterator[Weight]:
    """The weights of `model` that can be pruned, each once, in the order of named_modules.

    Those of torch's linear, convolutional and recurrent layers, the input projections of nn.MultiheadAttention, and
    transformers' Conv1D. Subclasses may compute something else and are not taken.
    """
    for layer, module in model.named_modules():
        kind = type(module)
        if parametrize.is_parametrized(module):
            kind = kind.__mro__[1]  # the class that parametrize derived its own from
        for name, layout, groups in _weights_of(kind, module):
            if name in module._parameters or parametrize.is_parametrized(module, name):
                yield Weight(f"{layer}.{name}" if layer else name, layer, module, name, layout, groups)


def _weights_of(kind: type[nn.Module], module: nn.Module) -> Iterator[tuple[str, str, int]]:
    if kind in _LINEARS:
        yield "weight", "linear", 1
    elif kind in _CONVS:
        yield "weight", "conv", module.groups
    elif kind in _TRANSPOSED_CONVS:
        yield "weight", "transposed conv", module.groups
    elif kind is nn.MultiheadAttention:
        for name in _IN_PROJ:
            if getattr(module, name, None) is not None:
                yield name, "linear", 1
    elif kind in _RNNS:
        names = dict.fromkeys([*module._parameters, *getattr(module, "parametrizations", ())])
        # In torch's order, which a mask on one of them must not change.
        order = getattr(module, "_flat_weights_names", ("weight_ih", "weight_hh"))
        for name in order:
            if name.startswith("weight_") and name in names:
                yield name, "linear", 1
    elif _is_conv1d(kind):
        yield "weight", "transposed", 1


def _is_conv1d(kind: type[nn.Module]) -> bool:
    home = sys.modules.get("transformers.pytorch_utils")  # a layer of it cannot exist before the import
    return home is not None and kind is home.Conv1D


class Taken:
    """The weights of a model that somebody wants to prune.

    weights: all of them, in the model's order; shares: fqn -> the share of zeros that is asked for; reasons: fqn -> why
    a weight is left alone.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str,
        filter_fn: FilterFn | None,
        what: str,
        sparsity: float | Mapping[str, float] | None = None,
    ) -> None:
        """`what` names the caller in errors: ValueError for a pattern, a sparsity or a model that is none."""
        self.pattern = parse(pattern, what)
        self.weights = tuple(weights(model))
        if not self.weights:
            raise ValueError(f"{what}: the model has no linear, convolutional or recurrent layer to prune")
        self.shares: dict[str, float] = {}
        self.reasons: dict[str, str] = {}
        share_of = _policy(sparsity, self.pattern, what)
        owners: dict[nn.Parameter, dict[nn.Module, str]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(parameter, {})[module] = name
        for weight in self.weights:
            share = share_of(weight.layer)
            if filter_fn is not None and not filter_fn(weight.module, weight.layer):
                self.reasons[weight.fqn] = "excluded by filter_fn"
            elif share is None and sparsity is not None:
                self.reasons[weight.fqn] = "the sparsities do not name its layer"
            elif reason := _refusal(weight, owners):
                self.reasons[weight.fqn] = reason
            else:
                self.shares[weight.fqn] = share

    @property
    def chosen(self) -> list[Weight]:
        return [weight for weight in self.weights if weight.fqn not in self.reasons]

    def report(self) -> PruneReport:
        """What is zero now."""
        return PruneReport(
            tuple(describe(weight, self.pattern, self.reasons.get(weight.fqn, "")) for weight in self.weights)
        )


def _policy(sparsity: float | Mapping[str, float] | None, pattern: Pattern, what: str) -> Callable[[str], float | None]:
    if isinstance(sparsity, Mapping):
        return by_name(sparsity, lambda value: check_sparsity(value, pattern, what))
    value = None if sparsity is None else check_sparsity(sparsity, pattern, what)
    return lambda fqn: value


def _refusal(weight: Weight, owners: Mapping[nn.Parameter, Mapping[nn.Module, str]]) -> str:
    holder = weight.module
    if parametrize.is_parametrized(weight.module, weight.name):
        holder = weight.module.parametrizations[weight.name]
        if weight.mask is None or len(holder) > 1:
            return "it has a parametrization that is not lamina's, and is computed anew at every call"
    stored = weight.stored
    if stored.is_meta:
        return "it is on meta and has no values"
    if not stored.is_floating_point():
        return f"it is {stored.dtype}, and only floating-point weights can be pruned"
    if not torch.isfinite(stored).all():
        return "it has NaN or infinite values"
    others = [name for module, name in owners[stored].items() if module is not holder]
    return f"it is also the weight of {others[0]}, which would be pruned with it" if others else ""


def report(model: nn.Module, pattern: str = "unstructured", filter_fn: FilterFn | None = None) -> PruneReport:
    """What of each weight of `model` is zero, as blocks of `pattern`; nothing is changed.

    >>> print(lamina.prune.report(model, "4x4"))
    """
    return Taken(model, pattern, filter_fn, "report").report()
