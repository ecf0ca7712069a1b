"""Block shapes of the Triton kernels, by what a GPU has: registers and shared memory of its generation.

Choices made on a GPU by a sweep may stand in a file: `load(path)` puts them before what is here.
"""

from dataclasses import dataclass, replace

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


# The kernels of attention. "keys" gives dK and dV, "queries" dQ, "mask" the gradient of an added mask.
ATTENTION_KERNELS = "forward", "keys", "queries", "mask"

# Made by `load`: (kernel, columns, bytes of an element, masked, capability) -> Tiles.
_loaded: dict[tuple[str, int, int, bool, int], Tiles] = {}


def attention_tiles(kernel: str, columns: int, element_size: int, masked: bool, capability: int) -> Tiles:
    """The tile of a kernel for heads of `columns` (a power of two from 16 on, the larger of D and Dv).

    masked: a mask tensor is read, which takes registers and hides loads less well. capability: 80, 90, 100, ..., and 0
    for the interpreter.
    """
    found = _loaded.get((kernel, columns, element_size, masked, capability))
    if found is not None:
        return found
    if capability == 0:  # small, so that small tensors have several tiles
        return Tiles(32, 32, 4, 1) if kernel != "keys" else Tiles(16, 32, 4, 1)
    tiles = (_attention_of_4_bytes if element_size == 4 else _attention_of_2_bytes)(kernel, columns, capability)
    if masked and element_size == 2 and kernel == "forward" and tiles.queries * tiles.keys > 128 * 64:
        tiles = replace(tiles, keys=64)  # a mask's tile of 128 x 128 does not fit beside the scores
    return tiles


def attention_sorted_from(capability: int) -> int:
    """From how many queries and keys on the blocks of a mask that heads share are sorted before the pass.

    The sorting is a launch of its own, and reads the mask once more.
    """
    return 64 if capability == 0 else 1024


def _attention_of_2_bytes(kernel: str, columns: int, capability: int) -> Tiles:
    hopper = capability >= 90
    if kernel == "forward":
        if columns <= 64:
            return Tiles(128, 128, 8, 3) if hopper else Tiles(128, 64, 4, 3)
        if columns == 128:
            return Tiles(128, 128, 8, 2) if hopper else Tiles(128, 64, 8, 2)
        return Tiles(128, 64, 8, 2) if hopper else Tiles(64, 32, 4, 2)
    if kernel == "keys":
        if columns <= 64:
            return Tiles(64, 128, 8, 2)
        if columns == 128:
            return Tiles(64, 128, 8, 2) if hopper else Tiles(32, 128, 8, 2)
        return Tiles(32, 64, 8, 1)
    if columns <= 64:
        return Tiles(128, 64, 8, 2)
    if columns == 128:
        return Tiles(128, 64, 8, 2) if hopper else Tiles(128, 32, 8, 2)
    return Tiles(64, 32, 8, 1)


def _attention_of_4_bytes(kernel: str, columns: int, capability: int) -> Tiles:
    if columns <= 64:
        return Tiles(64, 32, 4, 2) if kernel == "forward" else Tiles(32, 32, 4, 1)
    if columns == 128:
        return Tiles(64, 32, 8, 2) if kernel == "forward" else Tiles(32, 32, 8, 1)
    return Tiles(32, 32, 8, 1) if kernel == "forward" else Tiles(16, 32, 8, 1)
