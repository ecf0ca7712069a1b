"""Tiles of attention and of its gradient.

Choices made on a GPU by a sweep may stand in a file: `load(path)` puts them before what is here. lamina loads the file
that the environment variable LAMINA_GPU_TUNING names when it is imported, and writes none unless a sweep is told to.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path


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
        # 8.6 and 8.9 have 99 KiB of shared memory, of which 64 keys would take 112.
        return Tiles(32, 32, 4, 1) if shape.capability in (86, 89) else Tiles(32, 64, 8, 1)
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
