"""layer_norm and rms_norm in Triton, of a sum of two inputs where there are two, with int8 codes where asked for.

The formulas are those of csrc/cpu/kernels/norm_rows.cpp: the variance is taken of distances from the mean, and what the
mean itself is off by is taken out of both moments. A program takes a few rows whole: one read, and everything that is
asked for is written from registers, the codes that an int8 layer behind the norm wants too. Rows too long for registers
are read again, from L2. The order of a sum depends on the shape only: same inputs, same bits.
"""

import triton
import triton.language as tl
from lamina.kernels.device import check_same_device, on_device_of
from lamina.kernels.epilogue import int8_codes, magnitude_bits, scale_of_bits
from lamina.kernels.tuning.rows import row_tile
from torch import Tensor


@triton.jit
def _load_sum(x_at, residual_at, column, x_column, residual_column, mask, HAS_RESIDUAL: tl.constexpr):
    v = tl.load(x_at + column[None, :] * x_column, mask, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        v += tl.load(residual_at + column[None, :] * residual_column, mask, 0.0).to(tl.float32)
    return v


@triton.jit
def _scaled(v, mean, scale, shift, weight, bias, column, in_row, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    y = (v - mean[:, None]) * scale[:, None] + shift[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(weight + column, in_row, 0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias + column, in_row, 0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _scale_of_moments(mean, first, second, k, eps, CENTRED: tl.constexpr):
    """Sums of v - mean and of its square -> (scale, shift) of y = (v - mean) * scale + shift."""
    off = tl.where(CENTRED, first / k, 0.0)
    variance = second / k - off * off
    variance = tl.where(variance < 0.0, 0.0, variance)  # a NaN stays
    scale = 1.0 / tl.sqrt_rn(variance + eps)
    return scale, -off * scale


@triton.jit(do_not_specialize=["rows"])
def _norm_rows_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    codes,
    scales,
    rows,
    k,
    x_row,
    x_column,
    residual_row,
    residual_column,
    eps,
    CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WANTS_SUM: tl.constexpr,
    WANTS_CODES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64)
    there = row < rows
    x_at = x + row[:, None] * x_row
    residual_at = residual + row[:, None] * residual_row if HAS_RESIDUAL else x_at
    to = row[:, None] * k
    if WHOLE:
        in_row = column < k
        mask = there[:, None] & in_row[None, :]
        v = _load_sum(x_at, residual_at, column, x_column, residual_column, mask, HAS_RESIDUAL)
        if WANTS_SUM:
            tl.store(total + to + column[None, :], v.to(total.dtype.element_ty), mask)
        mean = tl.sum(v, 1) / k if CENTRED else tl.zeros((ROWS,), tl.float32)
        d = tl.where(mask, v - mean[:, None], 0.0)
        scale, shift = _scale_of_moments(mean, tl.sum(d, 1), tl.sum(d * d, 1), k, eps, CENTRED)
        y = _scaled(v, mean, scale, shift, weight, bias, column, in_row, HAS_WEIGHT, HAS_BIAS)
        stored = y.to(out.dtype.element_ty)
        tl.store(out + to + column[None, :], stored, mask)
        if WANTS_CODES:
            # What is quantized is the norm as it is stored, so that codes do not depend on who makes them.
            y = tl.where(mask, stored.to(tl.float32), 0.0)
            bits = tl.max(magnitude_bits(y), 1)
            code_scale, inverse = scale_of_bits(bits)
            tl.store(scales + row, code_scale, there)
            y = tl.where((bits >= 0x7F800000)[:, None], 0.0, y)
            tl.store(codes + to + column[None, :], int8_codes(y, inverse[:, None]), mask)
    else:
        first = tl.zeros((ROWS, BLOCK), tl.float32)
        mean = tl.zeros((ROWS,), tl.float32)
        if CENTRED or WANTS_SUM:
            for begin in range(0, k, BLOCK):
                here = begin + column
                mask = there[:, None] & (here < k)[None, :]
                v = _load_sum(x_at, residual_at, here, x_column, residual_column, mask, HAS_RESIDUAL)
                if WANTS_SUM:
                    tl.store(total + to + here[None, :], v.to(total.dtype.element_ty), mask)
                first += v
        if CENTRED:
            mean = tl.sum(first, 1) / k
        first = tl.zeros((ROWS, BLOCK), tl.float32)
        second = tl.zeros((ROWS, BLOCK), tl.float32)
        for begin in range(0, k, BLOCK):
            here = begin + column
            mask = there[:, None] & (here < k)[None, :]
            v = _load_sum(x_at, residual_at, here, x_column, residual_column, mask, HAS_RESIDUAL)
            d = tl.where(mask, v - mean[:, None], 0.0)
            first += d
            second += d * d
        scale, shift = _scale_of_moments(mean, tl.sum(first, 1), tl.sum(second, 1), k, eps, CENTRED)
        most = tl.zeros((ROWS, BLOCK), tl.int32)
        for begin in range(0, k, BLOCK):
            here = begin + column
            in_row = here < k
            mask = there[:, None] & in_row[None, :]
            v = _load_sum(x_at, residual_at, here, x_column, residual_column, mask, HAS_RESIDUAL)
            y = _scaled(v, mean, scale, shift, weight, bias, here, in_row, HAS_WEIGHT, HAS_BIAS)
            stored = y.to(out.dtype.element_ty)
            tl.store(out + to + here[None, :], stored, mask)
            if WANTS_CODES:
                most = tl.maximum(most, magnitude_bits(tl.where(mask, stored.to(tl.float32), 0.0)))
        if WANTS_CODES:
            bits = tl.max(most, 1)
            code_scale, inverse = scale_of_bits(bits)
            tl.store(scales + row, code_scale, there)
            for begin in range(0, k, BLOCK):
                here = begin + column
                in_row = here < k
                mask = there[:, None] & in_row[None, :]
                v = _load_sum(x_at, residual_at, here, x_column, residual_column, mask, HAS_RESIDUAL)
                y = _scaled(v, mean, scale, shift, weight, bias, here, in_row, HAS_WEIGHT, HAS_BIAS)
                y = y.to(out.dtype.element_ty).to(tl.float32)
                y = tl.where(mask & (bits < 0x7F800000)[:, None], y, 0.0)
                tl.store(codes + to + here[None, :], int8_codes(y, inverse[:, None]), mask)


def norm_rows(
    op: str,
    centred: bool,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    codes: Tensor | None,
    scales: Tensor | None,
) -> None:
    """x and residual [M, K], float32, bfloat16 or float16, any strides; weight and bias [K], adjacent. out and total
    [M, K], codes int8 [M, K], scales float32 [M], all contiguous; what is None is not wanted."""
    check_same_device(op, x, weight=weight, bias=bias, residual=residual)
    rows, k = x.shape
    if rows == 0 or k == 0:
        if scales is not None:
            scales.zero_()
        return
    tile = row_tile(k)
    with on_device_of(x):
        _norm_rows_kernel[(triton.cdiv(rows, tile.rows),)](
            x,
            residual,
            weight,
            bias,
            out,
            total,
            codes,
            scales,
            rows,
            k,
            x.stride(0),
            x.stride(1),
            0 if residual is None else residual.stride(0),
            0 if residual is None else residual.stride(1),
            eps,
            CENTRED=centred,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            WANTS_SUM=total is not None,
            WANTS_CODES=codes is not None,
            ROWS=tile.rows,
            BLOCK=tile.block,
            WHOLE=k <= tile.block,
            num_warps=tile.warps,
            # The loops would compute a value twice, once for its row's scale and once for its code: the same bits.
            enable_fp_fusion=False,
        )
