"""int8 linear layers: their activation, the sum behind them, and the views around them.

The epilogue of int8_linear adds a residual and applies an activation while the sums are in registers. GPT-2's Conv1D
flattens its input to two dimensions and unflattens its output, which int8_linear does by itself.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lamina.compile.capture import Captured, activation_of, fake, is_tensor, kind, operands, same_shape, sum_of
from lamina.ops.int8_linear import ACTIVATIONS, pack_int8_weight

_op = torch.ops.lamina.int8_linear.default
_ARGUMENTS = tuple(argument.name for argument in _op._schema.arguments)
_DTYPES = (torch.float32, torch.bfloat16)
# The int8 linear layers: one signature, so that what is said of one holds for the other.
INT8_LINEARS = ("int8_linear", "sparse_int8_linear")


def call_int8_linear(captured: Captured, values: dict[str, Any], *, at: fx.Node, op: Any = _op) -> fx.Node:
    """A call of the op, or of another with its signature, with arguments by name."""
    return captured.call(op, tuple(values[name] for name in _ARGUMENTS), at=at)


def quantize_linears(captured: Captured) -> None:
    """Float linear layers with weights of the model to int8_linear: the lossy choice, made only when asked for."""
    for node in captured.nodes("linear", "addmm"):
        values = operands(node)
        if kind(node) == "linear":
            x, weight, bias, transposed = values["input"], values["weight"], values["bias"], False
        else:
            x, weight, bias, transposed = values["mat1"], values["mat2"], values["input"], True
            if (values["beta"], values["alpha"]) != (1, 1):
                continue
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


def _defaults() -> dict[str, Any]:
    return {a.name: a.default_value if a.has_default_value() else None for a in _op._schema.arguments}


def join_views(captured: Captured) -> None:
    """view -> int8_linear -> view to int8_linear where the views only flatten and unflatten the rows."""
    for node in captured.nodes(*INT8_LINEARS):
        values = operands(node)
        flat = values["x"]
        if kind(flat) != "view" or not is_tensor(flat.args[0]) or values.get("residual") is not None:
            continue
        if len(node.users) != 1 or kind(unflat := next(iter(node.users))) != "view":
            continue
        source = flat.args[0]
        inner, outer = fake(source).shape, fake(unflat).shape
        fits = len(inner) == len(outer) and all(
            statically_known_true(a == b) for a, b in zip(inner[:-1], outer[:-1], strict=True)
        )
        fits = fits and statically_known_true(inner[-1] == fake(flat).shape[-1])
        if fits and statically_known_true(outer[-1] == fake(node).shape[-1]) and captured.movable((flat, node), unflat):
            new = call_int8_linear(captured, values | {"x": source}, at=unflat, op=node.target)
            captured.replace(unflat, new, "flattened rows")


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
