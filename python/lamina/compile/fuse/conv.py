"""Convolutions: batch norms go into their weights; sum, activation and pool into their call.

In evaluation a batch norm is a factor and a term for each channel (Jacob et al. 2018, arXiv:1712.05877, section 3.2),
and those of a convolution's output are factors of its filters and terms of its bias. An int8 filter has a scale of its
own, so that its codes stay what they are.

Zeros that are put around an image in front of a convolution become its padding.

A float convolution of torch becomes lamina's, with all that it takes in, where that measures faster than the calls it
replaces; lamina's own, float or int8, only grow. Their outputs are channels_last, and so is then everything behind
them: views follow, and the graph's outputs get the layout back that they had.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lamina.compile import choose
from lamina.compile.capture import Captured, activation_of, fake, format_of, kind, operands, same_shape, sum_of
from lamina.ops.conv2d import paddings_of, pair, winograd_tile
from lamina.ops.int8_conv2d import PackedInt8ConvWeight, pack_int8_conv_weight, unpack_int8_conv_weight
from lamina.ops.int8_linear import ACTIVATIONS

_FLOAT = torch.ops.lamina.conv2d.default
_INT8 = torch.ops.lamina.int8_conv2d.default
_DTYPES = (torch.float32, torch.bfloat16)
_PACKED = ("data", "scale", "compensation")
_STATISTICS = ("running_mean", "running_var", "weight", "bias")
# Larger of two values before and after them is the same value: they may change places with a max pool.
_MONOTONE = ("relu", "relu6", "tanh")


def call_conv(captured: Captured, op: Callable, values: dict[str, Any], *, at: fx.Node) -> fx.Node:
    """A call of one of lamina's convolutions with arguments by name."""
    return captured.call(op, tuple(values[argument.name] for argument in op._schema.arguments), at=at)


def fold_batch_norms(captured: Captured) -> None:
    for norm in captured.nodes("batch_norm"):
        values = operands(norm)
        conv = values["input"]
        given = [values[name] for name in _STATISTICS]
        if values["training"] is not False or given[0] is None or given[1] is None:
            captured.left[norm] = "it computes its statistics at each call"
        elif any(t is not None and captured.constant(t) is None for t in given):
            captured.left[norm] = "its statistics are no buffers"
        elif kind(conv) not in _FOLDS or len(conv.users) != 1 or not captured.movable((conv,), norm):
            captured.left[norm] = "no convolution in front of it that it could join"
        else:
            new = _FOLDS[kind(conv)](captured, conv, norm, _Factors(given, values["eps"]))
            if new is None:
                captured.left[norm] = "the convolution in front of it has other weights than the model's"
            else:
                captured.replace(norm, new, "conv + batch_norm")


