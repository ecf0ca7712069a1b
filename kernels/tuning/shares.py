"""What the tables of products reckon with: shared memory, and how work is shared among multiprocessors."""

from typing import Protocol


class Block(Protocol):
    """What a tile computes."""

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...


def stages_that_fit(most: int, stage: int, chip: int) -> int:
    """As many stages of a pipeline as fit into a program's shared memory, in bytes, beside 8 KiB for other things;
    at least one."""
    shared = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(chip, 99) * 1024
    return max(1, min(most, (shared - 8192) // stage))


def tiles_of(tile: Block, rows: int, columns: int) -> int:
    return -(-rows // tile.rows) * -(-columns // tile.columns)


def split_for(tiles: int, steps: int, programs: int, least_steps: int, most: int) -> int:
    """Into how many shares a sum of so many steps goes so that about `programs` programs run; a power of two."""
    split = 1
    while split < most and tiles * split * 2 <= programs and steps >= 2 * split * least_steps:
        split *= 2
    return split
