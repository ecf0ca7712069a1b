"""Attention, called or spelled out, to lamina::attention.

softmax(q k^T * scale + mask) v is one call in models that use scaled_dot_product_attention. Models with "eager"
attention spell it out: a product with the transposed keys, a scale before or after, an added or filled-in mask, a
softmax, sometimes in float32 and cast back, and a product with the values.
"""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lamina.compile import choose
from lamina.compile.capture import Captured, fake, is_tensor, kind, number, operands, strip_casts
from lamina.ops.attention import MAX_HEAD_SIZE

_attention = torch.ops.lamina.attention.default
_DTYPES = (torch.float32, torch.bfloat16)
_Sums = dict[tuple[fx.Node, fx.Node], fx.Node]
# What models write for "never look there"; whatever is below it leaves no weight in float32 either.
_MINUS_INFINITY = -1e4


def attention(captured: Captured) -> None:
    for node in captured.nodes("attention"):
        values = operands(node)
        _route(
            captured,
            node,
            (values["query"], values["key"], values["value"], values["attn_mask"]),
            (values["is_causal"], values["scale"], values["enable_gqa"]),
            values["dropout_p"],
            "attention",
        )
    sums: _Sums = {}
    for node in captured.nodes("matmul"):
        _spelled_out(captured, node, sums)


def _route(captured: Captured, node: fx.Node, tensors: tuple, rest: tuple, dropout: float, pattern: str) -> None:
    reason = _refused(tensors, rest, dropout)
    if reason is not None:
        captured.left[node] = reason
        return
    args = (*tensors, *rest)
    if captured.measure and pattern == "attention":
        given = choose.random_like(args)
        q, k, v, mask, causal, scale, gqa = given
        key = ("attention", choose.describe(args), causal, gqa)
        candidates = {
            "torch": lambda: F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa),
            "lamina": lambda: _attention(*given),
        }
        if choose.fastest(key, candidates) == "torch":
            captured.left[node] = "torch's own is as fast at this shape"
            return
    captured.replace(node, captured.call(_attention, args, at=node), pattern)


def _refused(tensors: tuple, rest: tuple, dropout: float) -> str | None:
    query, key, value, mask = tensors
    if not all(is_tensor(t) for t in (query, key, value)):
        return "its inputs are no tensors of this graph"
    q, k, v = fake(query), fake(key), fake(value)
    if dropout != 0.0:
        return "it drops weights at random"
    if q.dtype not in _DTYPES or not (q.dtype == k.dtype == v.dtype) or q.device.type != "cpu":
        return f"it computes in {q.dtype} on {q.device}"
    if min(t.ndim for t in (q, k, v)) < 2 or not isinstance(q.shape[-1], int) or not isinstance(v.shape[-1], int):
        return "its head size is not fixed"
    if not 1 <= q.shape[-1] <= MAX_HEAD_SIZE or v.shape[-1] > MAX_HEAD_SIZE:
        return f"its heads are larger than {MAX_HEAD_SIZE}"
    if mask is not None and (not is_tensor(mask) or fake(mask).dtype not in (torch.bool, torch.float32, q.dtype)):
        return "its mask is neither boolean nor of the query's dtype"
    if not isinstance(rest[1], float | int | None):
        return "its scale is not fixed"
    return None


def _spelled_out(captured: Captured, root: fx.Node, sums: _Sums) -> None:
    weights, value = operands(root)["input"], operands(root)["mat2"]
    inner: list[fx.Node] = []
    weights = strip_casts(weights, inner)
    if kind(weights) != "softmax" or not is_tensor(value):
        return
    soft = operands(weights)
    scores = soft["input"]
    if not is_tensor(scores) or soft["dim"] not in (-1, fake(scores).ndim - 1):
        return
    inner.append(weights)
    scores = strip_casts(scores, inner)
    scores, mask_parts = _masks(scores, inner)
    scale = 1.0
    scores = strip_casts(scores, inner)
    while kind(scores) in ("mul", "div"):
        values = operands(scores)
        factor = number(values["other"])
        if factor is None or not is_tensor(values["input"]):
            return
        scale = scale * factor if kind(scores) == "mul" else scale / factor
        inner.append(scores)
        scores = values["input"]
    if kind(scores) != "matmul":
        return
    inner.append(scores)
    query, keys = operands(scores)["input"], operands(scores)["mat2"]
    if kind(keys) != "transpose" or not is_tensor(query):
        return
    dims = operands(keys)
    rank = fake(keys).ndim
    if {dims["dim0"] % rank, dims["dim1"] % rank} != {rank - 1, rank - 2} or fake(query).ndim != rank:
        return
    if not captured.private(inner, root):
        captured.left[root] = "its scores or weights are used elsewhere too"
        return
    if not captured.movable(inner, root):
        return
    mask = _mask(captured, mask_parts, root, fake(query).dtype, sums) if mask_parts else None
    if mask_parts and mask is None:
        return
    tensors = (query, keys.args[0], value, mask)
    if not all(is_tensor(t) for t in tensors[:3]):
        return
    _route(captured, root, tensors, (False, scale, False), 0.0, "attention spelled out")


def _masks(scores: fx.Node, inner: list[fx.Node]) -> tuple[fx.Node, list[tuple[str, fx.Node]]]:
    """Takes masks off the scores: an addend, or what `where` and masked_fill put in the place of a score."""
    parts: list[tuple[str, fx.Node]] = []
    while True:
        values = operands(scores) if kind(scores) in ("add", "where", "masked_fill") else {}
        if kind(scores) == "add" and values["alpha"] == 1 and is_tensor(values["input"]) and is_tensor(values["other"]):
            a, b = values["input"], values["other"]
            if _is_product(b) and not _is_product(a):
                a, b = b, a
            if fake(a).shape != fake(scores).shape:
                return scores, parts
            parts.append(("add", b))
        elif kind(scores) == "where" and _is_lowest(values["other"]) and is_tensor(values["input"]):
            parts.append(("keep", values["condition"]))
            a = values["input"]
        elif kind(scores) == "masked_fill" and _is_lowest(values["value"]):
            parts.append(("drop", values["mask"]))
            a = values["input"]
        else:
            return scores, parts
        inner.append(scores)
        scores = strip_casts(a, inner)


def _is_product(node: fx.Node) -> bool:
    node = strip_casts(node, [])
    while kind(node) in ("mul", "div") and is_tensor(operands(node)["input"]):
        node = operands(node)["input"]
    return kind(node) == "matmul"


def _is_lowest(value: object) -> bool:
    plain = number(value)
    return plain is not None and plain <= _MINUS_INFINITY


def _mask(
    captured: Captured, parts: list[tuple[str, fx.Node]], root: fx.Node, dtype: torch.dtype, sums: _Sums
) -> fx.Node | None:
    """The one mask of a call, or None. Several addends (position biases, padding) are summed once for all layers."""
    if not all(isinstance(fake(mask), Tensor) for _, mask in parts):
        return None
    if len(parts) == 1 and parts[0][0] != "add":
        how, mask = parts[0]
        if fake(mask).dtype is not torch.bool:
            return None
        return mask if how == "keep" else captured.call(torch.logical_not, (mask,), at=root)
    masks = tuple(mask for _, mask in reversed(parts))
    if any(how != "add" for how, _ in parts) or any(fake(mask).dtype not in (torch.float32, dtype) for mask in masks):
        return None
    total = masks[0]
    for mask in masks[1:]:
        # A mask that is written to between two layers is not the same mask.
        if (total, mask) not in sums or captured.writers:
            sums[total, mask] = captured.call(operator.add, (total, mask), at=root)
        total = sums[total, mask]
    return total
