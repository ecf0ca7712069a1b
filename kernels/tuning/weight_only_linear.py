"""Tiles of weight_only_linear."""

from typing import NamedTuple

from lamina.kernels.tuning.shares import split_for, stages_that_fit, tiles_of


class WeightOnlyTile(NamedTuple):
    """As Int8LinearTile; k counts inputs, of which an int4 weight has two in a byte."""

    rows: int
    columns: int
    k: int
    group: int
    split: int
    stages: int
    warps: int


def weight_only_tile(
    rows: int, columns: int, k: int, group: int, x_bytes: int, chip: int, multiprocessors: int
) -> WeightOnlyTile:
    """For a product of rows of x_bytes a value, with int8 weights (group 0) or int4 weights in groups.

    A multiprocessor of an H200 gets 21 bytes a cycle from memory and issues 4 x 32 operations of threads: what counts
    beside memory is the length of the loop, which is told below for each code of a thread.
    """
    height = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if group:
        # A step stays within a group of scales; 42 codes arrive a cycle, at 3.0 operations each. A step of 64 inputs
        # takes 3.5, one of 32 5.0 for 128 channels and 3.8 for 256, which leave fewer programs. 2 to 4 KiB of codes a
        # stage are little, so the pipeline is 8 deep where a stage has 2, else 6, and programs share multiprocessors.
        step = 64 if group % 64 == 0 else 32
        width = 256 if step == 32 and columns >= 8192 and rows <= 16 else 128
        if rows <= 32:
            tile = WeightOnlyTile(height, width, step, 1, 1, 8 if width * step == 4096 else 6, 4)
            return tile._replace(
                split=split_for(tiles_of(tile, rows, columns), -(-k // step), 4 * multiprocessors, 8, 8)
            )
        # Sums are scaled once a step: 64 x 128 of them in 64 registers, and another 64 for those of the step.
        tile = WeightOnlyTile(64, 128, step, 8, 1, 4, 4)
        return tile._replace(split=split_for(tiles_of(tile, rows, columns), -(-k // step), 2 * multiprocessors, 16, 4))
    if k % 16:
        # Rows of codes begin anywhere and are read byte by byte.
        odd = WeightOnlyTile(min(height, 32), 64, 64, 8, 1, 2, 4)
        return odd._replace(split=split_for(tiles_of(odd, rows, columns), -(-k // odd.k), 2 * multiprocessors, 4, 8))
    if rows <= 64:
        # 21 codes arrive a cycle, at 6.0 operations each; a step of 256 takes 3.9 up to 16 rows and 5.3 up to 32, one
        # of 128 3.7 for 64 rows by wgmma. Stages of 16 KiB, three programs of 3; float32 rows are split in registers,
        # of which 128 inputs leave enough.
        deep = rows <= 32 and x_bytes == 2
        step = 256 if deep else 128
        stages = stages_that_fit(3 if deep else 4, step * (64 + height * x_bytes), chip)
        tile = WeightOnlyTile(height, 64, step, 1, 1, stages, 4)
        return tile._replace(split=split_for(tiles_of(tile, rows, columns), -(-k // tile.k), 3 * multiprocessors, 2, 8))
    # Codes are widened into registers by the warps that multiply: 128 x 128, each code for 128 rows.
    tile = WeightOnlyTile(128, 128, 64, 8, 1, stages_that_fit(4, 64 * (128 + 128 * x_bytes), chip), 8)
    return tile._replace(split=split_for(tiles_of(tile, rows, columns), -(-k // tile.k), multiprocessors, 16, 4))


def weight_only_candidates(
    rows: int, columns: int, k: int, group: int, x_bytes: int, chip: int, multiprocessors: int
) -> list[WeightOnlyTile]:
    """Tiles worth measuring on a GPU, the one that is taken first."""
    taken = weight_only_tile(rows, columns, k, group, x_bytes, chip, multiprocessors)
    found = [taken]
    for width in (32, 64, 128, 256):
        for depth in (32, 64, 128) if group else (64, 128, 256):
            for split in (1, 2, 4, 8, 16):
                for stages in (3, 4, 6, 8):
                    for warps in (2, 4, 8):
                        bytes_of_stage = width * depth // (2 if group else 1) + taken.rows * depth * x_bytes
                        fits = stages == stages_that_fit(stages, bytes_of_stage, chip)
                        if fits and split * depth <= max(k, 1) and (group == 0 or group % depth == 0):
                            found.append(
                                taken._replace(columns=width, k=depth, split=split, stages=stages, warps=warps)
                            )
    return list(dict.fromkeys(found))
