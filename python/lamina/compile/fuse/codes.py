"""int8 codes from layer to layer, without floats in between.

A static int8 layer quantizes its input with a scale that is known beforehand; the layer in front can write those codes
itself, in steps of that scale, while its sums are in registers. Pools, concatenations and views between two layers work
on codes as on floats; means and residuals read codes in whatever steps they have.

A tensor becomes codes if everything that uses it can take codes and at least one layer says in which steps. What a
concatenation joins is rescaled where it has other steps, with a second rounding. A tensor that is only a residual (the
shortcut of a residual block) has no steps of its own and becomes bfloat16, which keeps as many bits.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from lamina.compile.capture import Captured, fake, is_tensor, is_view, kind, operands, where
from lamina.compile.fuse.conv import call_conv, evaluate
from lamina.compile.fuse.linear import call_int8_linear
from lamina.ops.conv2d import pair

_CONV = torch.ops.lamina.int8_conv2d.default
_POOL = torch.ops.lamina.int8_pool2d.default
_LAYERS = ("int8_conv2d", "int8_linear")

# What those who use a tensor ask for: floats, codes in any steps, or codes in steps of the scale that a node holds.
_FLOATS, _ANY = "floats", "any"


def codes(captured: Captured) -> None:
    scales = _Scales(captured)
    if scales.of_layers:
        _rewrite(captured, scales)


class _Scales:
    """The scale of each tensor that becomes codes.

    sources: of nodes that do to codes what they do to floats, the tensors that they pass on; means: nodes that read
    codes and may write them, in other steps.
    """

    def __init__(self, captured: Captured) -> None:
        self.nodes = list(captured.graph.nodes)
        self.sources = {node: found for node in self.nodes if (found := _sources(node))}
        self.means = {node for node in self.nodes if _is_mean(node)}
        # Of the layers with a static scale: its node, and the same node for equal values.
        self.of_layers: dict[fx.Node, fx.Node] = {}
        self.values: dict[fx.Node, float] = {}
        same: dict[float, fx.Node] = {}
        for node in captured.nodes(*_LAYERS):
            scale = captured.constant(operands(node)["x_scale"])
            if scale is not None and scale.ndim == 0:
                shared = same.setdefault(scale.item(), operands(node)["x_scale"])
                self.of_layers[node], self.values[shared] = shared, scale.item()

    def choose(self) -> dict[fx.Node, fx.Node]:
        able = {node for node in self.nodes if _is_writable(node)} | self.sources.keys() | self.means
        while True:
            asked = self._ask(able)
            chosen: dict[fx.Node, fx.Node] = {}
            for node in self.nodes:
                if node in able and asked[node] is not _FLOATS:
                    scale = self._scale(node, asked[node], chosen)
                    if scale is not None:
                        chosen[node] = scale
            # What cannot pass on codes, since a tensor it is made of stays floats, must not ask for them either.
            stuck = {node for node in self.sources if node in able - chosen.keys() and asked[node] is not _FLOATS}
            if not stuck:
                return chosen
            able -= stuck

    def _ask(self, able: set[fx.Node]) -> dict[fx.Node, Any]:
        asked: dict[fx.Node, Any] = {}
        for node in reversed(self.nodes):
            demands = list(self._demands(node, able, asked))
            firm = [d for d, rescales in demands if isinstance(d, fx.Node) and not rescales]
            others = [d for d, rescales in demands if isinstance(d, fx.Node) and rescales]
            if node not in able or not demands or any(d is _FLOATS for d, _ in demands):
                asked[node] = _FLOATS
            else:  # the largest holds everything that any of them saw
                asked[node] = max(firm or others, key=self.values.__getitem__, default=_ANY)
        return asked

    def _demands(self, node: fx.Node, able: set[fx.Node], asked: dict[fx.Node, Any]) -> Iterator[tuple[Any, bool]]:
        """What each user asks for, and whether it could rescale what it gets."""
        for user in node.users:
            if node in self.sources.get(user, ()):
                yield asked[user] if user in able else _FLOATS, kind(user) == "cat"
            elif kind(user) in _LAYERS:
                yield self._demand_of(user, node), False
            else:
                yield _ANY if user in self.means else _FLOATS, False

    def _demand_of(self, layer: fx.Node, node: fx.Node) -> Any:
        places = {name for name, value in operands(layer).items() if value is node}
        if not places <= ({"x", "residual"} if kind(layer) == "int8_conv2d" else {"x"}):
            return _FLOATS
        if "x" in places:
            return self.of_layers.get(layer, _FLOATS)
        return _ANY

    def _scale(self, node: fx.Node, asked: Any, chosen: dict[fx.Node, fx.Node]) -> fx.Node | None:
        """The scale that a node's codes have if its sources have theirs."""
        sources = self.sources.get(node, [])
        if any(source not in chosen for source in (*sources, *([node.args[0]] if node in self.means else ()))):
            return None
        if sources and kind(node) != "cat":
            return chosen[sources[0]]
        if asked is _ANY:
            return max((chosen[source] for source in sources), key=self.values.__getitem__, default=None)
        return asked


def _is_writable(node: fx.Node) -> bool:
    """Whether a layer's call can write codes."""
    if kind(node) not in _LAYERS:
        return False
    values = operands(node)
    return values["out_scale"] is None and fake(node).is_floating_point()


