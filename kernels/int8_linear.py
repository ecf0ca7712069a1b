"""int8_linear in Triton: rows of int8 codes times int8 weights, summed exactly in int32.

    y[m, n] = act(float(sum_k codes[m, k] w[n, k]) * w_scale[n] * x_scale[m] + bias[n] + residual[m, n])

with each operation rounded once, in this order, as csrc/cpu/kernels/int8_gemm.h says; so int8 outputs, and floats
before an activation that is not exact, are the bits of the CPU. Both operands are rows of adjacent k, which is what the
tensor cores of every generation read: a weight lies on a GPU as plain rows [N, K].

Few rows: channels take the place of rows in the product (SWAP). 64 channels times 8 to 64 rows are one instruction of
a warp group whose operands both come from shared memory, so the weight streams past once, at the speed of memory; and
the sum over k is split among programs until all multiprocessors have work. Partial sums are int32 and meet in a
second, small kernel: exact in any order.

Many rows: square tiles, in an order in which programs that run together share rows and channels in L2. On Hopper and
later the tiles come by the tensor memory accelerator where addresses allow it.
"""

import torch
import triton
import triton.language as tl
from lamina.kernels.device import by_descriptor, capability, check_same_device, multiprocessors, on_device_of, overlaps
from lamina.kernels.epilogue import activate, int8_codes
from lamina.kernels.tuning.int8_linear import FINISH_TILE, Int8LinearTile, int8_linear_tile
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def finish_block(sums, row, column, rows, columns, operands, FLAGS: tl.constexpr):
    """sums int32 [rows, columns] of a block -> out.

    operands: (x_scale, its step from row to row, w_scale, bias, residual, its step, out_scale, out, its step); FLAGS:
    (activation, whether there is a bias, whether there is a residual, whether out is int8).
    """
    x_scale, x_scale_step, w_scale, bias, residual, residual_row, out_scale, out, out_row = operands
    ACTIVATION: tl.constexpr = FLAGS[0]
    HAS_BIAS: tl.constexpr = FLAGS[1]
    HAS_RESIDUAL: tl.constexpr = FLAGS[2]
    WANTS_CODES: tl.constexpr = FLAGS[3]
    row_there, column_there = row < rows, column < columns
    there = row_there[:, None] & column_there[None, :]
    by_channel = tl.load(w_scale + column, column_there, 0.0)
    by_row = tl.load(x_scale + row * x_scale_step, row_there, 0.0)
    y = sums.to(tl.float32) * by_channel[None, :] * by_row[:, None]
    if HAS_BIAS:
        y = y + tl.load(bias + column, column_there, 0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        at = residual + row.to(tl.int64)[:, None] * residual_row + column[None, :]
        y = y + tl.load(at, there, 0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    to = out + row.to(tl.int64)[:, None] * out_row + column[None, :]
    if WANTS_CODES:
        inverse = tl.div_rn(tl.full((1, 1), 1.0, tl.float32), tl.load(out_scale) + tl.zeros((1, 1), tl.float32))
        tl.store(to, int8_codes(y, inverse), there)
    else:
        tl.store(to, y.to(out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["rows"])
def _int8_linear_kernel(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    residual,
    out_scale,
    out,
    partial,
    rows,
    columns,
    k,
    x_row,
    x_scale_step,
    residual_row,
    out_row,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WANTS_CODES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    program, share = tl.program_id(0), tl.program_id(1)
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    # GROUP blocks of rows go through all channels together.
    first = program // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    block_m = first + program % (GROUP * across) % height
    block_n = program % (GROUP * across) // height

    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT)
    begin = share * steps * BLOCK_K
    end = min(begin + steps * BLOCK_K, k)
    if SWAP:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if not DESCRIPTORS:
        # What lies beyond the last row or channel reads the first again: no mask, and never stored.
        at = tl.arange(0, BLOCK_K)
        x_at = x + (row % rows).to(tl.int64)[:, None] * x_row + at[None, :]
        w_at = w + (column % columns).to(tl.int64)[:, None] * k + at[None, :]
    for first_k in range(begin, end, BLOCK_K):
        if DESCRIPTORS:
            a = x.load([block_m * BLOCK_M, first_k])
            b = w.load([block_n * BLOCK_N, first_k])
        elif EVEN_K:
            a = tl.load(x_at + first_k)
            b = tl.load(w_at + first_k)
        else:
            inside = (first_k + at < k)[None, :]
            a = tl.load(x_at + first_k, inside, 0)
            b = tl.load(w_at + first_k, inside, 0)
        if SWAP:
            sums = tl.dot(b, a.T, sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
    if SWAP:
        sums = sums.T
    operands = (x_scale, x_scale_step, w_scale, bias, residual, residual_row, out_scale, out, out_row)
    FLAGS: tl.constexpr = (ACTIVATION, HAS_BIAS, HAS_RESIDUAL, WANTS_CODES)
    if SPLIT > 1:
        to = (share.to(tl.int64) * rows + row.to(tl.int64))[:, None] * columns + column[None, :]
        tl.store(partial + to, sums, (row < rows)[:, None] & (column < columns)[None, :])
    elif BLOCK_N >= 256:
        # One half after the other: 128 sums a thread and what becomes of them do not fit into registers at once.
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = sums.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        column = block_n * BLOCK_N + tl.arange(0, HALF)
        finish_block(left, row, column, rows, columns, operands, FLAGS)
        finish_block(right, row, column + HALF, rows, columns, operands, FLAGS)
    else:
        finish_block(sums, row, column, rows, columns, operands, FLAGS)


@triton.jit(do_not_specialize=["rows"])
def _finish_sums_kernel(
    partial,
    x_scale,
    w_scale,
    bias,
    residual,
    out_scale,
    out,
    rows,
    columns,
    x_scale_step,
    residual_row,
    out_row,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WANTS_CODES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        gdc_wait()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for share in tl.static_range(SPLIT):
        at = (row.to(tl.int64) + share * rows.to(tl.int64))[:, None] * columns + column[None, :]
        sums += tl.load(partial + at, there, 0)
    operands = (x_scale, x_scale_step, w_scale, bias, residual, residual_row, out_scale, out, out_row)
    FLAGS: tl.constexpr = (ACTIVATION, HAS_BIAS, HAS_RESIDUAL, WANTS_CODES)
    finish_block(sums, row, column, rows, columns, operands, FLAGS)


def int8_linear(
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
    tile: Int8LinearTile | None = None,
) -> None:
    """Writes out [M, N]: float, or int8 with out_scale float32 [].

    codes int8 [M, K] with adjacent columns, x_scale float32 [] or [M], weight int8 [N, K] contiguous, w_scale float32
    [N], bias [N] and residual [M, N] with adjacent columns, float32, bfloat16 or float16.
    """
    check_same_device(
        "int8_linear",
        codes,
        x_scale=x_scale,
        packed_weight=weight,
        scale=w_scale,
        bias=bias,
        residual=residual,
        out_scale=out_scale,
    )
    (rows, k), columns = codes.shape, weight.shape[0]
    if rows == 0 or columns == 0:
        return
    if tile is None:
        tile = int8_linear_tile(rows, columns, k, capability(codes), multiprocessors(codes))
    descriptors = by_descriptor(codes) and by_descriptor(weight)
    x, w = codes, weight
    if descriptors:
        x = TensorDescriptor(codes, list(codes.shape), list(codes.stride()), [tile.rows, tile.k])
        w = TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [tile.columns, tile.k])
    partial = None
    if tile.split > 1:
        partial = torch.empty(tile.split, rows, columns, dtype=torch.int32, device=codes.device)
    x_scale_step = x_scale.stride(0) if x_scale.ndim else 0
    residual_row = 0 if residual is None else residual.stride(0)
    # Where a product takes microseconds, the launch of the next kernel is worth hiding.
    early = rows <= 64 and overlaps(codes)
    options = {
        "ACTIVATION": activation,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "WANTS_CODES": out_scale is not None,
        "SPLIT": tile.split,
        "OVERLAPS": early,
        "launch_pdl": early,
        "enable_fp_fusion": False,
    }
    with on_device_of(codes):
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        _int8_linear_kernel[(tiles, tile.split)](
            x,
            w,
            x_scale,
            w_scale,
            bias,
            residual,
            out_scale,
            out,
            partial,
            rows,
            columns,
            k,
            codes.stride(0),
            x_scale_step,
            residual_row,
            out.stride(0),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.k,
            GROUP=tile.group,
            SWAP=tile.swap,
            DESCRIPTORS=descriptors,
            EVEN_K=descriptors or k % tile.k == 0,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **options,
        )
    if partial is not None:
        finish_sums(partial, x_scale, w_scale, bias, activation, residual, out_scale, out, early)


def finish_sums(
    partial: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
    early: bool = False,
) -> None:
    """What follows sums int32 [shares, M, N], contiguous, of which a value is the sum over the shares; into out [M, N].

    The other operands as above; early: this launch may begin before the kernel that writes the sums has ended.
    """
    shares, rows, columns = partial.shape
    tile = FINISH_TILE
    with on_device_of(partial):
        _finish_sums_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))](
            partial,
            x_scale,
            w_scale,
            bias,
            residual,
            out_scale,
            out,
            rows,
            columns,
            x_scale.stride(0) if x_scale.ndim else 0,
            0 if residual is None else residual.stride(0),
            out.stride(0),
            ACTIVATION=activation,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            WANTS_CODES=out_scale is not None,
            SPLIT=shares,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            OVERLAPS=early,
            num_warps=tile.warps,
            launch_pdl=early,
            enable_fp_fusion=False,
        )
