"""Linear layers: their activation, the sum behind them, and the views around them.

The epilogue of int8_linear adds a residual and applies an activation while the sums are in registers. GPT-2's Conv1D
flattens its input to two dimensions and unflattens its output, which int8_linear does by itself.

A float32 layer of torch becomes lamina's linear, with all that it takes in, where that measures faster than the calls
it replaces. Its weight is packed, which is a second copy of it: weights that something else in the graph reads (a tied
embedding, a layer that is called twice) stay torch's.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lamina.compile import choose
from lamina.compile.capture import Captured, activation_of, fake, is_tensor, kind, operands, same_shape, sum_of
from lamina.ops.int8_linear import ACTIVATIONS, pack_int8_weight
from lamina.ops.library import CPU_IMPLEMENTATIONS
from lamina.ops.linear import pack_linear_weight
from lamina.ops.packed_cache import PackedCache
from lamina.reference.int8_linear import ACTIVATIONS as PLAIN_ACTIVATIONS

_FLOAT = torch.ops.lamina.linear.default
_op = torch.ops.lamina.int8_linear.default
_ARGUMENTS = tuple(argument.name for argument in _op._schema.arguments)
_DTYPES = (torch.float32, torch.bfloat16)
# The int8 linear layers: one signature, so that what is said of one holds for the other.
INT8_LINEARS = ("int8_linear", "sparse_int8_linear")

# The packed weights that graphs hold: a graph for other shapes takes the same.
_packed: PackedCache[weakref.ref[Tensor]] = PackedCache()


def call_int8_linear(captured: Captured, values: dict[str, Any], *, at: fx.Node, op: Any = _op) -> fx.Node:
    """A call of the op, or of another with its signature, with arguments by name."""
    return captured.call(op, tuple(values[name] for name in _ARGUMENTS), at=at)


def quantize_linears(captured: Captured) -> None:
    """Float linear layers with weights of the model to int8_linear: the lossy choice, made only when asked for."""
    for node in captured.nodes("linear", "addmm"):
        found = _layer_of(node)
        if found is None:
            continue
        x, weight, bias, transposed = found
        constant = captured.constant(weight)
        if constant is None or not is_tensor(x) or constant.ndim != 2 or constant.dtype not in _DTYPES:
            captured.left[node] = "its weight is no parameter of float32 or bfloat16"
            continue
        if bias is not None and (captured.constant(bias) is None or fake(bias).ndim != 1):
            captured.left[node] = "its bias is no parameter"
            continue
        if fake(x).dtype not in _DTYPES or not constant.isfinite().all():
            captured.left[node] = "its input is not float32 or bfloat16, or its weight is not finite"
            continue

        def pack(weight: Tensor, transposed: bool = transposed) -> tuple[Tensor, ...]:
            return tuple(pack_int8_weight(weight.t() if transposed else weight))

        packed = captured.fold([weight], pack)
        values = _defaults() | dict(zip(("data", "scale", "compensation"), packed, strict=True))
        values |= {"x": x, "bias": bias, "activation": "none"}
        captured.replace(node, call_int8_linear(captured, values, at=node), "linear to int8")


def _layer_of(node: fx.Node) -> tuple[Any, Any, Any, bool] | None:
    """(input, weight, bias, whether the weight is [K, N]) of a linear or addmm, if it is a layer."""
    values = operands(node)
    if kind(node) == "linear":
        return values["input"], values["weight"], values["bias"], False
    if (values["beta"], values["alpha"]) != (1, 1):
        return None
    return values["mat1"], values["mat2"], values["input"], True


def _defaults() -> dict[str, Any]:
    return {a.name: a.default_value if a.has_default_value() else None for a in _op._schema.arguments}


def join_views(captured: Captured) -> None:
    """view -> int8_linear -> view to int8_linear where the views only flatten and unflatten the rows."""
    for node in captured.nodes(*INT8_LINEARS):
        values = operands(node)
        around = None if values.get("residual") is not None else _views_around(captured, node, values["x"])
        if around is not None:
            source, unflat = around
            new = call_int8_linear(captured, values | {"x": source}, at=unflat, op=node.target)
            captured.replace(unflat, new, "flattened rows")


def _views_around(captured: Captured, node: fx.Node, flat: Any) -> tuple[fx.Node, fx.Node] | None:
    """(source, result) of view -> node -> view where the views only flatten and unflatten the rows."""
    if kind(flat) != "view" or not is_tensor(flat.args[0]):
        return None
    if len(node.users) != 1 or kind(unflat := next(iter(node.users))) != "view":
        return None
    source = flat.args[0]
    inner, outer = fake(source).shape, fake(unflat).shape
    fits = len(inner) == len(outer) and all(
        statically_known_true(a == b) for a, b in zip(inner[:-1], outer[:-1], strict=True)
    )
    fits = fits and statically_known_true(inner[-1] == fake(flat).shape[-1])
    if fits and statically_known_true(outer[-1] == fake(node).shape[-1]) and captured.movable((flat, node), unflat):
        return source, unflat
    return None


def epilogues(captured: Captured) -> None:
    for node in captured.nodes(*INT8_LINEARS):
        grown = node
        while grown is not None:
            grown = _grow(captured, grown)


def _grow(captured: Captured, node: fx.Node) -> fx.Node | None:
    """The call that takes in the one user of `node`, or None."""
    values = operands(node)
    if values["activation"] not in (None, "none") or values.get("out_scale") is not None or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    if not captured.movable((node,), user):
        return None
    found = activation_of(user)
    if found is not None and found[1] is node and found[0] in ACTIVATIONS:
        new = call_int8_linear(captured, values | {"activation": found[0]}, at=user, op=node.target)
        captured.replace(user, new, f"linear + {found[0]}")
        return new
    terms = sum_of(user)
    if terms is None or "residual" not in _ARGUMENTS or values["residual"] is not None or terms[0] is terms[1]:
        return None
    residual = terms[1] if terms[0] is node else terms[0]
    if not same_shape(residual, node):
        return None
    new = call_int8_linear(captured, values | {"residual": residual}, at=user, op=node.target)
    captured.replace(user, new, "linear + residual")
    return new


@dataclass
class _Layer:
    """A float layer of torch and the calls behind it that lamina's op takes in.

    nodes: those calls, in order; weight: [N, K], or [K, N] if `transposed`.
    """

    nodes: list[fx.Node]
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    residual: fx.Node | None = None
    activation: str = "none"
    names: list[str] = field(default_factory=lambda: ["linear"])

    @property
    def root(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def out_features(self) -> int:
        return fake(self.weight).shape[1 if self.transposed else 0]

    def pack(self, weight: Tensor) -> tuple[Tensor]:
        return (pack_linear_weight(weight.t() if self.transposed else weight).data,)

    def pack_once(self, weight: Tensor) -> tuple[Tensor]:
        """The same, or what another graph has of this parameter."""
        made: list[Tensor] = []

        def pack() -> weakref.ref[Tensor]:
            made.extend(self.pack(weight))
            return weakref.ref(made[0])

        known = _packed.get([weight], (tuple(weight.shape), weight.stride(), self.transposed), pack)()
        return self.pack(weight) if known is None else (known,)


def float_linears(captured: Captured) -> None:
    for node in captured.nodes("linear", "addmm"):
        layer = _float_layer(captured, node)
        if layer is None:
            continue
        around = _views_around(captured, node, layer.x)
        if around is not None:
            layer.x = around[0]
            layer.nodes.append(around[1])
        _extend(captured, layer)
        if not _is_faster(captured, layer):
            captured.left[node] = "torch's own is as fast at this shape"
            continue
        # Not of merged weights: writing to one of the parts does not count as writing to the whole.
        pack = layer.pack if captured.constant(layer.weight) is None else layer.pack_once
        (data,) = captured.fold([layer.weight], pack)
        arguments = (layer.x, data, layer.bias, layer.out_features, layer.activation, layer.residual)
        pattern = f"{' + '.join(layer.names)} on a packed copy of its weight"
        captured.replace(layer.root, captured.call(_FLOAT, arguments, at=layer.root), pattern)


def _float_layer(captured: Captured, node: fx.Node) -> _Layer | None:
    """The layer of a call of torch, if lamina's op can take its place."""
    found = _layer_of(node)
    if found is None:
        return None
    x, weight, bias, transposed = found
    tensors = [t for t in (x, weight, bias) if t is not None]
    if not all(is_tensor(t) and fake(t).dtype is torch.float32 and fake(t).device.type == "cpu" for t in tensors):
        captured.left[node] = "lamina's float linear layer is of float32 on the CPU"
        return None
    if not captured.fixed(weight) or fake(weight).ndim != 2:
        captured.left[node] = "its weight is no parameter"
        return None
    if len(weight.users) != 1 or weight in (x, bias):
        captured.left[node] = "its weight is used elsewhere, and a packed one would be a second copy"
        return None
    layer = _Layer([node], x, weight, bias, transposed)
    if bias is not None and tuple(fake(bias).shape) != (layer.out_features,):
        captured.left[node] = "its bias is not one number for each output"
        return None
    return layer


