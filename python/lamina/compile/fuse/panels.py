"""Chains of sparse int8 layers in panels of tokens: what passes between them is never turned.

A sparse product wants tokens in the lanes. Between two layers that read and write rows, each turns its codes into
panels and its sums back into rows, and what is done to a token by itself (a norm, its largest value) runs along the
row. Here a chain of layers, with the norms and the attention between them, reads and writes panels (see
`lamina.ops.token_panels`); only what enters and what leaves is turned. A layer that alone reads another's result gets
its codes and never sees it, and a norm that alone reads a layer's result is made by the layer.

The numbers are those of the rows but for the rounding of norms and attention. Attention may multiply in bfloat16 here,
as between int8 layers in rows (see `precision`). A chain is taken where all of it measures faster.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lamina import _C, ops
from lamina.compile import choose
from lamina.compile.capture import Captured, fake, is_tensor, kind, operands
from lamina.compile.fuse.linear import INT8_LINEARS
from lamina.compile.fuse.precision import ISA as BFLOAT16_ISA
from lamina.compile.fuse.precision import readers
from lamina.ops.attention import MAX_HEAD_SIZE

_LINEAR, _ATTENTION, _NORM = (
    getattr(torch.ops.lamina, name) for name in ("sparse_int8_linear", "attention", "layer_norm")
)
_PANELS = torch.ops.lamina.token_panels
# The ops that give codes instead of panels.
_TO_CODES = {_LINEAR.panels: _LINEAR.panel_codes, _ATTENTION.panels: _ATTENTION.panel_codes}


@dataclass(eq=False)
class _Step:
    """A call that has a form in panels, and the node whose numbers it gives: attention's are those behind its views."""

    node: fx.Node
    result: fx.Node
    inputs: tuple[fx.Node, ...]  # results of steps, or tensors from outside
    options: dict[str, Any]


@dataclass(eq=False)
class _Chain:
    steps: list[_Step] = field(default_factory=list)

    @property
    def linears(self) -> int:
        return sum(kind(step.node) == "sparse_int8_linear" for step in self.steps)

    @property
    def keeps_sequences(self) -> bool:
        """Whether sequences must begin with a panel of their own."""
        return any(step.node.target is _ATTENTION.default for step in self.steps)


def panels(captured: Captured) -> None:
    """Runs when layers are merged and have their epilogues, and attention its op."""
    for chain in _chains(captured):
        if chain.linears < 2 or not _movable(captured, chain):
            continue
        if not captured.measure or _is_faster(captured, chain):
            _rewrite(captured, chain)


def _chains(captured: Captured) -> list[_Chain]:
    """Steps that hand panels to each other."""
    steps: dict[fx.Node, _Step] = {}  # by result
    chain_of: dict[_Step, _Chain] = {}
    for node in list(captured.graph.nodes):
        step = _step(captured, node, steps)
        if step is None:
            continue
        chain = chain_of[step] = _Chain([step])
        for given in step.inputs:
            if given not in steps or chain_of[steps[given]] is chain:
                continue
            joined = chain_of[steps[given]].steps
            chain.steps += joined
            chain_of.update(dict.fromkeys(joined, chain))
        steps[step.result] = step
    order = {node: i for i, node in enumerate(captured.graph.nodes)}
    chains = list(dict.fromkeys(chain_of.values()))
    for chain in chains:
        chain.steps.sort(key=lambda step: order[step.node])
    return chains


def _step(captured: Captured, node: fx.Node, steps: dict[fx.Node, _Step]) -> _Step | None:
    if kind(node) == "sparse_int8_linear":
        return _linear_step(captured, node)
    if kind(node) == "layer_norm":
        return _norm_step(captured, node, steps)
    if node.target is _ATTENTION.default:
        return _attention_step(node, steps)
    return None


def _plain(node: Any) -> bool:
    """Whether a tensor is float32 [..., L, K] of sizes that never change."""
    if not is_tensor(node):
        return False
    value = fake(node)
    return (
        value.dtype is torch.float32
        and value.device.type == "cpu"
        and value.ndim >= 2
        and all(isinstance(size, int) for size in value.shape)
        and value.numel() > 0
    )


