"""Tiles of int8_conv2d."""

from typing import NamedTuple

from lamina.kernels.tuning.shares import split_for, stages_that_fit


class Int8ConvTile(NamedTuple):
    """pixels, channels and k (of a tap's channels) of a program; split: programs that share a sum; stages; warps."""

    pixels: int
    channels: int
    k: int
    split: int
    stages: int
    warps: int


def int8_conv_tile(
    pixels: int, group_channels: int, groups: int, channels: int, taps: int, chip: int, multiprocessors: int
) -> Int8ConvTile:
    """For output pixels of all images, channels of a group on both sides."""
    if channels % 16:
        # Bytes one by one: as many addresses as codes, and few enough to keep them in registers.
        return Int8ConvTile(64, 64 if group_channels > 32 else 32, 32, 1, 2, 4)
    width = 128 if group_channels > 64 else 64 if group_channels > 32 else 32 if group_channels > 16 else 16
    # A tap's channels in whole lines of shared memory where there are so many; less leaves parts of a step empty.
    k = 128 if channels % 128 == 0 else 64 if channels % 64 == 0 else 32
    tile = Int8ConvTile(128, width, k, 1, stages_that_fit(4, (128 + width) * k, chip), 8 if width == 128 else 4)
    tiles = groups * -(-group_channels // width)
    if -(-pixels // 128) * tiles < multiprocessors:
        tile = tile._replace(pixels=64)
    steps = taps * -(-channels // k)
    tiles *= -(-pixels // tile.pixels)
    return tile._replace(split=split_for(tiles, steps, 2 * multiprocessors, 8, 8))


def int8_conv_candidates(
    pixels: int, group_channels: int, groups: int, channels: int, taps: int, chip: int, multiprocessors: int
) -> list[Int8ConvTile]:
    """Tiles worth measuring on a GPU, the one that is taken first."""
    taken = int8_conv_tile(pixels, group_channels, groups, channels, taps, chip, multiprocessors)
    found = [taken]
    for height in (64, 128, 256):
        for width in (32, 64, 128, 256):
            for k in (32, 64, 128):
                for stages in (2, 3, 4):
                    for split in (1, 2, 4):
                        fits = stages == stages_that_fit(stages, (height + width) * k, chip)
                        if fits and height * width <= 128 * 256 and (channels % 16 == 0 or k == 32):
                            found.append(
                                Int8ConvTile(height, width, k, split, stages, 8 if height * width > 8192 else 4)
                            )
    return list(dict.fromkeys(found))
