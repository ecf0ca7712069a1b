"""Which weights go together, and which go: patterns of zeros, scores of blocks, and the choice of the lowest.

Every weight is seen as [groups, outputs, taps, inputs] of its layer: a linear layer has one group and one tap, a
convolution a tap for each position of its kernel. A pattern "RxC" ties R neighbouring outputs and C neighbouring inputs
of one tap together, which stay or go as one. A block that the edge of a group cuts off is a block like any other, so
that every pattern fits every shape.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

PATTERNS = ("unstructured", "2x1", "4x1", "1x4", "2x4", "4x4", "16x16", "32x32", "64x64", "2:4")


@dataclass(frozen=True)
class Pattern:
    """Blocks of `rows` outputs x `cols` inputs; where `most` is set, so many of `cols` inputs in a row may stay."""

    name: str
    rows: int = 1
    cols: int = 1
    most: int | None = None


def parse(name: str, what: str) -> Pattern:
    """The pattern of that name. Raises ValueError, which begins with `what`, for any other."""
    if name not in PATTERNS:
        raise ValueError(f"{what}: pattern is {name!r}, but must be one of {', '.join(PATTERNS)}")
    if name == "unstructured":
        return Pattern(name)
    first, second = map(int, re.split("[x:]", name))
    return Pattern(name, 1, second, first) if ":" in name else Pattern(name, first, second)


def check_sparsity(value: float, pattern: Pattern, what: str) -> float:
    """`value` if it is a share that the pattern can reach; else ValueError."""
    if not 0.0 <= value <= 1.0:  # NaN too
        raise ValueError(f"{what}: sparsity is {value:g}, but must be between 0 and 1, the share of zeros")
    if pattern.most is not None and value not in (0.0, 1 - pattern.most / pattern.cols):
        raise ValueError(
            f"{what}: pattern '{pattern.name}' leaves {pattern.most} of {pattern.cols} neighbouring inputs, which is "
            f"sparsity {1 - pattern.most / pattern.cols:g}, not {value:g}"
        )
    return value


def energies(squares: Tensor, pattern: Pattern) -> Tensor:
    """Sums of the blocks of [groups, outputs, taps, inputs]: [groups, outputs / rows, taps, inputs / cols], rounded up.

    For "2:4" every weight is its own block.
    """
    if pattern.most is not None or (pattern.rows, pattern.cols) == (1, 1):
        return squares
    groups, outputs, taps, inputs = squares.shape
    right, below = -inputs % pattern.cols, -outputs % pattern.rows
    padded = torch.nn.functional.pad(squares, (0, right, 0, 0, 0, below))
    blocks = padded.reshape(
        groups, (outputs + below) // pattern.rows, pattern.rows, taps, (inputs + right) // pattern.cols, pattern.cols
    )
    return blocks.sum((2, 5))


def expand(blocks: Tensor, pattern: Pattern, shape: torch.Size) -> Tensor:
    """One value a block, as `energies` has them, to one value a weight: [groups, outputs, taps, inputs] of `shape`."""
    if pattern.most is not None or (pattern.rows, pattern.cols) == (1, 1):
        return blocks
    _, outputs, _, inputs = shape
    rows = blocks.repeat_interleave(pattern.rows, dim=1)[:, :outputs]
    return rows.repeat_interleave(pattern.cols, dim=3)[..., :inputs]


def sizes(pattern: Pattern, shape: torch.Size) -> Tensor:
    """How many weights each block has, as `energies` gives blocks: fewer where the edge of a group cuts it off."""
    return energies(torch.ones(shape), pattern)


def lowest(scores: Tensor, share: float, sizes: Tensor) -> Tensor:
    """Which blocks go so that `share` of the weights does: bool, the lowest scores of each row of [..., n].

    sizes: weights of each block, of the shape of scores. As many blocks go as come nearest to the share; of equal
    scores the first go.
    """
    if bool((sizes == sizes.flatten()[0]).all()):
        count = round(share * scores.shape[-1])
        if count in (0, scores.shape[-1]):
            return torch.full_like(scores, bool(count), dtype=torch.bool)
        # Much faster than to sort everything.
        border = scores.kthvalue(count, dim=-1, keepdim=True).values
        chosen, equal = scores < border, scores == border
        missing = count - chosen.sum(-1, keepdim=True)
        return chosen | (equal & (equal.cumsum(-1) <= missing))
    order = scores.argsort(dim=-1, stable=True)
    sizes = sizes.gather(-1, order).double()
    # A block goes if at least half of it is still within the share.
    inside = sizes.cumsum(-1) - sizes / 2 <= share * sizes.sum(-1, keepdim=True)
    chosen = torch.empty_like(inside).scatter_(-1, order, inside)
    return chosen if 0.0 < share < 1.0 else torch.full_like(chosen, share == 1.0)


def lowest_of_neighbours(scores: Tensor, pattern: Pattern) -> Tensor:
    """For "N:M": all but the N highest of every M neighbours in the last dimension; of a shorter rest, N stay too."""
    inputs = scores.shape[-1]
    padded = torch.nn.functional.pad(scores, (0, -inputs % pattern.cols), value=-1.0)
    neighbours = padded.reshape(*scores.shape[:-1], padded.shape[-1] // pattern.cols, pattern.cols)
    # What is padded comes last among equals only if it scores lower than anything real: scores are not negative.
    gone = lowest(neighbours, 1 - pattern.most / pattern.cols, torch.ones_like(neighbours))
    return gone.reshape(padded.shape)[..., :inputs]
