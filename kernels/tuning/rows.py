"""Rows and columns of a program that goes through rows: quantize_rows, layer_norm, rms_norm."""

from typing import NamedTuple


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
