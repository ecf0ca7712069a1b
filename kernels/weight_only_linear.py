"""weight_only_linear in Triton: rows of floats times int8 or int4 weights, which become floats in registers.

    int8   out[m, n] = act(sum_k x[m, k] code[n, k] * w_scale[n] + bias[n])
    int4   out[m, n] = act(sum_g scale[n, g] sum_{k in g} x[m, k] code[n, k] + bias[n])

Codes are exact in bfloat16 and in float16, so the tensor cores' products are exact and only sums are rounded, in
float32, as on the CPU. float32 rows go as three bfloat16 numbers that add up to them exactly: three products instead of
one of a tenth of the speed.

Few rows are what this is for: then memory decides, and after it the instructions that widen a code. Up to 32 rows are
multiplied by mma.sync, which takes codes from the registers in which they were widened; wgmma would have them written
to shared memory again. Codes come through a pipeline of shared memory, and the sum over k is split among programs;
their partial sums are added in order by a second kernel, so that the same inputs give the same bits.

An int4 weight lies on a GPU as [ceil(K / 32)][N][16] bytes, so that what a program reads at once lies together: byte j
of a block holds code + 8 of input j in its low and of input 16 + j in its high half. Behind it the scales [groups][N]
as float32: two bytes a thread would be too little for an asynchronous copy, and every step would wait for its scales.
"""

import torch
import triton
import triton.language as tl
from lamina.kernels.device import by_descriptor, capability, check_same_device, multiprocessors, on_device_of, overlaps
from lamina.kernels.epilogue import activate
from lamina.kernels.tuning.weight_only_linear import WeightOnlyTile, weight_only_tile
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

# The interpreter takes no assembly.
_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _nibbles(packed, DTYPE: tl.constexpr):
    """uint8 -> the codes in the low and in the high halves less 8, both bfloat16 or float16.

    A code becomes the last bits of a number that has it as its unit, 128 + code (1024 + code in float16), by one byte
    permutation for two codes; 136 (1032) is then taken from both at once.
    """
    if _INTERPRETED:
        return ((packed & 15).to(tl.int8) - 8).to(DTYPE), ((packed >> 4).to(tl.int8) - 8).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, unit, one, less;
            and.b32 low, $4, 0x0f0f0f0f;
            shr.u32 high, $4, 4;
            and.b32 high, high, 0x0f0f0f0f;
            mov.b32 unit, 0x43434343;
            mov.b32 one, 0x3f803f80;
            mov.b32 less, 0xc308c308;
            prmt.b32 $0, low, unit, 0x4140;
            prmt.b32 $1, low, unit, 0x4342;
            prmt.b32 $2, high, unit, 0x4140;
            prmt.b32 $3, high, unit, 0x4342;
            fma.rn.bf16x2 $0, $0, one, less;
            fma.rn.bf16x2 $1, $1, one, less;
            fma.rn.bf16x2 $2, $2, one, less;
            fma.rn.bf16x2 $3, $3, one, less;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, unit, less;
            and.b32 low, $4, 0x0f0f0f0f;
            shr.u32 high, $4, 4;
            and.b32 high, high, 0x0f0f0f0f;
            mov.b32 unit, 0x64646464;
            mov.b32 less, 0x64086408;
            prmt.b32 $0, low, unit, 0x4140;
            prmt.b32 $1, low, unit, 0x4342;
            prmt.b32 $2, high, unit, 0x4140;
            prmt.b32 $3, high, unit, 0x4342;
            sub.f16x2 $0, $0, less;
            sub.f16x2 $1, $1, less;
            sub.f16x2 $2, $2, less;
            sub.f16x2 $3, $3, less;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def _product(x, w, sums, SPLIT_FLOATS: tl.constexpr):
    """sums + x w^T of codes w, int8 or floats, and x float32 (SPLIT_FLOATS), bfloat16 or float16."""
    if SPLIT_FLOATS:
        # The bits of x in three parts of 8 significant ones: truncation is exact and never overflows.
        w = w.to(tl.bfloat16).T
        high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        rest = x - high
        middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        sums = tl.dot((rest - middle).to(tl.bfloat16), w, sums)
        sums = tl.dot(middle.to(tl.bfloat16), w, sums)
        return tl.dot(high.to(tl.bfloat16), w, sums)
    else:
        return tl.dot(x, w.to(x.dtype).T, sums)


@triton.jit
def _finish(
    y,
    row,
    column,
    rows,
    columns,
    w_scale,
    bias,
    out,
    out_row,
    ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    column_there = column < columns
    if HAS_SCALE:
        y = y * tl.load(w_scale + column, column_there, 0.0)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias + column, column_there, 0.0).to(tl.float32)[None, :]
    to = out + row.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(to, activate(y, ACTIVATION).to(out.dtype.element_ty), (row < rows)[:, None] & column_there[None, :])


@triton.jit
def _place(rows, columns, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block of rows and of channels of this program: GROUP blocks of rows go through all channels together."""
    program = tl.program_id(0)
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = program // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    return first + program % (GROUP * across) % height, program % (GROUP * across) // height


@triton.jit
def _keep(
    sums,
    row,
    column,
    rows,
    columns,
    w_scale,
    bias,
    out,
    partial,
    out_row,
    ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Finishes sums [rows, columns], or leaves them as this program's share."""
    if SPLIT > 1:
        share = tl.program_id(1).to(tl.int64)
        to = (share * rows + row.to(tl.int64))[:, None] * columns + column[None, :]
        tl.store(partial + to, sums, (row < rows)[:, None] & (column < columns)[None, :])
    else:
        _finish(sums, row, column, rows, columns, w_scale, bias, out, out_row, ACTIVATION, HAS_SCALE, HAS_BIAS)


@triton.jit(do_not_specialize=["rows"])
def _weight_only_int8_kernel(
    x,
    w,
    w_scale,
    bias,
    out,
    partial,
    rows,
    columns,
    k,
    x_row,
    out_row,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_FLOATS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    block_m, block_n = _place(rows, columns, GROUP, BLOCK_M, BLOCK_N)
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT)
    begin = tl.program_id(1) * steps * BLOCK_K
    end = min(begin + steps * BLOCK_K, k)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
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
            a = tl.load(x_at + first_k, inside, 0.0)
            b = tl.load(w_at + first_k, inside, 0)
        sums = _product(a, b, sums, SPLIT_FLOATS)
    _keep(
        sums,
        row,
        column,
        rows,
        columns,
        w_scale,
        bias,
        out,
        partial,
        out_row,
        ACTIVATION,
        True,
        HAS_BIAS,
        SPLIT,
    )


@triton.jit(do_not_specialize=["rows"])
def _weight_only_int4_kernel(
    x,
    codes,
    scales,
    bias,
    out,
    partial,
    rows,
    columns,
    k,
    x_row,
    out_row,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_FLOATS: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    block_m, block_n = _place(rows, columns, GROUP, BLOCK_M, BLOCK_N)
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    BYTES: tl.constexpr = BLOCK_K // 2
    all_steps = tl.cdiv(k, BLOCK_K)
    steps = tl.cdiv(all_steps, SPLIT)
    begin = tl.program_id(1) * steps
    end = min(begin + steps, all_steps)
    at = tl.arange(0, BYTES)
    there = column % columns
    block, byte = at // 16, at % 16
    low = block * 32 + byte  # the inputs in the low halves; those in the high halves are 16 further
    x_at = x + (row % rows).to(tl.int64)[:, None] * x_row + low[None, :]
    w_at = codes + there.to(tl.int64)[:, None] * 16 + (block.to(tl.int64) * columns * 16 + byte)[None, :]
    wide = tl.zeros((), tl.int64)
    scale_at = scales + there
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    none = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # With its own number of stages the loop pipelines the scales too, which no product reads.
    for step in tl.range(begin, end, num_stages=STAGES):
        first_k = step * BLOCK_K
        packed = tl.load(w_at + (wide + step) * columns * (16 * (BLOCK_K // 32)))
        scale = tl.load(scale_at + (wide + step // GROUP_STEPS) * columns)
        if EVEN_K:
            a = tl.load(x_at + first_k)
            b = tl.load(x_at + first_k + 16)
        else:
            a = tl.load(x_at + first_k, (first_k + low < k)[None, :], 0.0)
            b = tl.load(x_at + first_k + 16, (first_k + 16 + low < k)[None, :], 0.0)
        of_low, of_high = _nibbles(packed, tl.bfloat16 if SPLIT_FLOATS else x.dtype.element_ty)
        of_group = _product(a, of_low, none, SPLIT_FLOATS)
        of_group = _product(b, of_high, of_group, SPLIT_FLOATS)
        sums += of_group * scale[None, :]
    _keep(
        sums,
        row,
        column,
        rows,
        columns,
        scales,
        bias,
        out,
        partial,
        out_row,
        ACTIVATION,
        False,
        HAS_BIAS,
        SPLIT,
    )


@triton.jit(do_not_specialize=["rows"])
def _weight_only_finish_kernel(
    partial,
    w_scale,
    bias,
    out,
    rows,
    columns,
    out_row,
    ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for share in tl.static_range(SPLIT):
        at = (row.to(tl.int64) + share * rows.to(tl.int64))[:, None] * columns + column[None, :]
        sums += tl.load(partial + at, there, 0.0)
    _finish(sums, row, column, rows, columns, w_scale, bias, out, out_row, ACTIVATION, HAS_SCALE, HAS_BIAS)


def weight_only_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    group: int,
    activation: str,
    out: Tensor,
    tile: WeightOnlyTile | None = None,
) -> None:
    """x [M, K] with adjacent columns, float32, bfloat16 or float16 -> out [M, N] of its dtype. data: int8 [N, K] with
    scale float32 [N] (group 0), or the bytes of an int4 weight."""
    check_same_device("weight_only_linear", x, packed_weight=data, scale=scale, bias=bias)
    (rows, k), columns = x.shape, out.shape[1]
    if rows == 0 or columns == 0:
        return
    if tile is None:
        tile = weight_only_tile(rows, columns, k, group, x.element_size(), capability(x), multiprocessors(x))
    partial = None
    if tile.split > 1:
        partial = torch.empty(tile.split, rows, columns, dtype=torch.float32, device=x.device)
    # Where a product takes microseconds, the launch of the next kernel is worth hiding.
    early = rows <= 64 and overlaps(x)
    options = {
        "ACTIVATION": activation,
        "HAS_BIAS": bias is not None,
        "SPLIT": tile.split,
        "OVERLAPS": early,
        "launch_pdl": early,
    }
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), tile.split)
    block = {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.k,
        "GROUP": tile.group,
        "SPLIT_FLOATS": x.dtype is torch.float32,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    with on_device_of(x):
        if group:
            codes, of_scales = triton.cdiv(k, 32) * columns * 16, triton.cdiv(k, group) * columns * 4
            _weight_only_int4_kernel[grid](
                x,
                data[:codes],
                data[codes : codes + of_scales].view(torch.float32),
                bias,
                out,
                partial,
                rows,
                columns,
                k,
                x.stride(0),
                out.stride(0),
                GROUP_STEPS=group // tile.k,
                EVEN_K=k % tile.k == 0,
                STAGES=tile.stages,
                **block,
                **options,
            )
        else:
            descriptors = by_descriptor(x) and by_descriptor(data)
            inputs = (x, data)
            if descriptors:
                inputs = (
                    TensorDescriptor(x, list(x.shape), list(x.stride()), [tile.rows, tile.k]),
                    TensorDescriptor(data, list(data.shape), list(data.stride()), [tile.columns, tile.k]),
                )
            _weight_only_int8_kernel[grid](
                *inputs,
                scale,
                bias,
                out,
                partial,
                rows,
                columns,
                k,
                x.stride(0),
                out.stride(0),
                DESCRIPTORS=descriptors,
                EVEN_K=descriptors or k % tile.k == 0,
                **block,
                **options,
            )
        if partial is not None:
            _weight_only_finish_kernel[(triton.cdiv(rows, 4), triton.cdiv(columns, 256))](
                partial,
                scale,
                bias,
                out,
                rows,
                columns,
                out.stride(0),
                HAS_SCALE=group == 0,
                BLOCK_M=4,
                BLOCK_N=256,
                num_warps=4,
                **options,
            )
