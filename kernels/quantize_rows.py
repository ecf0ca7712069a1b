"""quantize_rows in Triton: int8 codes of rows, the bits of csrc/cpu/kernels/quantize_rows.cpp.

A program takes a few rows whole, so that they are read once: the maximum is taken over the bits of |x|, which is exact,
and what is in registers is rounded to codes. Rows too long for that are read twice, the second time from L2.
"""

import torch
import triton
import triton.language as tl
from lamina.kernels.device import check_same_device, on_device_of
from lamina.kernels.epilogue import int8_codes, magnitude_bits, scale_of_bits
from lamina.kernels.tuning.rows import row_tile
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def _quantize_rows_kernel(
    x,
    given,
    codes,
    scales,
    rows,
    k,
    x_row,
    x_column,
    codes_row,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64)
    there = row < rows
    at = x + row[:, None] * x_row
    to = codes + row[:, None] * codes_row
    if WHOLE:
        mask = there[:, None] & (column < k)[None, :]
        v = tl.load(at + column[None, :] * x_column, mask, 0.0).to(tl.float32)
        bits = tl.max(magnitude_bits(v), 1)
    else:
        most = tl.zeros((ROWS, BLOCK), tl.int32)
        for begin in range(0, k, BLOCK):
            mask = there[:, None] & (begin + column < k)[None, :]
            v = tl.load(at + (begin + column)[None, :] * x_column, mask, 0.0).to(tl.float32)
            most = tl.maximum(most, magnitude_bits(v))
        bits = tl.max(most, 1)
    scale, inverse = scale_of_bits(bits)
    bad = bits >= 0x7F800000
    if HAS_SCALE:
        step = tl.load(given) + tl.zeros((ROWS,), tl.float32)
        scale = tl.where(bad, float("nan"), step)
        inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), step)
    tl.store(scales + row, scale, there)
    if WHOLE:
        code = int8_codes(tl.where(bad[:, None], 0.0, v), inverse[:, None])
        tl.store(to + column[None, :], code, mask)
    else:
        for begin in range(0, k, BLOCK):
            mask = there[:, None] & (begin + column < k)[None, :]
            v = tl.load(at + (begin + column)[None, :] * x_column, mask, 0.0).to(tl.float32)
            code = int8_codes(tl.where(bad[:, None], 0.0, v), inverse[:, None])
            tl.store(to + (begin + column)[None, :], code, mask)


def quantize_rows(x: Tensor, scale: Tensor | None, codes: Tensor, scales: Tensor) -> None:
    """x [M, K] float32, bfloat16 or float16, any strides; scale [] float32 or None -> codes int8 [M, K], with adjacent
    columns, and scales float32 [M]. A given scale is not looked at: that would wait for the GPU."""
    check_same_device("quantize_rows", x, scale=scale)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        kind = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"quantize_rows: x is {kind}, but must be float32, bfloat16 or float16")
    if scale is not None and (scale.dtype is not torch.float32 or scale.ndim != 0):
        kind = str(scale.dtype).removeprefix("torch.")
        raise ValueError(f"quantize_rows: scale is {kind} {list(scale.shape)}, but must be float32 []")
    rows, k = x.shape
    if rows == 0:
        return
    tile = row_tile(k)
    with on_device_of(x):
        _quantize_rows_kernel[(triton.cdiv(rows, tile.rows),)](
            x,
            scale,
            codes,
            scales,
            rows,
            k,
            x.stride(0),
            x.stride(1),
            codes.stride(0),
            HAS_SCALE=scale is not None,
            ROWS=tile.rows,
            BLOCK=tile.block,
            WHOLE=k <= tile.block,
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )
