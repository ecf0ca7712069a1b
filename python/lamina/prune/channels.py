"""Whole output channels out of a model, with everything that reads them: smaller dense layers, fast everywhere.

Which layers hang together is torch-pruning's work ("DepGraph: Towards Any Structural Pruning", Fang et al. 2023,
arXiv:2301.12900). A dependency that it gets wrong (heads of an attention, a norm over channels) would scramble the
model without an error, so every cut is tried on a copy first, and must give what the whole model gives with these
channels set to zero.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from lamina.configs import by_name
from lamina.prune.patterns import Pattern, check_sparsity
from lamina.running import ExampleInputs, FilterFn, caller, evaluating, outputs, relative_error
from lamina.swap import LayerDecision, SwapReport, describe

_ROOTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# In float64: sums of the same numbers in another order differ by far less, also where parts of a model cast to float32.
_SAME = 1e-6


@dataclass(frozen=True)
class ChannelReport(SwapReport):
    """What became of every layer; parameters_before, parameters_after: how many numbers the model has."""

    parameters_before: int = 0
    parameters_after: int = 0

    def summary(self) -> str:
        return (
            f"{len(self.swapped)} of {len(self.decisions)} layers lost channels; "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        )


def channels_(
    model: nn.Module,
    example_inputs: ExampleInputs,
    sparsity: float | Mapping[str, float] = 0.5,
    *,
    round_to: int = 1,
    filter_fn: FilterFn | None = None,
) -> ChannelReport:
    """Cut the output channels of least magnitude out of linear and convolutional layers, in place: tensors shrink.

    A channel goes from its layer, from batch norms behind it and from all layers that read it; layers whose outputs are
    added together lose the same channels. Afterwards the model computes what it did with these channels set to zero.
    Fine-tune it then, with an optimizer made afterwards: the parameters are new ones.

    Args:
        model: needs no gradients, and gets its modes back.
        example_inputs: tuple of positional or dict of keyword arguments, for the trace and the check.
        sparsity: share of the channels that go, 0 to below 1; or a policy by layer name, as in `magnitude_`.
        round_to: keep a multiple of so many channels; 8 or 16 fits vector registers.
        filter_fn: `filter_fn(module, fqn) -> bool`, False leaves the layer alone.

    Returns the report. Left alone, with the reason: layers that give the model's output, whose channels are normalized
    together (LayerNorm) or split into heads, and all others whose cut does not pass the check. Raises ImportError
    without torch-pruning, ValueError for a sparsity or round_to out of range and for a model that cannot be traced,
    TypeError for other example inputs; the model is then as it was.

    >>> print(lamina.prune.channels_(model, (x,), 0.5, round_to=8))
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_pruning
    except ImportError as error:
        raise ImportError("channels_ traces dependencies with torch-pruning: pip install lamina[prune]") from error
    if round_to < 1:
        raise ValueError(f"channels_: round_to is {round_to}, but must be at least 1")
    policy = by_name(sparsity if isinstance(sparsity, Mapping) else {"_default": sparsity}, _check_share)
    surgeon = _Surgeon(torch_pruning, example_inputs, round_to)
    before = sum(parameter.numel() for parameter in model.parameters())
    decisions: dict[str, LayerDecision] = {}
    cuts: list[tuple[str, list[int]]] = []
    shrunk: set[str] = set()
    work = copy.deepcopy(model).double().requires_grad_(True)
    layers = {fqn: module for fqn, module in model.named_modules() if isinstance(module, _ROOTS)}
    was = {fqn: describe(module) for fqn, module in layers.items()}
    fixed = {fqn: why for fqn, module in layers.items() if (why := _excluded(module, fqn, policy, filter_fn))}
    for fqn in layers:
        if fqn in shrunk:
            continue  # its channels went with those of a layer before it
        found = fixed[fqn] if fqn in fixed else surgeon.cut(work, fqn, policy(fqn), fixed)
        if isinstance(found, str):
            decisions[fqn] = LayerDecision(fqn, was[fqn], None, found)
        else:
            work, indices, names = found
            cuts.append((fqn, indices))
            shrunk |= names
    surgeon.repeat(model, cuts)
    for fqn in shrunk:
        now = describe(model.get_submodule(fqn))
        decisions[fqn] = LayerDecision(fqn, was[fqn], now, "channels of least magnitude cut out")
    return ChannelReport(
        tuple(decisions[fqn] for fqn, _ in model.named_modules() if fqn in decisions),
        before,
        sum(parameter.numel() for parameter in model.parameters()),
    )


def _excluded(module: nn.Module, fqn: str, policy: Callable[[str], Any], filter_fn: FilterFn | None) -> str:
    if filter_fn is not None and not filter_fn(module, fqn):
        return "excluded by filter_fn"
    if policy(fqn) is None:
        return "the sparsities do not name it"
    if parametrize.is_parametrized(module):
        return "its weight has a mask; take it off with lamina.prune.bake_ first"
    if type(module) not in _ROOTS:
        return f"{type(module).__name__} is a subclass and may compute something else"
    return ""


def _check_share(value: float) -> float:
    if check_sparsity(value, Pattern("channels"), "channels_") == 1.0:
        raise ValueError("channels_: sparsity is 1, but a layer needs at least one channel")
    return value


