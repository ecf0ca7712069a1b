"""bfloat16 between int8 layers: attention whose inputs come from int8 layers and whose output goes into one.

Both sides of it are rounded to eight bits already; bfloat16 keeps as many of every single value, and its products run
at twice the speed of float32. The layers in front write bfloat16, the one behind reads it and writes what it wrote
before. Only where the processor multiplies bfloat16, only if it measures faster, and never between float layers.
"""

import torch
from torch import Tensor, fx

from lamina import _C
from lamina.compile import choose
from lamina.compile.capture import Captured, fake, is_view, kind, operands
from lamina.compile.fuse.linear import INT8_LINEARS, call_int8_linear

_attention = torch.ops.lamina.attention.default
# The instruction set that multiplies bfloat16; elsewhere it is converted first, and slower than float32.
ISA = "avx512bf16"


def bfloat16_attention(captured: Captured) -> None:
    if _C.active_isa() != ISA:
        return
    for node in [n for n in captured.graph.nodes if n.target is _attention]:
        before, after = _sources(node), _targets(node)
        if before is None or after is None or not _is_faster(captured, node):
            continue
        for layer, dtype in (
            *((layer, torch.bfloat16) for layer in before),
            *((layer, torch.float32) for layer in after),
        ):
            new = call_int8_linear(captured, operands(layer) | {"out_dtype": dtype}, at=layer, op=layer.target)
            layer.replace_all_uses_with(new)
            captured.erase(layer)
        captured.evaluate_all()
        captured.fused.append(("attention in bfloat16", ""))


def _sources(node: fx.Node) -> list[fx.Node] | None:
    """The int8 layers that compute query, key and value, if nothing else sees their results."""
    found: dict[fx.Node, None] = {}
    for tensor in node.args[:3]:
        while is_view(tensor):
            tensor = tensor.args[0]
        if kind(tensor) not in INT8_LINEARS or fake(tensor).dtype is not torch.float32:
            return None
        if operands(tensor)["out_scale"] is not None or set(readers(tensor)) != {node}:
            return None
        found[tensor] = None
    return list(found)


def _targets(node: fx.Node) -> list[fx.Node] | None:
    """The int8 layers that take the result, if nothing else does."""
    found = dict.fromkeys(readers(node))
    for layer in found:
        if kind(layer) not in INT8_LINEARS or operands(layer).get("residual") in _views(node) or layer.op == "output":
            return None
        if fake(layer).dtype is not torch.float32:
            return None
    return list(found) or None


def _views(node: fx.Node) -> set[fx.Node]:
    """A tensor and the views of it."""
    found = {node}
    for user in node.users:
        if is_view(user):
            found |= _views(user)
    return found


def readers(node: fx.Node) -> list[fx.Node]:
    """What uses a tensor through views."""
    return [user for view in _views(node) for user in view.users if not is_view(user)]


def _is_faster(captured: Captured, node: fx.Node) -> bool:
    if not captured.measure:
        return True
    given = choose.random_like(node.args)
    narrow = [t.bfloat16() if isinstance(t, Tensor) and i < 3 else t for i, t in enumerate(given)]
    candidates = {"float32": lambda: _attention(*given), "bfloat16": lambda: _attention(*narrow)}
    return choose.fastest(("attention in bfloat16", choose.describe(node.args)), candidates) == "bfloat16"
