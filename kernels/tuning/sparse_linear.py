"""Tiles of block-sparse products: sparse_linear and sparse_int8_linear."""

from typing import NamedTuple


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
