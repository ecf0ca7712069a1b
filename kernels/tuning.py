"""Every number that is tuned for GPUs, with its reason: one section for each op. Importable without Triton."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple


def _stages(most: int, stage: int, chip: int) -> int:
    """As many stages of a pipeline as fit into a program's shared memory, in bytes, beside 8 KiB for other things;
    at least one."""
    shared = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(chip, 99) * 1024
    return max(1, min(most, (shared - 8192) // stage))


# -- rows: quantize_rows, layer_norm, rms_norm


class RowTile(NamedTuple):
    """rows and columns of a program, and its warps."""

    rows: int
    block: int
    warps: int


# A row up to this long stays in the registers of one program: 16 warps hold 32 values a thread. Longer ones are read
# again, from L2, 8192 values at a time.
_LONGEST_WHOLE_ROW = 16384
# Values of a program with short rows: 16 bytes a thread of 8 warps in bfloat16. Less leaves loads too few in flight,
# more leaves multiprocessors without work at a few hundred rows.
_VALUES_OF_ROWS = 2048


def row_tile(k: int) -> RowTile:
    """For rows of k values."""
    if k > _LONGEST_WHOLE_ROW:
        return RowTile(1, 8192, 16)
    block = max(16, 1 << (max(k, 1) - 1).bit_length())
    rows = max(1, _VALUES_OF_ROWS // block)
    # 8 values a thread up to 1024 threads in long rows; more warps only make reductions across them dearer.
    warps = min(16, max(4, rows * block // 512))
    return RowTile(min(rows, 32), block, warps)


# -- int8_linear


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


def _split_for(tiles: int, steps: int, programs: int, least_steps: int, most: int) -> int:
    """Into how many shares a sum of so many steps goes so that about `programs` programs run; a power of two."""
    split = 1
    while split < most and tiles * split * 2 <= programs and steps >= 2 * split * least_steps:
        split *= 2
    return split


def int8_linear_tile(rows: int, columns: int, k: int, chip: int, multiprocessors: int) -> Int8LinearTile:
    """For a product [rows, k] x [columns, k]."""
    if k % 16:
        # Rows begin anywhere and are read byte by byte: small blocks, or the bytes do not fit into registers.
        odd = Int8LinearTile(32, 64, 64, 8, 1, False, 2, 4)
        return odd._replace(split=_split_for(_tiles(odd, rows, columns), -(-k // odd.k), 2 * multiprocessors, 4, 8))
    if rows <= 64:
        return _int8_stream(rows, columns, k, chip, multiprocessors)
    # A warp group's widest instruction has 64 rows and 256 channels: two groups hold 128 x 256 sums in 128 registers a
    # thread. 128 bytes of k are one swizzled line of shared memory, and a stage takes 48, 32 or 24 KiB.
    large = Int8LinearTile(128, 256, 128, 8, 1, False, _stages(4, 49152, chip), 8)
    medium = Int8LinearTile(128, 128, 128, 8, 1, False, _stages(4, 32768, chip), 8)
    small = Int8LinearTile(64, 128, 128, 8, 1, False, _stages(4, 24576, chip), 4)
    for tile in (large, medium):
        # The last wave of tiles should not be all there is to a third of the work.
        if _tiles(tile, rows, columns) >= 2 * multiprocessors:
            return tile
    if _tiles(medium, rows, columns) >= 3 * multiprocessors // 4:
        return medium
    steps = -(-k // small.k)
    return small._replace(split=_split_for(_tiles(small, rows, columns), steps, 2 * multiprocessors, 8, 8))


def _tiles(tile: Int8LinearTile, rows: int, columns: int) -> int:
    return -(-rows // tile.rows) * -(-columns // tile.columns)


def _int8_stream(rows: int, columns: int, k: int, chip: int, multiprocessors: int) -> Int8LinearTile:
    """Few rows: what counts is that all of memory's bandwidth is asked for. By Little's law 4.8 TB/s at 0.8 us are 29
    KiB in flight for each of 132 multiprocessors: two programs with 4 stages of 16 KiB have four times that, so that a
    stage that is waited for does not leave the others empty."""
    block = 16 if rows <= 16 else 32 if rows <= 32 else 64
    tile = Int8LinearTile(block, 64, 256 if block < 64 else 128, 1, 1, True, 4, 4)
    tile = tile._replace(stages=_stages(4, tile.k * (block + 64), chip))
    steps = -(-k // tile.k)
    return tile._replace(split=_split_for(_tiles(tile, rows, columns), steps, 2 * multiprocessors, 2, 16))


def int8_linear_candidates(rows: int, columns: int, k: int, chip: int, multiprocessors: int) -> list[Int8LinearTile]:
    """Tiles worth measuring on a GPU, the one that is taken first."""
    taken = int8_linear_tile(rows, columns, k, chip, multiprocessors)
    found = [taken]
    if rows <= 64:
        for width in (32, 64, 128):
            for depth in (128, 256, 512):
                for split in (1, 2, 4, 8, 16):
                    for stages in (3, 4, 6):
                        fits = stages == _stages(stages, (width + taken.rows) * depth, chip)
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
                    if stages == _stages(stages, (height + width) * depth, chip):
                        found.append(Int8LinearTile(height, width, depth, group, 1, False, stages, warps))
    return list(dict.fromkeys(found))


# -- weight_only_linear


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
                split=_split_for(_tiles(tile, rows, columns), -(-k // step), 4 * multiprocessors, 8, 8)
            )
        # Sums are scaled once a step: 64 x 128 of them in 64 registers, and another 64 for those of the step.
        tile = WeightOnlyTile(64, 128, step, 8, 1, 4, 4)
        return tile._replace(split=_split_for(_tiles(tile, rows, columns), -(-k // step), 2 * multiprocessors, 16, 4))
    if k % 16:
        # Rows of codes begin anywhere and are read byte by byte.
        odd = WeightOnlyTile(min(height, 32), 64, 64, 8, 1, 2, 4)
        return odd._replace(split=_split_for(_tiles(odd, rows, columns), -(-k // odd.k), 2 * multiprocessors, 4, 8))
    if rows <= 64:
        # 21 codes arrive a cycle, at 6.0 operations each; a step of 256 takes 3.9 up to 16 rows and 5.3 up to 32, one
        # of 128 3.7 for 64 rows by wgmma. Stages of 16 KiB, three programs of 3; float32 rows are split in registers,
        # of which 128 inputs leave enough.
        deep = rows <= 32 and x_bytes == 2
        step = 256 if deep else 128
        stages = _stages(3 if deep else 4, step * (64 + height * x_bytes), chip)
        tile = WeightOnlyTile(height, 64, step, 1, 1, stages, 4)
        return tile._replace(split=_split_for(_tiles(tile, rows, columns), -(-k // tile.k), 3 * multiprocessors, 2, 8))
    # Codes are widened into registers by the warps that multiply: 128 x 128, each code for 128 rows.
    tile = WeightOnlyTile(128, 128, 64, 8, 1, _stages(4, 64 * (128 + 128 * x_bytes), chip), 8)
    return tile._replace(split=_split_for(_tiles(tile, rows, columns), -(-k // tile.k), multiprocessors, 16, 4))


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
                        fits = stages == _stages(stages, bytes_of_stage, chip)
                        if fits and split * depth <= max(k, 1) and (group == 0 or group % depth == 0):
                            found.append(
                                taken._replace(columns=width, k=depth, split=split, stages=stages, warps=warps)
                            )
    return list(dict.fromkeys(found))


# -- int8_conv2d


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
    tile = Int8ConvTile(128, width, k, 1, _stages(4, (128 + width) * k, chip), 8 if width == 128 else 4)
    tiles = groups * -(-group_channels // width)
    if -(-pixels // 128) * tiles < multiprocessors:
        tile = tile._replace(pixels=64)
    steps = taps * -(-channels // k)
    tiles *= -(-pixels // tile.pixels)
    return tile._replace(split=_split_for(tiles, steps, 2 * multiprocessors, 8, 8))


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
                        fits = stages == _stages(stages, (height + width) * k, chip)
                        if fits and height * width <= 128 * 256 and (channels % 16 == 0 or k == 32):
                            found.append(
                                Int8ConvTile(height, width, k, split, stages, 8 if height * width > 8192 else 4)
                            )
    return list(dict.fromkeys(found))


# -- sparse_linear, sparse_int8_linear


class SparseTile(NamedTuple):
    """How a product with a block-sparse weight is cut.

    rows, outputs: of x and of one block that a program computes; group: neighbouring blocks of a block row that one
    product takes; descriptor: whether x and the weight come by the copy engine, whole blocks at a time; registers: the
    most of a thread, None for what the compiler likes.
    """

    rows: int
    outputs: int
    group: int
    warps: int
    stages: int
    descriptor: bool
    registers: int | None = None


def sparse_tile(block: int, rows: int, item: int, architecture: int) -> SparseTile:
    """block: size of the square blocks; rows: of x; item: bytes of a value of x; architecture: 80, 90, ...

    A product of tensor cores takes 64 inputs: one block of 64, two of 32 or four of 16, 32 inputs of float32. A program
    multiplies few blocks, a tenth of a row, so that its beginning and its end weigh much: tiles are small enough for
    three programs a multiprocessor, of which one loads while others multiply.
    """
    group = max(64 // block // max(item // 2, 1), 1)
    if rows <= 64:
        # Few rows: the weight is read once, and the outputs of a block are spread over programs to read it faster.
        return SparseTile(16 if rows <= 16 else 32 if rows <= 32 else 64, min(block, 32), group, 4, 4, False)
    # Compiled for sm_80, four stages of 128 rows would leave room for one program.
    if item == 4:  # three products of tf32 hold twice the registers
        return SparseTile(64 if architecture >= 90 or block < 64 else 32, block, group, 4, 2, False)
    # 168 registers of 128 threads and 72 KiB: three times each in a multiprocessor.
    return SparseTile(128, block, group, 4, 3, block == 64 and architecture >= 90, 168 if item == 2 else None)


def sparse_tile_candidates(block: int, rows: int, item: int, architecture: int) -> list[SparseTile]:
    """What a sweep on a new GPU tries: `sparse_tile` holds the winners."""
    heights = (16, 32, 64) if rows <= 64 else (64, 128, 256)
    return [
        SparseTile(height, outputs, group, warps, stages, descriptor)
        for height in heights
        for outputs in sorted({min(block, 16), min(block, 32), block})
        for group in (1, 2, 4)
        if 32 <= group * block <= 128
        for warps in (4, 8)
        for stages in (2, 3, 4)
        for descriptor in (False, True)
        if not descriptor or (group == 1 and architecture >= 90)
        # Shared memory of the stages.
        if stages * (height + outputs) * group * block * item <= 200 * 1024
    ]


class SparseGradientTile(NamedTuple):
    """rows: of x and of the gradient that one product of the weight's gradient sums over."""

    rows: int
    warps: int
    stages: int