def _linear_step(captured: Captured, node: fx.Node) -> _Step | None:
    values = operands(node)
    x = _quantized_from(values["x"], values["x_scale"]) if values["x_scale"] is not None else values["x"]
    residual = values["residual"]
    if x is None or values["out_scale"] is not None or not _plain(x) or not _plain(node):
        return None
    if residual is not None and not _plain(residual):
        return None
    if not all(captured.fixed(values[name]) for name in ("data", "scale", "compensation")):
        return None
    if values["bias"] is not None and not captured.fixed(values["bias"]):
        return None
    return _Step(node, node, (x,) if residual is None else (x, residual), values)


def _quantized_from(x: Any, scales: Any) -> fx.Node | None:
    """The float tensor behind codes and scales that several layers share."""
    both = x.args[0] if kind(x) == "getitem" else None
    if not isinstance(both, fx.Node) or both.target is not ops.quantize_rows:
        return None
    shared = kind(scales) == "getitem" and scales.args[0] is both and len(both.args) == 1
    return both.args[0] if shared else None


def _norm_step(captured: Captured, node: fx.Node, steps: dict[fx.Node, _Step]) -> _Step | None:
    values = operands(node)
    x = values["input"]
    if x not in steps or not _plain(node) or list(values["normalized_shape"]) != [fake(x).shape[-1]]:
        return None
    for name in ("weight", "bias"):
        if values[name] is not None and not (
            captured.fixed(values[name]) and fake(values[name]).dtype in (torch.float32, torch.bfloat16)
        ):
            return None
    return _Step(node, node, (x,), values)


@dataclass(frozen=True)
class _Heads:
    """[B, H, L, D] as features [first, first + H * D) of a result [B, L, ...]."""

    source: fx.Node
    first: int
    heads: int
    size: int


def _attention_step(node: fx.Node, steps: dict[fx.Node, _Step]) -> _Step | None:
    query, key, value, mask, causal, scale, grouped = node.args
    found = [_heads(tensor, steps) for tensor in (query, key, value)]
    if None in found or causal or grouped:
        return None
    q, k, v = found
    shape, size = fake(query).shape, fake(query).shape[-1]
    if not q.heads == k.heads == v.heads or fake(key).shape[:3] != shape[:3] or max(size, v.size) > MAX_HEAD_SIZE:
        return None
    if mask is not None and (mask := _of_keys(mask, *shape[::2])) is None:
        return None
    result = _joined(node)
    if result is None or not _plain(result):
        return None
    # As between int8 layers in rows.
    narrow = _C.active_isa() == BFLOAT16_ISA and all(kind(reader) in INT8_LINEARS for reader in readers(result))
    options = {"heads": found, "mask": mask, "scale": size**-0.5 if scale is None else scale, "bfloat16": narrow}
    return _Step(node, result, tuple(part.source for part in found), options)


def _of_keys(mask: Any, batch: int, length: int) -> fx.Node | None:
    """A mask that is the same for all heads and queries, as [1 or B, 1, 1, L] or less."""
    if isinstance(mask, fx.Node) and mask.op == "call_method" and mask.target == "expand":
        mask = mask.args[0]
    if not is_tensor(mask) or fake(mask).dtype not in (torch.bool, torch.float32):
        return None
    shape = (1, 1, 1, *fake(mask).shape)[-4:]
    return mask if shape[0] in (1, batch) and tuple(shape[1:]) == (1, 1, length) else None


def _turns_heads(node: fx.Node) -> bool:
    """[B, L, H, D] <-> [B, H, L, D]."""
    if not is_tensor(node) or fake(node).ndim != 4:
        return False
    if kind(node) == "transpose":
        return {operands(node)["dim0"] % 4, operands(node)["dim1"] % 4} == {1, 2}
    if node.op != "call_method" or node.target != "permute":
        return False
    return tuple(node.args[1:]) in ((0, 2, 1, 3), ((0, 2, 1, 3),))


def _heads(node: fx.Node, steps: dict[fx.Node, _Step]) -> _Heads | None:
    if not _turns_heads(node) or kind(cut := node.args[0]) != "view":
        return None
    part = cut.args[0]
    if not is_tensor(part) or fake(cut).ndim != 4 or fake(part).ndim != 3:
        return None
    if fake(cut).shape[:2] != fake(part).shape[:2]:
        return None
    heads, size = fake(cut).shape[2:]
    if part in steps:
        return _Heads(part, 0, heads, size)
    split = part.args[0] if kind(part) == "getitem" else None
    if kind(split) != "split" or (source := split.args[0]) not in steps:
        return None
    sizes = [piece.shape[-1] for piece in fake(split)]
    if sum(sizes) != fake(source).shape[-1]:
        return None
    return _Heads(source, sum(sizes[: part.args[1]]), heads, size)


