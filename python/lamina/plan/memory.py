"""Where buffers lie in an arena: those needed at the same time apart from each other, all in little memory."""

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 64


class Need(NamedTuple):
    """Bytes that are needed from step `first` to step `last`, both included."""

    size: int
    first: int
    last: int


def layout(needs: Sequence[Need]) -> tuple[list[int], int]:
    """The offset of each, and the size of the arena.

    The largest first, each at the lowest place where none of those that live with it lies ("Efficient Memory Management
    for Deep Neural Net Inference", Pisarchyk & Lee, 2020): within a few percent of the most that lives at once.

    >>> layout([Need(100, 0, 1), Need(100, 1, 2), Need(50, 2, 3)])
    ([0, 128, 0], 256)
    """
    offsets = [0] * len(needs)
    placed: list[int] = []
    total = 0
    for i in sorted(range(len(needs)), key=lambda i: (-needs[i].size, needs[i].first)):
        size = (needs[i].size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        taken = sorted(
            (offsets[j], offsets[j] + needs[j].size)
            for j in placed
            if needs[j].first <= needs[i].last and needs[i].first <= needs[j].last
        )
        place = 0
        for begin, end in taken:
            if begin - place >= size:
                break
            place = max(place, (end + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT)
        offsets[i] = place
        placed.append(i)
        total = max(total, place + size)
    return offsets, total