def sparse_gradient_tile(block: int, item: int) -> SparseGradientTile:
    """A program sums one block over all rows: tiles of 64 rows of two operands, deep in flight."""
    return SparseGradientTile(32 if item == 4 else 64, 4 if block == 64 else 2 if block == 32 else 1, 4)


# -- attention


@dataclass(frozen=True)
class Tiles:
    """A tile of `queries` x `keys`, computed by so many warps, with loads `stages` tiles ahead.

    specialize: loads, products and softmax by warps of their own, where the compiler can.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    specialize: bool = False


# The kernels of attention: "keys" gives dK and dV, "queries" dQ, "mask" the gradient of an added mask.
ATTENTION_KERNELS = "forward", "keys", "queries", "mask"


@dataclass(frozen=True)
class AttentionShape:
    """What tiles depend on.

    columns: of a head, a power of two from 16 on, the larger of D and Dv. masked: a mask tensor is read, which takes
    registers. capability: 80, 90, 100, ..., and 0 for the interpreter.
    """

    kernel: str
    columns: int
    element_size: int
    masked: bool
    capability: int


# What `load` and `choose` put before the table.
_chosen: dict[AttentionShape, Tiles] = {}


def attention_tiles(shape: AttentionShape) -> Tiles:
    found = _chosen.get(shape)
    if found is not None:
        return found
    if shape.capability == 0:  # small, so that small tensors have several tiles
        return Tiles(16, 32, 4, 1) if shape.kernel == "keys" else Tiles(32, 32, 4, 1)
    return (_attention_of_4_bytes if shape.element_size == 4 else _attention_of_2_bytes)(shape)


def attention_sorted_from(capability: int) -> int:
    """From how many queries and keys on the blocks of a mask that heads share are sorted before the pass.

    The sorting is a launch of its own, and reads the mask once more.
    """
    return 64 if capability == 0 else 1024


# Reasons, from what the compiler gives (255 registers a thread are all there are, 227 KiB of shared memory a block on
# Hopper, 163 KiB on Ampere): the sums of a tile stay in registers, 64 a thread for 128 x 128 of eight warps, beside the
# scores and their weights; wgmma multiplies 64 rows at least by each four warps; loads ahead fill the shared memory.
# On a GPU none of this has been timed yet: that is the sweep's part.


def _attention_of_2_bytes(shape: AttentionShape) -> Tiles:
    hopper = shape.capability >= 90
    if shape.capability >= 100 and shape.columns > 128:
        # The sums of 256 columns need more tensor memory than there is; of 32 rows they stay in registers.
        return Tiles(32, 32, 4, 2) if shape.kernel == "forward" else Tiles(32, 32, 4, 1)
    if shape.kernel == "forward":
        if shape.columns <= 64:
            tiles = Tiles(128, 128, 8, 3) if hopper else Tiles(128, 64, 4, 3)
        elif shape.columns == 128:
            # 189 registers without spills; three stages would need 225 KiB.
            tiles = Tiles(128, 128, 8, 2) if hopper else Tiles(128, 64, 8, 2)
        else:
            tiles = Tiles(128, 64, 8, 2) if hopper else Tiles(64, 32, 4, 2)
        # The tile of a mask and its pointers take registers: beside 128 x 64 scores on Ampere there are none left, and
        # what the compiler gives then is many times slower.
        most = 64 if hopper else 32
        return replace(tiles, keys=most) if shape.masked and tiles.keys > most else tiles
    if shape.kernel == "keys":  # dK and dV: two tiles of sums
        if shape.columns <= 64:
            return Tiles(64, 128, 8, 2)
        if shape.columns == 128:
            return Tiles(64, 128, 8, 2) if hopper and not shape.masked else Tiles(32, 128, 8, 2)
        return Tiles(32, 64, 8, 1)
    if shape.columns <= 64:
        return Tiles(128, 64, 8, 2)
    if shape.columns == 128:
        return Tiles(128, 64, 8, 2) if hopper else Tiles(128, 32, 8, 2)
    return Tiles(64, 32, 8, 1)


def _attention_of_4_bytes(shape: AttentionShape) -> Tiles:
    """A product of three of TF32 holds both halves of its first factor in registers: small tiles, few warps."""
    if shape.columns <= 64:
        return Tiles(64, 32, 4, 2) if shape.kernel == "forward" else Tiles(32, 32, 4, 1)
    if shape.columns == 128:
        sizes = {"forward": (64, 16, 4, 2), "keys": (16, 64, 4, 1), "queries": (64, 16, 4, 1), "mask": (32, 32, 4, 1)}
        return Tiles(*sizes[shape.kernel])
    return Tiles(32, 32, 8, 1) if shape.kernel == "forward" else Tiles(16, 32, 8, 1)


def candidates(shape: AttentionShape) -> list[Tiles]:
    """The table's choice first, then what else a sweep on a GPU may find faster."""
    first = attention_tiles(shape)
    sizes = {
        "forward": ((128, 128), (128, 64), (64, 128), (64, 64)),
        "keys": ((64, 128), (32, 128), (64, 64), (128, 64)),
        "queries": ((128, 64), (128, 128), (64, 64), (128, 32)),
        "mask": ((64, 64), (128, 64), (64, 32)),
    }[shape.kernel]
    if shape.element_size == 4 or shape.columns > 128:
        sizes = dict.fromkeys((*((min(queries, 64), min(keys, 64)) for queries, keys in sizes), (32, 32), (64, 32)))
    others = [Tiles(*size, warps, stages) for size in sizes for warps in (4, 8) for stages in (2, 3)]
    if shape.kernel == "forward" and shape.capability >= 100:  # Triton 3.6 leaves loops of Hopper as they are
        others += [Tiles(128, 128, 8, 2, specialize=True), Tiles(128, 64, 8, 3, specialize=True)]
    # A thread of four warps holds twice the share of a tile: 128 x 128 sums alone are all of its registers.
    fit = [t for t in others if t.queries * t.keys <= 64 * 128 or t.warps == 8]
    return list(dict.fromkeys((first, *fit)))


def choose(shape: AttentionShape, tiles: Tiles | None) -> None:
    """Puts tiles before the table's; None takes them away."""
    if tiles is None:
        _chosen.pop(shape, None)
    else:
        _chosen[shape] = tiles


# -- files

_FORMAT = "lamina tuning 1"


def load(path: str | Path) -> None:
    """Puts the choices of a file that `save` wrote before the tables. Raises ValueError if it is not such a file."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        read = {AttentionShape(**entry["shape"]): Tiles(**entry["tiles"]) for entry in content["attention"]}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of tuned block shapes for this version of lamina: {error}") from None
    _chosen.update(read)


def save(path: str | Path) -> None:
    """Writes what was chosen, by `choose` or `load`."""
    entries = [{"shape": asdict(shape), "tiles": asdict(tiles)} for shape, tiles in _chosen.items()]
    Path(path).write_text(json.dumps({"format": _FORMAT, "attention": entries}, indent=1) + "\n", "utf-8")
