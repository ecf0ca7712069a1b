"""Whether a layer's zeros are worth a sparse kernel, and in which pattern: counted, then measured on this machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.ops import semi_structured
from lamina.ops.sparse_blocks import BLOCKS
from lamina.ops.sparse_int8_linear import block_density
from lamina.ops.sparse_linear import PATTERNS, PackedSparseWeight, pack_sparse_weight, sparse_linear
from lamina.stopwatch import Stopwatch, in_turns, stopwatch_of

# The share of blocks with a nonzero from which a GPU, whose dense products are that much faster than what they read,
# need not be asked.
_GPU_DENSITY = 0.5
# What a value costs beside the others where 4, 2 or 1 output channels share an input: registers loaded a product.
_COST = {"unstructured": 1.5, "2x1": 1.2, "4x1": 1.0}
# Fewer zeros than this cannot pay for the indices, and are not measured; blocks of four channels broke even at less
# than a tenth on 128 rows, values one by one at a fifth.
_FEWEST_ZEROS = 0.15
_SECONDS = 0.02


@dataclass(frozen=True)
class Choice:
    """`pattern`: the one to pack in, None to leave the layer dense; `reason`: why, in words.

    density: of the values that the pattern would store; speedup: dense time / sparse time, and break_even: the density
    at which both take the same time, where they were measured.
    """

    pattern: str | None
    reason: str
    density: float
    speedup: float | None = None
    break_even: float | None = None


def choose_pattern(weight: Tensor, rows: int | None = 128) -> Choice:
    """The pattern in which a weight [N, K] is multiplied fastest, and whether that beats the dense product.

    rows: how many rows of input it is timed with, on torch's threads, in some 50 ms; None to count only, and leave
    the measuring to the caller.

    >>> lamina.sparsity.choose_pattern(linear.weight).pattern
    """
    weight = weight.detach()
    zeros = float((weight == 0).float().mean()) if weight.numel() else 0.0
    if zeros < _FEWEST_ZEROS:
        return Choice(None, f"{zeros:.0%} of its weight is zeros, too few for a sparse kernel", 1 - zeros)
    # On a GPU the larger of two blocks that hold as much.
    patterns = [*reversed(BLOCKS)] if weight.is_cuda else PATTERNS
    densities = {p: block_density(weight, "1x1" if p == "unstructured" else p) for p in patterns}
    pattern = min(patterns, key=lambda p: densities[p] * _COST.get(p, 1.0))
    density = densities[pattern]
    if weight.is_cuda and density >= _GPU_DENSITY and semi_structured.obstacle(weight) is None:
        return choose_semi_structured(weight, rows)
    if weight.is_cuda and density > _GPU_DENSITY:
        return Choice(None, f"{density:.0%} of its {pattern} blocks hold a nonzero, too many for a GPU", density)
    if rows is None:
        return Choice(pattern, f"{zeros:.0%} of its weight is zeros", density)
    x = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    packed, empty = pack_sparse_weight(weight, pattern), pack_sparse_weight(torch.zeros_like(weight), pattern)
    dense, sparse, nothing = _medians(
        [lambda: F.linear(x, weight), lambda: sparse_linear(x, packed), lambda: sparse_linear(x, empty)],
        stopwatch_of(weight.device),
    )
    # Time beyond that of an empty weight goes with the stored values.
    slope = max(sparse - nothing, 1e-9) / max(density, 1e-9)
    break_even = min(max((dense - nothing) / slope, 0.0), 1.0)
    speedup = dense / sparse
    measured = f"{speedup:.1f}x at {zeros:.0%} zeros on {rows} rows; {pattern} breaks even at {1 - break_even:.0%}"
    if speedup < 1:
        return Choice(None, f"a sparse kernel would be slower: {measured}", density, speedup, break_even)
    return Choice(pattern, measured, density, speedup, break_even)


def choose_semi_structured(weight: Tensor, rows: int | None = 128) -> Choice:
    """Whether a kernel for 2:4 multiplies a weight [N, K] on a GPU, zeros in two of four neighbours, faster than dense.

    rows: how many it is timed with; None leaves that to the caller. The faster kernel is remembered: weights of this
    shape are packed for it.

    >>> lamina.sparsity.choose_semi_structured(linear.weight, rows=4096).reason
    """
    weight = weight.detach()
    if (why := semi_structured.obstacle(weight)) is not None:
        return Choice(None, why, 1.0)
    if rows is None:
        return Choice(semi_structured.PATTERN, "two of four neighbours in its weight are zeros", 0.5)
    x = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    kernels = semi_structured.kernels(weight.device)
    packed = []
    for kernel in kernels:
        data, index = semi_structured.pack(weight, kernel)
        packed.append(PackedSparseWeight(data, weight.shape[0], index))
    calls = [lambda p=p: sparse_linear(x, p) for p in packed]
    dense, *times = _medians([lambda: F.linear(x, weight), *calls], stopwatch_of(weight.device))
    best, kernel = min(zip(times, kernels, strict=True))
    semi_structured.prefer(weight, kernel)
    measured = f"2:4 by {kernel} takes {best / dense:.2f} of the dense product's time on {rows} rows"
    return Choice(semi_structured.PATTERN if best < dense else None, measured, 0.5, dense / best)


def _medians(calls: Sequence[Callable[[], Tensor]], stopwatch: Stopwatch) -> list[float]:
    """Median seconds of each, called in turn."""
    named = {str(i): call for i, call in enumerate(calls)}
    with torch.no_grad():
        times = in_turns(named, _SECONDS * len(calls), 3, stopwatch)
    return [sorted(record)[len(record) // 2] for record in times.values()]