def _joined(node: fx.Node) -> fx.Node | None:
    """What alone uses attention's result [B, H, L, D]: the same as [B, L, H * D]."""
    batch, heads, length, size = fake(node).shape
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None
        (user,) = users
        if _turns_heads(user) or kind(user) == "contiguous":
            node = user
        elif kind(user) == "view" and tuple(fake(node).shape) == (batch, length, heads, size):
            return user if tuple(fake(user).shape) == (batch, length, heads * size) else None
        else:
            return None


def _movable(captured: Captured, chain: _Chain) -> bool:
    nodes = [step.node for step in chain.steps]
    return captured.movable(nodes, nodes[-1])


def _rewrite(captured: Captured, chain: _Chain) -> None:
    sequences = chain.keeps_sequences
    made: dict[fx.Node, fx.Node] = {}  # panels of a tensor
    codes: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}  # of panels
    masks: dict[fx.Node, fx.Node] = {}  # as [B, L]
    shapes: dict[fx.Node, tuple[int, ...]] = {}

    def panels_of(tensor: fx.Node, at: fx.Node) -> fx.Node:
        if tensor not in made:
            source = tensor
            if not sequences and fake(tensor).ndim > 2:
                source = captured.call("reshape", (tensor, (-1, fake(tensor).shape[-1])), at=at)
            made[tensor] = captured.call(_PANELS.default, (source,), at=at)
        return made[tensor]

    def codes_of(tensor: fx.Node, at: fx.Node) -> tuple[fx.Node, fx.Node]:
        given = panels_of(tensor, at)
        if given not in codes:
            both = captured.call(_PANELS.codes, (given,), at=at)
            codes[given] = captured.take(both, 0, at=at), captured.take(both, 1, at=at)
        return codes[given]

    for step in chain.steps:
        node, values = step.node, step.options
        shapes[step.result] = tuple(fake(step.result).shape)
        if kind(node) == "sparse_int8_linear":
            weights = tuple(values[name] for name in ("data", "scale", "compensation", "bias"))
            residual = None if values["residual"] is None else panels_of(values["residual"], node)
            args = (*codes_of(step.inputs[0], node), *weights, values["activation"] or "none", residual)
            made[step.result] = captured.call(_LINEAR.panels, args, at=node)
        elif kind(node) == "layer_norm":
            args = (panels_of(step.inputs[0], node), values["weight"], values["bias"], values["eps"])
            parts = captured.call(_NORM.panels, args, at=node)
            made[step.result], *both = (captured.take(parts, i, at=node) for i in range(3))
            codes[made[step.result]] = tuple(both)
        else:
            tensors = (_part(captured, panels_of(h.source, node), h, node) for h in values["heads"])
            mask = values["mask"]
            if mask is not None:
                if mask not in masks:
                    masks[mask] = captured.call("reshape", (mask, (-1, fake(mask).shape[-1])), at=node)
                mask = masks[mask]
            length, heads = fake(node).shape[2], values["heads"][0].heads
            args = (*tensors, mask, length, heads, values["scale"], values["bfloat16"])
            made[step.result] = captured.call(_ATTENTION.panels, args, at=node)

    for step in chain.steps:
        shape = shapes[step.result]
        lead = shape[:-1] if sequences else (torch.Size(shape[:-1]).numel(),)
        rows = captured.call(_PANELS.rows, (made[step.result], lead), at=step.result)
        if lead != shape[:-1]:
            rows = captured.call("view", (rows, shape), at=step.result)
        step.result.replace_all_uses_with(rows)
    for step in reversed(chain.steps):
        captured.erase(step.result)
    for node in list(captured.graph.nodes):
        if node.target is _PANELS.rows or (kind(node) == "view" and not node.users):
            captured.erase(node)
    _norms_at_once(captured)
    _codes_alone(captured)
    captured.fused.append((f"{chain.linears} sparse int8 layers in panels", ""))


