"""Removes calls that compute nothing, so that the other passes meet their patterns bare.

Dropout that is off, casts to the dtype a tensor has, contiguous() on what is contiguous: each returns its input itself
in eager too. A concatenation with an empty tensor (a key-value cache before its first word) is a copy of the other. `x
+= y` and in-place activations on a tensor that nobody else can see are written `x + y` and `relu(x)`.
"""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._prims_common import is_contiguous_or_false

from lamina.compile.capture import Captured, fake, is_tensor, kind, operands, writes

# Calls whose result is memory of their own, whatever their arguments are.
_FRESH = {
    "linear",
    "addmm",
    "int8_linear",
    "sparse_int8_linear",
    "add",
    "mul",
    "layer_norm",
    "rms_norm",
    "matmul",
    "gelu",
    "silu",
    "relu",
    "relu6",
    "hardtanh",
    "hardswish",
    "attention",
    "softmax",
    "conv2d",
    "lamina_conv2d",
    "int8_conv2d",
    "batch_norm",
    "max_pool2d",
    "avg_pool2d",
}
_IN_PLACE = {"relu", "relu6", "silu", "hardtanh", "hardswish"}
_IN_PLACE_METHODS = {"relu_": F.relu}
# Calls that Dynamo leaves behind, although it knew the answer (a tensor's `is_cpu`): users that use nothing.
_LEFT_BEHIND = {torch._C._log_api_usage_once, getattr}


def clean(captured: Captured) -> None:
    for node in reversed(captured.graph.nodes):
        if node.target in _LEFT_BEHIND and not node.users:
            captured.graph.erase_node(node)
    for node in captured.nodes("dropout"):
        values = operands(node)
        if is_tensor(values["input"]) and (values["training"] is False or values["p"] == 0.0):
            captured.replace(node, values["input"], "dropout that is off")
    for node in captured.nodes("to"):
        _cast(captured, node)
    for node in list(captured.graph.nodes):  # in order: one write's result is what the next one writes to
        if kind(node) == "iadd":
            _in_place_sum(captured, node)
        elif kind(node) in _IN_PLACE or node.target in _IN_PLACE_METHODS:
            _in_place_activation(captured, node)
    for node in captured.nodes("cat"):
        _concatenation(captured, node)


def contiguous(captured: Captured) -> None:
    """Runs last: whether a tensor is contiguous depends on the layout the other passes gave it."""
    for node in captured.nodes("contiguous"):
        source = node.args[0]
        if len(node.args) == 1 and not node.kwargs and is_tensor(source) and is_contiguous_or_false(fake(source)):
            captured.replace(node, source, "contiguous of contiguous")


def _cast(captured: Captured, node: fx.Node) -> None:
    source = node.args[0] if node.args else None
    if not is_tensor(source) or node.kwargs.get("copy") or node.kwargs.get("memory_format") is not None:
        return
    if True in node.args[1:] and node.target == "to":  # .to(dtype, non_blocking, copy)
        return
    before, after = fake(source), fake(node)
    if isinstance(after, Tensor) and before.dtype == after.dtype and before.device == after.device:
        captured.replace(node, source, "cast to the same dtype")


def _in_place_sum(captured: Captured, node: fx.Node) -> None:
    target, other = node.args
    if not _is_fresh(target) or not is_tensor(other):
        return
    before, after = fake(target), fake(node)
    seen_elsewhere = set(target.users) != {node}
    if seen_elsewhere or target is other or before.dtype != after.dtype or before.shape != after.shape:
        return
    if torch.result_type(before, fake(other)) != before.dtype:
        return
    new = captured.call(operator.add, (target, other), at=node)
    captured.replace(node, new, "in-place sum")


def _in_place_activation(captured: Captured, node: fx.Node) -> None:
    target = node.args[0] if node.args else None
    if not writes(node) or not _is_fresh(target) or set(target.users) != {node}:
        return
    function = _IN_PLACE_METHODS.get(node.target, node.target)
    values = operands(node)
    limits = (values["min_val"], values["max_val"]) if kind(node) == "hardtanh" else ()
    captured.replace(node, captured.call(function, (target, *limits), at=node), "in-place activation")


def _is_fresh(node: fx.Node) -> bool:
    """Whether a node's result is memory of its own."""
    return kind(node) in _FRESH and not writes(node) and is_tensor(node)


def _concatenation(captured: Captured, node: fx.Node) -> None:
    tensors = operands(node)["tensors"]
    if not isinstance(tensors, list | tuple) or not all(is_tensor(t) for t in tensors):
        return
    full = [t for t in tensors if not (kind(t) == "tensor" and fake(t).ndim == 1 and fake(t).shape[0] == 0)]
    if len(full) != 1 or len(full) == len(tensors) or fake(full[0]).dtype != fake(node).dtype:
        return
    # The copy may be left out only where nobody could tell: nothing writes, and no input of the graph is handed out.
    if captured.writers or _comes_from_input(full[0]):
        return
    captured.replace(node, full[0], "concatenation with nothing")


def _comes_from_input(node: fx.Node) -> bool:
    """Whether a tensor may be a view of one of the graph's inputs."""
    while isinstance(node, fx.Node) and node.op != "placeholder":
        if _is_fresh(node):
            return False
        if not node.args or not isinstance(node.args[0], fx.Node):
            return True
        node = node.args[0]
    return True
