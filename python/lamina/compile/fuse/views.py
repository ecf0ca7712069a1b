"""The views between a layer and its attention, in as few calls as there can be.

A view costs a microsecond or three in C and ten where torch runs Python for it, and an attention layer has a dozen: the
columns of a merged projection are split, and each part is cut into heads and transposed. All three parts at once are
one view, one permute and one unbind.
"""

from typing import Any

import torch
from torch import fx
from torch._prims_common import is_contiguous_or_false

from lamina.compile.capture import Captured, fake, is_tensor, kind, operands


def views(captured: Captured) -> None:
    for node in captured.nodes("split"):
        _heads(captured, node)
    for node in captured.nodes("split"):
        _split(captured, node)
    for node in captured.nodes("view"):
        shape = _shape(fake(node).shape) if node.target in ("unflatten", "flatten") else None
        if shape is not None and is_tensor(node.args[0]):
            target = "view" if node.target == "unflatten" else "reshape"
            new = captured.call(target, (node.args[0], shape), at=node)
            node.replace_all_uses_with(new)
            captured.erase(node)


def _shape(shape: Any) -> tuple[int, ...] | None:
    """A shape as plain numbers, -1 for the one size that varies; None if more than one does or one is 0."""
    sizes = tuple(size if isinstance(size, int) else -1 for size in shape)
    return sizes if sizes.count(-1) <= 1 and 0 not in sizes else None


def _parts(node: fx.Node) -> list[int] | None:
    """The sizes of the parts that a split along the last dimension takes, if all of them are numbers."""
    source = node.args[0] if node.args else None
    if not is_tensor(source):
        return None
    values = dict(zip(("input", "sizes", "dim"), node.args, strict=False)) | node.kwargs
    if values.get("dim", 0) not in (-1, fake(source).ndim - 1):
        return None
    sizes = [part.shape[-1] for part in fake(node)]
    return sizes if all(isinstance(size, int) for size in sizes) else None


def _split(captured: Captured, node: fx.Node) -> None:
    sizes = _parts(node)
    if sizes is not None and node.target is not torch.split_with_sizes:
        new = captured.call(torch.split_with_sizes, (node.args[0], sizes, -1), at=node)
        node.replace_all_uses_with(new)
        captured.erase(node)


def _heads(captured: Captured, node: fx.Node) -> None:
    """split -> for each part view [B, L, H, D] -> transpose(1, 2), to one view, one permute and one unbind."""
    sizes = _parts(node)
    if sizes is None or len(set(sizes)) != 1 or fake(node.args[0]).ndim != 3:
        return
    taken = list(node.users)
    if any(kind(part) != "getitem" or len(part.users) != 1 for part in taken):
        return
    cut = [next(iter(part.users)) for part in taken]
    if any(kind(view) != "view" or len(view.users) != 1 or fake(view).ndim != 4 for view in cut):
        return
    turned = [next(iter(view.users)) for view in cut]
    for view, turn in zip(cut, turned, strict=True):
        if kind(turn) != "transpose" or {operands(turn)["dim0"], operands(turn)["dim1"]} not in ({1, 2}, {-3, -2}):
            return
        if fake(view).shape != fake(cut[0]).shape or fake(view).shape[:2] != fake(node.args[0]).shape[:2]:
            return
    batch, length, heads, width = fake(cut[0]).shape
    shape = _shape((batch, length, len(sizes), heads, width))
    if (
        shape is None
        or not is_contiguous_or_false(fake(node.args[0]))
        or not captured.movable([*taken, *cut, *turned], node)
    ):
        return
    whole = captured.call("view", (node.args[0], shape), at=node)
    whole = captured.call("permute", (whole, 2, 0, 3, 1, 4), at=node)
    whole = captured.call("unbind", (whole,), at=node)
    for part, turn in zip(taken, turned, strict=True):
        turn.replace_all_uses_with(captured.take(whole, part.args[1], at=node))
    for turn in turned:
        captured.erase(turn)