def _extend(captured: Captured, layer: _Layer) -> None:
    """Takes in what follows, in the order of the op: a sum, then an activation."""
    while len(layer.root.users) == 1 and layer.activation == "none":
        node = layer.root
        user = next(iter(node.users))
        if not captured.movable(layer.nodes, user):
            return
        found, terms = activation_of(user), sum_of(user)
        if found is not None and found[1] is node and found[0] in ACTIVATIONS:
            layer.activation = found[0]
            layer.names.append(found[0])
        elif terms is not None and terms[0] is not terms[1] and layer.residual is None:
            residual = terms[1] if terms[0] is node else terms[0]
            if not same_shape(residual, node):
                return
            layer.residual = residual
            layer.names.append("residual")
        else:
            return
        layer.nodes.append(user)


def _is_faster(captured: Captured, layer: _Layer) -> bool:
    """Whether lamina's call takes less time than the calls of torch that it stands for."""
    if not captured.measure:
        return True
    sources = (layer.x, layer.weight, layer.bias, layer.residual)
    x, weight, bias, residual = choose.random_like(sources)
    (data,) = layer.pack(weight)
    ours, plain = CPU_IMPLEMENTATIONS[_FLOAT], PLAIN_ACTIVATIONS[layer.activation]

    def torchs() -> Tensor:
        if layer.transposed:
            y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], layer.out_features)
        else:
            y = F.linear(x, weight, bias)
        return plain(y if residual is None else y + residual)

    given = tuple(source is None for source in sources)
    key = ("linear", choose.describe(sources), given, layer.transposed, layer.activation)
    arguments = (x, data, bias, layer.out_features, layer.activation, residual)
    return choose.fastest(key, {"torch": torchs, "lamina": lambda: ours(*arguments)}) == "lamina"