@dataclass(frozen=True)
class _Factors:
    """A batch norm as a factor and a term of each channel, in double: they are rounded once, with the weight."""

    nodes: Sequence[fx.Node | None]
    eps: float

    @property
    def sources(self) -> list[fx.Node]:
        return [node for node in self.nodes if node is not None]

    def of(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """From the tensors of `sources`."""
        rest = iter(tensors)
        mean, variance, weight, bias = (None if node is None else next(rest).double() for node in self.nodes)
        factor = (variance + self.eps).rsqrt()
        if weight is not None:
            factor = factor * weight
        return factor, -mean * factor if bias is None else bias - mean * factor


def _fold_float(captured: Captured, conv: fx.Node, norm: fx.Node, factors: _Factors) -> fx.Node | None:
    values = operands(conv)
    weight, bias = values["weight"], values["bias"]
    if captured.constant(weight) is None or (bias is not None and captured.constant(bias) is None):
        return None
    if fake(weight).dtype != fake(norm).dtype or values.get("activation", "none") != "none":
        return None
    if values.get("residual") is not None or values.get("pool", "none") != "none":
        return None

    def fold(weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        own, rest = (None, rest) if bias is None else (rest[0], rest[1:])
        factor, term = factors.of(rest)
        scaled = (weight.double() * factor[:, None, None, None]).to(weight.dtype)
        term = term if own is None else term + own.double() * factor
        return scaled.contiguous(memory_format=torch.channels_last), term.to(weight.dtype)

    folded = captured.fold([weight, *([] if bias is None else [bias]), *factors.sources], fold)
    if kind(conv) == "lamina_conv2d":
        return call_conv(captured, _FLOAT, values | dict(zip(("weight", "bias"), folded, strict=True)), at=norm)
    return captured.call(conv.target, (values["input"], *folded, *list(values.values())[3:]), at=norm)


def _fold_int8(captured: Captured, conv: fx.Node, norm: fx.Node, factors: _Factors) -> fx.Node | None:
    values = operands(conv)
    packed, bias = [values[name] for name in _PACKED], values["bias"]
    if any(captured.constant(t) is None for t in packed) or (bias is not None and captured.constant(bias) is None):
        return None
    if values["activation"] != "none" or values["residual"] is not None or values["out_scale"] is not None:
        return None
    size, groups = tuple(values["size"]), values["groups"]

    def fold(data: Tensor, scale: Tensor, compensation: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        own, rest = (None, rest) if bias is None else (rest[0], rest[1:])
        factor, term = factors.of(rest)
        term = term if own is None else term + own.double() * factor
        scaled = (scale.double() * factor.abs()).float()
        if (factor < 0).any():
            codes = unpack_int8_conv_weight(PackedInt8ConvWeight(data, scale, compensation, size, groups))
            codes *= torch.where(factor < 0, -1, 1).to(torch.int8)[:, None, None, None]
            packed = pack_int8_conv_weight(codes, scaled, groups=groups)
            data, compensation = packed.data, packed.compensation
        return data, scaled, compensation, term.float()

    sources = [*packed, *([] if bias is None else [bias]), *factors.sources]
    folded = captured.fold(sources, fold)
    return call_conv(captured, _INT8, values | dict(zip((*_PACKED, "bias"), folded, strict=True)), at=norm)


_FOLDS = {"conv2d": _fold_float, "lamina_conv2d": _fold_float, "int8_conv2d": _fold_int8}


def activations_before_pools(captured: Captured) -> None:
    """relu(max_pool(x)) as max_pool(relu(x)), so that the convolution in front can take in both."""
    for pool in captured.nodes("max_pool2d"):
        user = next(iter(pool.users), None)
        if len(pool.users) != 1 or operands(pool)["return_indices"] or not captured.movable((pool,), user):
            continue
        found = activation_of(user)
        if found is not None and found[0] in _MONOTONE:
            inner = captured.call(user.target, (pool.args[0], *user.args[1:]), dict(user.kwargs), at=user)
            outer = captured.call(pool.target, (inner, *pool.args[1:]), dict(pool.kwargs), at=user)
            captured.replace(user, outer, "activation before its pool")


@dataclass
class _Chain:
    """A convolution and the calls behind it that its op takes in: nodes in order, and the op's arguments."""

    nodes: list[fx.Node]
    values: dict[str, Any]
    names: list[str] = field(default_factory=lambda: ["conv"])

    @property
    def root(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def pattern(self) -> str:
        return " + ".join(self.names)

    def take(self, user: fx.Node, name: str, **values: Any) -> None:
        self.nodes.append(user)
        self.names.append(name)
        self.values |= values


def convolutions(captured: Captured) -> None:
    activations_before_pools(captured)
    for node in list(captured.graph.nodes):
        if node._erased or node.op not in ("call_function", "call_method"):
            continue
        of_kind = kind(node)
        if of_kind not in _FOLDS:
            evaluate(captured, node)
            continue
        values = _as_ours(captured, node) if of_kind == "conv2d" else dict(operands(node))
        if values is None:
            evaluate(captured, node)
            continue
        chain = _Chain([node], values)
        _take_padding(captured, chain)
        _extend(captured, chain, pools=of_kind != "int8_conv2d")
        op = _INT8 if of_kind == "int8_conv2d" else _FLOAT
        if of_kind == "conv2d":
            if not _is_faster(captured, chain):
                captured.left[node] = "torch's own is as fast at this shape"
                evaluate(captured, node)
                continue
            _turn_weight(captured, chain)
        elif len(chain.nodes) == 1:
            evaluate(captured, node)
            continue
        captured.replace(chain.root, call_conv(captured, op, chain.values, at=chain.root), chain.pattern)


def _as_ours(captured: Captured, node: fx.Node) -> dict[str, Any] | None:
    """The arguments of lamina's convolution for one of torch's, if it can take its place."""
    values = operands(node)
    x, weight, bias = values["input"], values["weight"], values["bias"]
    tensors = [fake(t) for t in (x, weight, bias) if t is not None]
    if any(t.dtype not in _DTYPES or t.device.type != "cpu" or t.dtype != tensors[0].dtype for t in tensors):
        captured.left[node] = "lamina's convolution is of float32 and bfloat16 on the CPU"
        return None
    if not captured.fixed(weight) or not (bias is None or captured.fixed(bias)) or fake(x).ndim != 4:
        captured.left[node] = "its weight is no parameter, or its input no batch of images"
        return None
    stride, dilation = pair(values["stride"]), pair(values["dilation"])
    kernel = tuple(fake(weight).shape[2:])
    return {
        "input": x,
        "weight": weight,
        "bias": bias,
        "residual": None,
        "stride": stride,
        "padding": paddings_of(values["padding"], kernel, stride, dilation),
        "dilation": dilation,
        "groups": values["groups"],
        "winograd": winograd_tile(fake(weight), stride, dilation, values["groups"]),
        "activation": "none",
        "pool": "none",
        "pool_sizes": (),
    }


def _take_padding(captured: Captured, chain: _Chain) -> None:
    """Takes in the zeros that the call in front of a convolution puts around its input."""
    node, name = chain.root, "x" if "x" in chain.values else "input"
    pad = chain.values[name]
    if kind(pad) != "pad" or len(pad.users) != 1 or fake(pad).ndim != 4 or not captured.movable((pad,), node):
        return
    values = operands(pad)
    sides = values["pad"]
    zeros = values["mode"] == "constant" and not values["value"]
    if not zeros or len(sides) > 4 or len(sides) % 2 or not all(isinstance(s, int) and s >= 0 for s in sides):
        return
    left, right, top, bottom = (*sides, 0, 0, 0, 0)[:4]
    own = chain.values["padding"]
    around = own if len(own) == 4 else (own[0], own[0], own[1], own[1])
    both = tuple(a + b for a, b in zip(around, (top, bottom, left, right), strict=True))
    symmetric = len(own) == 2 and both[0] == both[1] and both[2] == both[3]
    chain.values |= {name: values["input"], "padding": both[::2] if symmetric else both}
    chain.nodes.insert(0, pad)
    chain.names.insert(0, "pad")


def _extend(captured: Captured, chain: _Chain, *, pools: bool) -> None:
    """Takes in what follows, in the order of the op: sum, activation, pool."""
    values = chain.values
    if values.get("out_scale") is not None:
        return
    while len(chain.root.users) == 1:
        node = chain.root
        user = next(iter(node.users))
        if not captured.movable(chain.nodes, user):
            return
        plain = values["activation"] in (None, "none") and values.get("pool", "none") == "none"
        terms = sum_of(user) if plain and values["residual"] is None else None
        found = activation_of(user) if plain else None
        if terms is not None and terms[0] is not terms[1]:
            other = terms[1] if terms[0] is node else terms[0]
            if not same_shape(other, node):
                return
            chain.take(user, "residual", residual=other)
        elif found is not None and found[0] in ACTIVATIONS:
            chain.take(user, found[0], activation=found[0])
        elif pools and values["pool"] == "none" and (sizes := pool_of(user)) is not None:
            chain.take(user, f"{sizes[0]} pool", pool=sizes[0], pool_sizes=sizes[1])
        else:
            return


def pool_of(node: fx.Node) -> tuple[str, tuple[int, ...]] | None:
    """("max" or "avg", (window, stride, padding), two numbers each) of a pool that lamina's convolution can take in."""
    if kind(node) not in ("max_pool2d", "avg_pool2d"):
        return None
    values = operands(node)
    window, padding = pair(values["kernel_size"]), pair(values["padding"])
    if values["ceil_mode"] or values.get("return_indices") or pair(values.get("dilation", 1)) != (1, 1):
        return None
    if values.get("divisor_override") is not None or (padding != (0, 0) and not values.get("count_include_pad", True)):
        return None
    stride = pair(values["stride"]) if values["stride"] else window
    return ("max" if kind(node) == "max_pool2d" else "avg"), (*window, *stride, *padding)


def _is_faster(captured: Captured, chain: _Chain) -> bool:
    """Whether lamina's call takes less time than the calls of torch that it stands for."""
    if not captured.measure:
        return True
    values = [v for v in chain.values.values() if isinstance(v, fx.Node)]
    given = dict(zip(values, choose.random_like(values), strict=True))
    weight = given[chain.values["weight"]]
    if not captured.writers:
        weight = weight.contiguous(memory_format=torch.channels_last)
    ours = chain.values | {"weight": weight}
    ours = map_arg(tuple(ours[a.name] for a in _FLOAT._schema.arguments), given.__getitem__)

    def torchs() -> Any:
        known = dict(given)
        for node in chain.nodes:
            known[node] = node.target(*map_arg(node.args, known.__getitem__), **map_arg(node.kwargs, known.__getitem__))
        return known[chain.root]

    rest = tuple(v for v in chain.values.values() if not isinstance(v, fx.Node))
    key = ("conv2d", choose.describe(values), repr(rest))
    return choose.fastest(key, {"torch": torchs, "lamina": lambda: _FLOAT(*ours)}) == "lamina"


def _turn_weight(captured: Captured, chain: _Chain) -> None:
    """channels_last weights, so that the output is channels_last too, unless something writes to a tensor: a view
    that `evaluate` makes a copy would not be written through."""
    weight = chain.values["weight"]
    if fake(weight).is_contiguous(memory_format=torch.channels_last) or captured.writers:
        return

    def turn(weight: Tensor) -> tuple[Tensor]:
        return (weight.contiguous(memory_format=torch.channels_last),)

    chain.values["weight"] = captured.fold([weight], turn)[0]


def evaluate(captured: Captured, node: fx.Node) -> None:
    """Computes a node's fake value again; a view that its input's layout does not allow any more becomes a reshape."""
    try:
        captured.evaluate(node)
    except (RuntimeError, ValueError):
        if node.op != "call_method" or node.target != "view" or captured.writers:
            raise
        node.target = "reshape"
        captured.evaluate(node)


def restore_outputs(captured: Captured) -> None:
    """What the graph gives lies in memory as it did when it was captured."""
    output = next(iter(reversed(captured.graph.nodes)))
    formats = iter(captured.output_formats)

    def restore(node: fx.Node) -> fx.Node:
        wanted = next(formats)
        if wanted is None or format_of(node) is wanted:
            return node
        return captured.call("contiguous", (node,), {"memory_format": wanted}, at=output)

    output.args = map_arg(output.args, restore)