class _Surgeon:
    """Cuts channels and checks the result; what it knows of torch-pruning's objects stays in here."""

    def __init__(self, library: Any, example_inputs: ExampleInputs, round_to: int) -> None:
        self.library, self.round_to = library, round_to
        caller(example_inputs, "channels_: example_inputs")  # a TypeError for other kinds
        self.example_inputs = example_inputs
        self._traced: tuple[nn.Module, nn.Module, Any] | None = None

    def call(self, model: nn.Module) -> Any:
        """Runs the model on the example inputs, in its own precision."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        inputs = tree_map(
            lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, self.example_inputs
        )
        return caller(inputs, "channels_: example_inputs")(model)

    def graph(self, model: nn.Module) -> Any:
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval()
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.library.DependencyGraph().build_dependency(
                    model,
                    example_inputs=(),
                    forward_fn=lambda traced, inputs: self.call(traced),
                    verbose=False,
                )
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(f"channels_: the model cannot be traced: {' '.join(str(error).split())[:200]}") from None
        finally:
            for module, training in modes.items():
                module.training = training

    def run(self, model: nn.Module) -> list[Tensor]:
        with evaluating(model):
            return outputs(self.call, model)

    def _copy_of(self, model: nn.Module) -> tuple[nn.Module, Any]:
        """A copy that may be cut, and its graph; the last one again if it has not been cut."""
        if self._traced is None or self._traced[0] is not model:
            trial = copy.deepcopy(model)
            self._traced = model, trial, self.graph(trial)
        return self._traced[1:]

    def cut(
        self, model: nn.Module, fqn: str, share: float, fixed: Mapping[str, str]
    ) -> tuple[nn.Module, list[int], set[str]] | str:
        """A copy of the model without the channels, which ones, and which layers lost them; or why there is none.

        fixed: the layers that must keep all of theirs.
        """
        trial, graph = self._copy_of(model)
        root = trial.get_submodule(fqn)
        if root not in graph.module2node:
            return "not called by the example inputs"
        prune_out = graph.get_pruner_of_module(root).prune_out_channels
        channels = graph.get_out_channels(root)
        keep = min(channels, max(1, -(-round(channels * (1 - share)) // self.round_to)) * self.round_to)
        if keep == channels:
            return f"{channels} channels cannot become fewer at this sparsity and round_to"
        one = graph.get_pruning_group(root, prune_out, [0])
        if (reason := self._refusal(graph, one)) is not None:
            return reason
        if tied := [name for name in self._names(graph, one) if name in fixed]:
            return f"its channels go with those of {tied[0]}: {fixed[tied[0]]}"
        whole = graph.get_pruning_group(root, prune_out, list(range(channels)))
        if any(self._cuts_outputs(graph, dep) and len(indices) != channels for dep, indices in whole):
            return "its channels meet those of another layer several at a time"
        importance = self.library.importance.GroupMagnitudeImportance(p=2)(whole)
        indices = sorted(importance.argsort(stable=True)[: channels - keep].tolist())
        group = graph.get_pruning_group(root, prune_out, indices)
        expected = self.run(self._zeroed(model, graph, group))
        names = set(self._names(graph, group))
        group.prune()
        self._traced = None
        try:
            error = relative_error(self.run(trial), expected)
        except (RuntimeError, ValueError, TypeError) as failure:
            return f"the model does not run without its channels: {' '.join(str(failure).split())[:120]}"
        if not error <= _SAME:
            return "without them the model does not compute what it does with them set to zero"
        return trial, indices, names

    def _refusal(self, graph: Any, group: Any) -> str | None:
        readers = False
        for dep, _ in group:
            module = dep.target.module
            if isinstance(module, nn.Parameter):
                return f"its channels are added to {graph._param_to_name[module]}, a parameter of the model's own"
            if isinstance(module, _ROOTS):
                readers |= graph.is_in_channel_pruning_fn(dep.handler)
            elif any(True for _ in module.parameters(recurse=False)) and not isinstance(module, _BATCH_NORMS):
                name = graph._module2name[module]
                return f"its channels go through {name}, a {type(module).__name__}, which does not take them one by one"
        return None if readers else "its channels are the model's output"

    def _names(self, graph: Any, group: Any) -> list[str]:
        """The layers whose own channels go, beside those that read them."""
        return [graph._module2name[dep.target.module] for dep, _ in group if self._cuts_outputs(graph, dep)]

    def _cuts_outputs(self, graph: Any, dep: Any) -> bool:
        return isinstance(dep.target.module, _ROOTS) and graph.is_out_channel_pruning_fn(dep.handler)

    def _zeroed(self, model: nn.Module, graph: Any, group: Any) -> nn.Module:
        """A copy of the whole model with the channels of a group set to zero wherever they are written or read."""
        masked = copy.deepcopy(model)
        with torch.no_grad():
            for dep, indices in group:
                module = dep.target.module
                if not any(True for _ in module.parameters(recurse=False)):
                    continue
                here = masked.get_submodule(graph._module2name[module])
                transposed = isinstance(here, _ROOTS[4:])
                writes = not isinstance(here, _ROOTS) or graph.is_out_channel_pruning_fn(dep.handler)
                if here.weight is not None:
                    here.weight.index_fill_(
                        int(writes == transposed and here.weight.dim() > 1), torch.tensor(indices), 0.0
                    )
                if writes and here.bias is not None:
                    here.bias[indices] = 0.0
        return masked

    def repeat(self, model: nn.Module, cuts: list[tuple[str, list[int]]]) -> None:
        """Makes the same cuts in another copy of the model that was tried."""
        training = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(True)
        try:
            for fqn, indices in cuts:
                graph = self.graph(model)
                root = model.get_submodule(fqn)
                graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, indices).prune()
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(training[name])