def _is_mean(node: fx.Node) -> bool:
    """Whether a node takes means of an image's pixels that int8_pool2d can take too."""
    if not node.args or not is_tensor(node.args[0]) or not fake(node.args[0]).is_floating_point():
        return False
    if kind(node) == "mean":
        dim = operands(node)["dim"]
        return fake(node.args[0]).ndim == 4 and isinstance(dim, list | tuple) and sorted(d % 4 for d in dim) == [2, 3]
    if kind(node) == "adaptive_avg_pool2d":
        return all(isinstance(size, int) for size in pair(operands(node)["output_size"]))
    return kind(node) == "avg_pool2d"


def _sources(node: fx.Node) -> list[fx.Node]:
    """The tensors a node passes on, if it does to codes what it does to floats."""
    source = node.args[0] if node.args else None
    if kind(node) == "cat":
        tensors = operands(node)["tensors"]
        fits = isinstance(tensors, list | tuple) and all(
            is_tensor(t) and fake(t).dtype == fake(node).dtype and fake(t).ndim == 4 for t in tensors
        )
        return list(tensors) if fits else []
    if not isinstance(source, fx.Node):
        return []
    if kind(node) == "max_pool2d":
        passes = not operands(node)["return_indices"]
    elif kind(node) == "pad":
        values = operands(node)
        passes = values["mode"] == "constant" and not values["value"]
    else:
        passes = is_view(node) or (kind(node) == "relu" and not node.kwargs.get("inplace")) or _is_slice(node)
    return [source] if passes else []


def _is_slice(node: fx.Node) -> bool:
    if node.target is not operator.getitem or not is_tensor(node.args[0]):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in index)


def _rewrite(captured: Captured, scales: _Scales) -> None:
    chosen = scales.choose()
    for node in list(captured.graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        new = node
        if kind(node) in _LAYERS:
            values = operands(node)
            changed = _ends_of(node, values, chosen)
            if changed and kind(node) == "int8_linear":
                new = call_int8_linear(captured, values | changed, at=node)
            elif changed:
                new = call_conv(captured, _CONV, values | changed, at=node)
            if node in chosen:
                captured.fused.append((f"{kind(node)} writes codes", where(node)))
        elif node in scales.means and node.args[0] in chosen:
            new = _mean(captured, node, chosen)
        elif node in chosen and kind(node) == "max_pool2d":
            new = _max(captured, node)
        elif node in chosen and kind(node) == "cat":
            _rescale(captured, node, chosen)
        if new is node:
            evaluate(captured, node)
            continue
        if node in chosen:
            chosen[new] = chosen[node]
        node.replace_all_uses_with(new)
        captured.graph.erase_node(node)


def _ends_of(node: fx.Node, values: dict[str, Any], chosen: dict[fx.Node, fx.Node]) -> dict[str, Any]:
    """The arguments of a layer that change."""
    changed: dict[str, Any] = {}
    if values["x"] in chosen:
        changed["x_scale"] = chosen[values["x"]]
        changed["out_dtype"] = fake(node).dtype
    if values["residual"] in chosen:
        changed["residual_scale"] = chosen[values["residual"]]
    if node in chosen:
        changed |= {"out_scale": chosen[node], "out_dtype": None}
    elif changed and fake(node).dtype is torch.float32 and all(_adds_only(user, node, chosen) for user in node.users):
        changed["out_dtype"] = torch.bfloat16
    return changed


def _adds_only(user: fx.Node, node: fx.Node, chosen: dict[fx.Node, fx.Node]) -> bool:
    """Whether a convolution that writes codes has a tensor as its residual and nothing else."""
    if kind(user) != "int8_conv2d" or user not in chosen:
        return False
    return [name for name, value in operands(user).items() if value is node] == ["residual"]


def _mean(captured: Captured, node: fx.Node, chosen: dict[fx.Node, fx.Node]) -> fx.Node:
    values = operands(node)
    x = values["input"]
    kind_of_mean, geometry, rest = "adaptive_avg", ([1, 1], [0, 0], [1, 1]), (False, True, None)
    if kind(node) == "avg_pool2d":
        kind_of_mean, window = "avg", list(pair(values["kernel_size"]))
        stride = list(pair(values["stride"])) if values["stride"] else window
        geometry = (stride, list(pair(values["padding"])), [1, 1])
        rest = (values["ceil_mode"], values["count_include_pad"], values["divisor_override"])
    else:
        window = [1, 1] if kind(node) == "mean" else list(pair(values["output_size"]))
    out_scale = chosen.get(node)
    ends = (chosen[x], out_scale, None if out_scale is not None else fake(node).dtype)
    new = captured.call(_POOL, (x, kind_of_mean, window, *geometry, *rest, *ends), at=node)
    if kind(node) == "mean" and not values["keepdim"]:
        new = captured.call("flatten", (new, 1), at=node)
    return new


def _max(captured: Captured, node: fx.Node) -> fx.Node:
    values = operands(node)
    window = list(pair(values["kernel_size"]))
    stride = list(pair(values["stride"])) if values["stride"] else window
    geometry = (window, stride, list(pair(values["padding"])), list(pair(values["dilation"])))
    return captured.call(_POOL, (values["input"], "max", *geometry, values["ceil_mode"], True, None), at=node)


def _rescale(captured: Captured, node: fx.Node, chosen: dict[fx.Node, fx.Node]) -> None:
    """Gives all that a concatenation joins its steps, as means of single pixels."""
    scale = chosen[node]
    for tensor in dict.fromkeys(operands(node)["tensors"]):
        if chosen[tensor] is not scale:
            geometry = ([1, 1], [1, 1], [0, 0], [1, 1])
            new = captured.call(_POOL, (tensor, "avg", *geometry, False, True, None, chosen[tensor], scale), at=node)
            node.replace_input_with(tensor, new)
