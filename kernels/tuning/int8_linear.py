"""Tiles of int8_linear."""

from typing import NamedTuple

from lamina.kernels.tuning.shares import split_for, stages_that_fit, tiles_of


class Int8LinearTile(NamedTuple):
    """What a program of int8_linear computes and how.

    rows, columns, k: the block; group: blocks of rows that go through the channels together; split: programs that share
    a sum over k; swap: channels in the place of rows; stages: of the pipeline; warps.
    """

    rows: int
    columns: int
    k: int
    group: int
    split: int
    swap: bool
    stages: int
    warps: int


def int8_linear_tile(rows: int, columns: int, k: int, chip: int, multiprocessors: int) -> Int8LinearTile:
    """For a product [rows, k] x [columns, k]."""
    if k % 16:
        # Rows begin anywhere and are read byte by byte: small blocks, or the bytes do not fit into registers.
        odd = Int8LinearTile(32, 64, 64, 8, 1, False, 2, 4)
        return odd._replace(split=split_for(tiles_of(odd, rows, columns), -(-k // odd.k), 2 * multiprocessors, 4, 8))
    if rows <= 64:
        return _int8_stream(rows, columns, k, chip, multiprocessors)
    # A warp group's widest instruction has 64 rows and 256 channels: two groups hold 128 x 256 sums in 128 registers a
    # thread. 128 bytes of k are one swizzled line of shared memory, and a stage takes 48, 32 or 24 KiB.
    large = Int8LinearTile(128, 256, 128, 8, 1, False, stages_that_fit(4, 49152, chip), 8)
    medium = Int8LinearTile(128, 128, 128, 8, 1, False, stages_that_fit(4, 32768, chip), 8)
    small = Int8LinearTile(64, 128, 128, 8, 1, False, stages_that_fit(4, 24576, chip), 4)
    for tile in (large, medium):
        # The last wave of tiles should not be all there is to a third of the work.
        if tiles_of(tile, rows, columns) >= 2 * multiprocessors:
            return tile
    if tiles_of(medium, rows, columns) >= 3 * multiprocessors // 4:
        return medium
    steps = -(-k // small.k)
    return small._replace(split=split_for(tiles_of(small, rows, columns), steps, 2 * multiprocessors, 8, 8))


def _int8_stream(rows: int, columns: int, k: int, chip: int, multiprocessors: int) -> Int8LinearTile:
    """Few rows: what counts is that all of memory's bandwidth is asked for. By Little's law 4.8 TB/s at 0.8 us are 29
    KiB in flight for each of 132 multiprocessors: two programs with 4 stages of 16 KiB have four times that, so that a
    stage that is waited for does not leave the others empty."""
    block = 16 if rows <= 16 else 32 if rows <= 32 else 64
    tile = Int8LinearTile(block, 64, 256 if block < 64 else 128, 1, 1, True, 4, 4)
    tile = tile._replace(stages=stages_that_fit(4, tile.k * (block + 64), chip))
    steps = -(-k // tile.k)
    return tile._replace(split=split_for(tiles_of(tile, rows, columns), steps, 2 * multiprocessors, 2, 16))


def int8_linear_candidates(rows: int, columns: int, k: int, chip: int, multiprocessors: int) -> list[Int8LinearTile]:
    """Tiles worth measuring on a GPU, the one that is taken first."""
    taken = int8_linear_tile(rows, columns, k, chip, multiprocessors)
    found = [taken]
    if rows <= 64:
        for width in (32, 64, 128):
            for depth in (128, 256, 512):
                for split in (1, 2, 4, 8, 16):
                    for stages in (3, 4, 6):
                        fits = stages == stages_that_fit(stages, (width + taken.rows) * depth, chip)
                        if fits and split * depth <= max(k, 1):
                            found.append(taken._replace(columns=width, k=depth, split=split, stages=stages))
        return list(dict.fromkeys(found))
    for height, width, warps in (
        (128, 256, 8),
        (256, 128, 8),
        (128, 128, 8),
        (128, 128, 4),
        (64, 256, 4),
        (64, 128, 4),
    ):
        for depth in (64, 128):
            for stages in (3, 4, 5):
                for group in (4, 8, 16):
                    if stages == stages_that_fit(stages, (height + width) * depth, chip):
                        found.append(Int8LinearTile(height, width, depth, group, 1, False, stages, warps))
    return list(dict.fromkeys(found))


class FinishTile(NamedTuple):
    """rows, columns: of int32 sums that a program turns into outputs; warps."""

    rows: int
    columns: int
    warps: int


# 16 bytes a thread at a time: what reads and writes memory alone needs no more.
FINISH_TILE = FinishTile(4, 256, 4)
