"""Linear layers that read one input become one: the projections to queries, keys and values.

One product of [M, K] x [K, 3N] keeps the cores busier than three, pays once for the call, and an int8 layer quantizes
its rows once. The results are views of the columns of one tensor; attention takes them as they lie. Where the layers
stay apart (their weights are not the model's own, or one has an activation in its epilogue), int8 layers still share
one quantization.

The merged weight is no second copy of the model: each parameter moves to its rows of it, so that loading or
editing the parameter in place edits the merged weight. Parameters that share memory with anything else are left where
they are, and the merged weight is a copy that is made again when they change.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lamina import ops
from lamina.compile import choose
from lamina.compile.capture import Captured, fake, is_tensor, kind, operands
from lamina.compile.fuse.linear import INT8_LINEARS, call_int8_linear
from lamina.ops.int8_linear import PackedInt8Weight, pack_int8_weight, unpack_int8_weight
from lamina.ops.sparse_int8_linear import (
    PackedSparseInt8Weight,
    pack_sparse_int8_weight,
    packed_pattern,
    unpack_sparse_int8_weight,
)

_PACKED = ("data", "scale", "compensation")
# What a merged call may differ in from one of its parts.
_OWN = (*_PACKED, "bias", "x", "x_scale")


def merge(captured: Captured) -> None:
    done = []
    for of_kind, merge_group in (
        ("linear", _merge_float),
        ("int8_linear", _merge_int8),
        ("sparse_int8_linear", _merge_sparse_int8),
    ):
        for group in _groups(captured, of_kind):
            parts = merge_group(captured, group)
            if parts is not None:
                done.append((group, parts))
    try:
        captured.evaluate_all()
    except (RuntimeError, ValueError) as failure:
        # A view that the columns of a larger tensor do not allow.
        for group, parts in done:
            for node, part in zip(group, parts, strict=True):
                part.replace_all_uses_with(node)
                captured.left[node] = f"its result cannot be a view: {failure}"
        for _, parts in done:
            for part in parts:
                captured.erase(part)
        captured.evaluate_all()
        return
    for group, parts in done:
        captured.fused.append((f"{len(parts)} {kind(group[0])} of one input", ""))
        for node in group:
            captured.erase(node)


def _groups(captured: Captured, of_kind: str) -> list[list[fx.Node]]:
    """Calls of one kind on one input with weights of the model and nothing in the epilogue that the others lack."""
    groups: dict[tuple, list[fx.Node]] = {}
    for node in captured.nodes(of_kind):
        values = operands(node)
        x = values["input"] if of_kind == "linear" else values["x"]
        weights = [values["weight"]] if of_kind == "linear" else [values[name] for name in _PACKED]
        if not is_tensor(x) or not all(map(captured.fixed, weights)):
            continue
        bias = values["bias"]
        if bias is not None and not captured.fixed(bias):
            continue
        if values.get("residual") is not None or values.get("activation", "none") not in (None, "none"):
            continue
        rest = tuple((k, v) for k, v in values.items() if k not in _OWN and k not in ("input", "weight"))
        dtype = fake(weights[0]).dtype
        scale = _static_scale(captured, values.get("x_scale"))
        groups.setdefault((x, bias is None, dtype, scale, *rest), []).append(node)
    found = []
    for group in groups.values():
        weights = {operands(node)["weight" if of_kind == "linear" else "data"] for node in group}
        if 1 < len(group) == len(weights) and captured.movable(group, group[0]):
            found.append(group)
    return found


def _static_scale(captured: Captured, scale: fx.Node | None) -> fx.Node | float | None:
    """The calibrated scale itself, which layers of one input share; a scale that the graph computes stays its node."""
    known = captured.constant(scale)
    return scale if known is None or known.numel() != 1 else known.item()


def _merge_float(captured: Captured, group: list[fx.Node]) -> list[fx.Node] | None:
    values = [operands(node) for node in group]
    x, weights, biases = values[0]["input"], [v["weight"] for v in values], [v["bias"] for v in values]
    sizes = [fake(weight).shape[0] for weight in weights]
    if fake(x).dtype not in (torch.float32, torch.bfloat16) or fake(weights[0]).ndim != 2:
        return None
    if captured.measure:
        given = choose.random_like(x)
        apart = choose.random_like(weights)
        whole = torch.cat(apart)
        key = ("merge", choose.describe((x, weights)))
        candidates: dict[str, Callable[[], Any]] = {
            "apart": lambda: [F.linear(given, weight) for weight in apart],
            "merged": lambda: F.linear(given, whole).split(sizes, -1),
        }
        if choose.fastest(key, candidates) == "apart":
            for node in group:
                captured.left[node] = "apart as fast as merged"
            return None
    beside = _beside(captured)
    (weight,) = captured.fold(weights, beside)
    bias = None if biases[0] is None else captured.fold(biases, beside)[0]
    merged = captured.call(F.linear, (x, weight, bias), at=group[0])
    return _split(captured, merged, sizes, group)


def _merge_int8(captured: Captured, group: list[fx.Node]) -> list[fx.Node] | None:
    values = [operands(node) for node in group]
    features = fake(values[0]["x"]).shape[-1]
    if not isinstance(features, int):
        return None
    sources = [v[name] for v in values for name in _PACKED]
    sizes = [fake(v["scale"]).shape[0] for v in values]

    beside = _beside(captured)

    def pack(*tensors: Tensor) -> tuple[Tensor, ...]:
        packed = [PackedInt8Weight(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
        codes = torch.cat([unpack_int8_weight(part, features) for part in packed])
        whole = pack_int8_weight(codes, torch.cat([part.scale for part in packed]))
        if torch.equal(torch.cat([part.data for part in packed]), whole.data):
            # Whole panels: the packing of the whole is that of the parts one behind the other.
            return *beside(*(p.data for p in packed)), whole.scale, whole.compensation
        return tuple(whole)

    arguments = dict(zip(_PACKED, captured.fold(sources, pack), strict=True))
    if values[0]["bias"] is not None:
        arguments["bias"] = captured.fold([v["bias"] for v in values], beside)[0]
    if captured.fixed(values[0]["x_scale"]):
        arguments["x_scale"] = captured.fold([v["x_scale"] for v in values], _shared_scale)[0]
    merged = call_int8_linear(captured, values[0] | arguments, at=group[0])
    return _split(captured, merged, sizes, group)


def _merge_sparse_int8(captured: Captured, group: list[fx.Node]) -> list[fx.Node] | None:
    values = [operands(node) for node in group]
    features = fake(values[0]["x"]).shape[-1]
    patterns = {_pattern(captured, v["data"]) for v in values}
    if not isinstance(features, int) or len(patterns) > 1 or None in patterns:
        return None
    (pattern,) = patterns

    def pack(*tensors: Tensor) -> tuple[Tensor, ...]:
        packed = [PackedSparseInt8Weight(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
        codes = torch.cat([unpack_sparse_int8_weight(part, features) for part in packed])
        return tuple(pack_sparse_int8_weight(codes, torch.cat([part.scale for part in packed]), pattern=pattern))

    arguments = dict(zip(_PACKED, captured.fold([v[name] for v in values for name in _PACKED], pack), strict=True))
    if values[0]["bias"] is not None:
        arguments["bias"] = captured.fold([v["bias"] for v in values], _beside(captured))[0]
    if captured.fixed(values[0]["x_scale"]):
        arguments["x_scale"] = captured.fold([v["x_scale"] for v in values], _shared_scale)[0]
    merged = call_int8_linear(captured, values[0] | arguments, at=group[0], op=group[0].target)
    return _split(captured, merged, [fake(v["scale"]).shape[0] for v in values], group)


def _pattern(captured: Captured, data: fx.Node) -> str | None:
    known = captured.constant(data)
    return None if known is None else packed_pattern(known)


def _shared_scale(*scales: Tensor) -> tuple[Tensor]:
    if any(not torch.equal(scale, scales[0]) for scale in scales):
        raise RuntimeError(
            "lamina backend: layers that were merged because they shared one input scale now have several; compile the "
            "model again"
        )
    return (scales[0].detach().clone(),)


def _split(captured: Captured, merged: fx.Node, sizes: list[int], group: list[fx.Node]) -> list[fx.Node]:
    split = captured.call(torch.split, (merged, sizes, -1), at=group[0])
    parts = [captured.take(split, i, at=group[0]) for i in range(len(group))]
    for node, part in zip(group, parts, strict=True):
        node.replace_all_uses_with(part)
    return parts


def _beside(captured: Captured) -> Callable[..., tuple[Tensor]]:
    return lambda *tensors: (adjacent(tensors, move=captured.move_parameters),)


# Merged tensors by the address they start at, for the next graph of the same model.
_wholes: dict[int, weakref.ref[Tensor]] = {}


def adjacent(tensors: tuple[Tensor, ...] | list[Tensor], *, move: bool) -> Tensor:
    """The tensors one behind the other along their first dimension, as one tensor.

    With `move` they become parts of its memory where nothing else can notice: each alone owns its own. To torch, and to
    whoever saves them, each part is a tensor with a storage of exactly its size, as before.
    """
    known = _wholes.get(tensors[0].data_ptr())
    whole = None if known is None else known()
    if whole is not None and _lie_in(whole, tensors):
        return whole
    whole = torch.cat([t.detach() for t in tensors])
    if move and all(map(_owns_memory, tensors)):
        memory = whole.view(-1).view(torch.uint8).numpy()
        start = 0
        for tensor in tensors:
            end = start + tensor.nbytes
            tensor.data = torch.from_numpy(memory[start:end]).view(tensor.dtype).view(tensor.shape)
            start = end
        _wholes[whole.data_ptr()] = weakref.ref(whole)
    return whole


def _lie_in(whole: Tensor, tensors: tuple[Tensor, ...] | list[Tensor]) -> bool:
    end = whole.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.dtype != whole.dtype or not tensor.is_contiguous():
            return False
        end += tensor.nbytes
    return end == whole.data_ptr() + whole.nbytes


def _owns_memory(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    # Two holders: the tensor, and `storage` just here.
    alone = torch._C._storage_Use_Count(storage._cdata) == 2
    return alone and storage.nbytes() == tensor.nbytes and tensor.is_contiguous() and not storage.is_shared()


def share_quantization(captured: Captured) -> None:
    """One quantize_rows for several int8 layers of one float input."""
    quantize = getattr(ops, "quantize_rows", None)
    if quantize is None:
        return
    inputs: dict[fx.Node, list[fx.Node]] = {}
    for node in captured.nodes(*INT8_LINEARS):
        values = operands(node)
        if is_tensor(values["x"]) and values["x_scale"] is None and fake(values["x"]).is_floating_point():
            inputs.setdefault(values["x"], []).append(node)
    for x, group in inputs.items():
        if len(group) < 2 or not captured.movable(group, group[0]):
            continue
        order = {node: i for i, node in enumerate(captured.graph.nodes)}
        first = min(group, key=order.__getitem__)
        both = captured.call(quantize, (x,), at=first)
        codes, scales = (captured.take(both, i, at=first) for i in (0, 1))
        for node in group:
            values = operands(node) | {"x": codes, "x_scale": scales}
            if values["out_dtype"] is None:
                values["out_dtype"] = fake(x).dtype
            new = call_int8_linear(captured, values, at=node, op=node.target)
            node.replace_all_uses_with(new)
            captured.erase(node)
        captured.fused.append((f"rows quantized once for {len(group)} layers", ""))