def _part(captured: Captured, whole: fx.Node, heads: _Heads, at: fx.Node) -> fx.Node:
    width = heads.heads * heads.size
    if width == fake(whole).shape[1]:
        return whole
    return captured.call("narrow", (whole, 1, heads.first, width), at=at)


def _norms_at_once(captured: Captured) -> None:
    """A norm that alone reads a layer's result is made by the layer."""
    for node in list(captured.graph.nodes):
        source = node.args[0] if node.target is _NORM.panels else None
        if not isinstance(source, fx.Node) or source.target is not _LINEAR.panels or set(source.users) != {node}:
            continue
        both = captured.call(_LINEAR.panel_norm, (*source.args, *node.args[1:]), at=source)
        node.replace_all_uses_with(both)
        captured.erase(node)


def _codes_alone(captured: Captured) -> None:
    """Panels of which only the codes are used are never written."""
    for node in list(captured.graph.nodes):
        source = node.args[0] if node.target is _PANELS.codes else None
        if not isinstance(source, fx.Node) or source.target not in _TO_CODES or set(source.users) != {node}:
            continue
        both = captured.call(_TO_CODES[source.target], source.args, at=source)
        node.replace_all_uses_with(both)
        captured.erase(node)


def _is_faster(captured: Captured, chain: _Chain) -> bool:
    """All steps of the chain, in rows and in panels, on random inputs and the layers' own weights."""
    rows, turned, key = [], [], []
    for step in chain.steps:
        in_rows, in_panels, described = _timed(captured, step)
        rows.append(in_rows)
        turned.append(in_panels)
        key.append(described)
    results = {step.result for step in chain.steps}
    for tensor in {t for step in chain.steps for t in step.inputs} - results:
        x = choose.random_like(tensor)
        turned.append(lambda x=x: _PANELS.codes(_PANELS.default(x)))
        key.append(("in", tuple(x.shape)))
    inside = {step.node for step in chain.steps}
    for step in chain.steps:
        if any(user not in inside for user in readers(step.result)):
            x = choose.random_like(step.result)
            panels = _PANELS.default(x)
            turned.append(lambda panels=panels, x=x: _PANELS.rows(panels, x.shape[:-1]))
    candidates: dict[str, Callable[[], Any]] = {
        "rows": lambda: [run() for run in rows],
        "panels": lambda: [run() for run in turned],
    }
    return choose.fastest(("panels", *key), candidates) == "panels"


def _timed(captured: Captured, step: _Step) -> tuple[Callable[[], Any], Callable[[], Any], tuple]:
    """A step in rows, the same in panels, and what tells it from others."""
    given = [choose.random_like(tensor) for tensor in step.inputs]
    panels = [_PANELS.default(x) for x in given]
    values = step.options
    shapes = tuple(tuple(x.shape) for x in given)
    if kind(step.node) == "sparse_int8_linear":
        weights = [captured.known(values[name]) for name in ("data", "scale", "compensation", "bias")]
        activation = values["activation"] or "none"
        residual, residual_panels = (given[1], panels[1]) if len(given) > 1 else (None, None)
        codes = _PANELS.codes(panels[0])
        return (
            lambda: _LINEAR.default(given[0], *weights, activation, residual),
            lambda: _LINEAR.panels(*codes, *weights, activation, residual_panels),
            ("linear", shapes, weights[0].numel(), weights[1].numel(), activation),
        )
    if kind(step.node) == "layer_norm":
        weight, bias = (captured.known(values[name]) for name in ("weight", "bias"))
        shape = given[0].shape[-1:]
        return (
            lambda: F.layer_norm(given[0], shape, weight, bias, values["eps"]),
            lambda: _NORM.panels(panels[0], weight, bias, values["eps"]),
            ("norm", shapes),
        )
    heads = values["heads"]
    tensors = [choose.random_like(t) for t in step.node.args[:3]]
    if values["bfloat16"]:
        tensors = [t.bfloat16() for t in tensors]
    parts = [p.narrow(1, h.first, h.heads * h.size) for p, h in zip(panels, heads, strict=True)]
    length = tensors[0].shape[2]
    return (
        lambda: _ATTENTION.default(*tensors, None, False, values["scale"], False),
        lambda: _ATTENTION.panels(*parts, None, length, heads[0].heads, values["scale"], values["bfloat16"]),
        ("attention", shapes, heads[0].heads),
    )
