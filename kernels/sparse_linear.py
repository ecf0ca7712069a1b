"""Triton kernels of sparse_linear: products with a weight of which square blocks are stored.

The weight [N, K] is cut into blocks [b, b], 16, 32 or 64 a side; values [S, b, b] are those that hold something other
than zero, one block row after the other. A program computes some rows of x times one block row, and walks the blocks
that are there: it reads tiles of x where the list of columns says. The gradient for x is the same product with the
transposed list. What makes it fast: columns are read one step ahead, so that the loads of tiles, which hang on them,
are in flight all the time; small blocks are gathered until a product fills the tensor cores; long block rows start
first, so that no program is alone at the end.

The index is one int32 tensor of sections; R and C are the numbers of block rows and columns:

    [R + 1]  first block of each block row          [C + 1]  first entry of each block column
    [R]      block rows, longest first              [C]      block columns, longest first
    [S]      column of each block                   [S]      row of each entry
                                                    [S]      block of each entry

An entry is a block in the order of columns. `SparseSections` says where each begins. Sums are float32, in the order of
the list: the same inputs give the same bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from lamina.kernels.device import capability, on_device_of
from lamina.kernels.epilogue import activate
from lamina.kernels.tuning.sparse_linear import SparseGradientTile, SparseTile, sparse_gradient_tile, sparse_tile
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class SparseSections(NamedTuple):
    """Where the sections of an index begin, for a product with the weight or with its transpose."""

    first: int
    order: int
    others: int
    blocks: int


def sections(stored: int, block_rows: int, block_columns: int, transposed: bool) -> SparseSections:
    """`blocks` is the section that says which block an entry is; without `transposed` entries are blocks."""
    if not transposed:
        return SparseSections(0, block_rows + 1, 2 * block_rows + 1, 0)
    start = 2 * block_rows + 1 + stored
    others = start + 2 * block_columns + 1
    return SparseSections(start, start + block_columns + 1, others, others + stored)


@triton.jit
def block_products(
    x,
    values,
    index,
    begin,
    end,
    others,
    blocks,
    row,
    output,
    rows,
    inputs,
    stride_row,
    stride_input,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WHOLE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM: tl.constexpr,
):
    """Sums [ROWS, OUTPUTS] of the entries from `begin` to `end`, of the dtype SUM.

    row: the first row; output: the first output within a block; WHOLE: blocks divide the inputs.
    """
    total = tl.zeros((ROWS, OUTPUTS), dtype=SUM)
    if DESCRIPTOR:
        other = tl.load(index + others + begin, mask=begin < end, other=0)
        block = begin
        if TRANSPOSED:
            block = tl.load(index + blocks + begin, mask=begin < end, other=0)
        for entry in range(begin, end):
            following = entry + 1
            next_other = tl.load(index + others + following, mask=following < end, other=0)
            next_block = following
            if TRANSPOSED:
                next_block = tl.load(index + blocks + following, mask=following < end, other=0)
            tile = x.load([row, other * BLOCK])
            if TRANSPOSED:
                total = tl.dot(tile, values.load([block * BLOCK, output]), total, out_dtype=SUM)
            else:
                total = tl.dot(tile, values.load([block * BLOCK + output, 0]).T, total, out_dtype=SUM)
            other = next_other
            block = next_block
    else:
        inside = tl.arange(0, GROUP * BLOCK) % BLOCK
        entry = begin + tl.arange(0, GROUP * BLOCK) // BLOCK
        m = row + tl.arange(0, ROWS)
        n = output + tl.arange(0, OUTPUTS)
        x_rows = x + m.to(tl.int64)[:, None] * stride_row
        other = tl.load(index + others + entry, mask=entry < end, other=0)
        block = entry
        if TRANSPOSED:
            block = tl.load(index + blocks + entry, mask=entry < end, other=0)
        for _ in range(begin, end, GROUP):
            present = entry < end
            entry += GROUP
            next_other = tl.load(index + others + entry, mask=entry < end, other=0)
            next_block = entry
            if TRANSPOSED:
                next_block = tl.load(index + blocks + entry, mask=entry < end, other=0)
            k = other * BLOCK + inside
            k = tl.max_contiguous(tl.multiple_of(k, BLOCK), BLOCK)
            there = present
            if not WHOLE:
                there = present & (k < inputs)
            tile = tl.load(
                x_rows + k.to(tl.int64)[None, :] * stride_input, mask=there[None, :] & (m < rows)[:, None], other=0
            )
            start = values + block.to(tl.int64) * (BLOCK * BLOCK)
            if TRANSPOSED:
                weight = tl.load((start + inside * BLOCK)[:, None] + n[None, :], mask=present[:, None], other=0)
            else:
                weight = tl.load((start + inside)[:, None] + (n * BLOCK)[None, :], mask=present[:, None], other=0)
            total = tl.dot(tile, weight.to(tile.dtype), total, input_precision=PRECISION, out_dtype=SUM)
            other = next_other
            block = next_block
    return total


@triton.jit(do_not_specialize=["rows", "outputs", "first", "order", "others", "blocks", "block_rows"])
def _sparse_linear_kernel(
    x,
    values,
    index,
    bias,
    out,
    rows,
    inputs,
    outputs,
    stride_row,
    stride_input,
    first,
    order,
    others,
    blocks,
    block_rows,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WHOLE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    program = tl.program_id(0)
    PARTS: tl.constexpr = BLOCK // OUTPUTS
    part = program % PARTS
    # Programs that run together share the rows of x.
    block_row = tl.load(index + order + program // PARTS % block_rows)
    row = program // (PARTS * block_rows) * ROWS
    begin = tl.load(index + first + block_row)
    end = tl.load(index + first + block_row + 1)
    total = block_products(
        x,
        values,
        index,
        begin,
        end,
        others,
        blocks,
        row,
        part * OUTPUTS,
        rows,
        inputs,
        stride_row,
        stride_input,
        BLOCK,
        GROUP,
        ROWS,
        OUTPUTS,
        TRANSPOSED,
        WHOLE,
        DESCRIPTOR,
        PRECISION,
        tl.float32,
    )
    n = block_row * BLOCK + part * OUTPUTS + tl.arange(0, OUTPUTS)
    m = row + tl.arange(0, ROWS)
    if BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION)
    inside = tl.arange(0, ROWS)[:, None] * outputs + tl.arange(0, OUTPUTS)[None, :]
    to = out + row.to(tl.int64) * outputs + block_row * BLOCK + part * OUTPUTS + inside
    tl.store(to, total.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None, :])


@triton.jit(do_not_specialize=["rows", "others", "blocks", "columns"])
def _sparse_linear_gradient_kernel(
    grad,
    x,
    index,
    out,
    rows,
    inputs,
    outputs,
    stride_grad,
    stride_output,
    stride_row,
    stride_input,
    others,
    blocks,
    columns,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of the weight's gradient: grad.T @ x, summed over the rows."""
    entry = tl.program_id(0)
    block = tl.load(index + blocks + entry)
    n = tl.load(index + others + entry) * BLOCK + tl.arange(0, BLOCK)
    k = tl.load(index + columns + block) * BLOCK + tl.arange(0, BLOCK)
    m = tl.arange(0, ROWS)
    from_grad = grad + n.to(tl.int64)[None, :] * stride_output
    from_x = x + k.to(tl.int64)[None, :] * stride_input
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, rows, ROWS):
        row = start + m
        there = (row < rows)[:, None]
        at = row.to(tl.int64)[:, None]
        left = tl.load(from_grad + at * stride_grad, mask=there & (n < outputs)[None, :], other=0)
        right = tl.load(from_x + at * stride_row, mask=there & (k < inputs)[None, :], other=0)
        total = tl.dot(left.T, right, total, input_precision=PRECISION)
    inside = tl.arange(0, BLOCK)
    to = out + block.to(tl.int64) * (BLOCK * BLOCK) + inside[:, None] * BLOCK + inside[None, :]
    tl.store(to, total.to(out.dtype.element_ty))


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in three products of tf32, within float32's rounding, or in one where torch may."""
    if dtype == torch.float32:
        # Not `allow_tf32`, which raises once the program has set `fp32_precision`; this one knows of both.
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return "ieee"


def fits_descriptor(tensor: Tensor) -> bool:
    """Whether the copy engine can read the matrix: rows that do not overlap begin at multiples of 16 bytes."""
    return (
        tensor.numel() > 0
        and tensor.stride(1) == 1
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
    )


def block_operands(
    x: Tensor, values: Tensor, tile: SparseTile, transposed: bool
) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor, SparseTile]:
    """x and the values as `block_products` takes them with `tile`, and the tile: without descriptors if they fit not.

    x: [M, K]; values: [S, b, b].
    """
    block = values.shape[1]
    fits = x.dtype == values.dtype and fits_descriptor(x) and values.numel() > 0 and values.data_ptr() % 16 == 0
    if not tile.descriptor or not fits:
        return x, values, tile._replace(descriptor=False)
    shape = [block, tile.outputs] if transposed else [tile.outputs, block]
    return (
        TensorDescriptor.from_tensor(x, [tile.rows, block]),
        TensorDescriptor.from_tensor(values.view(-1, block), shape),
        tile,
    )


def _multiply(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
    transposed: bool,
    tile: SparseTile | None,
) -> None:
    rows, inputs = x.shape
    outputs = out.shape[1]
    if rows == 0 or outputs == 0:
        return
    stored, block, _ = values.shape
    if tile is None:
        tile = sparse_tile(block, rows, x.element_size(), capability(x))
    block_rows, block_columns = triton.cdiv(outputs, block), triton.cdiv(inputs, block)
    if transposed:
        at = sections(stored, block_columns, block_rows, True)
    else:
        at = sections(stored, block_rows, block_columns, False)
    x_operand, values_operand, tile = block_operands(x, values, tile, transposed)
    grid = (block // tile.outputs * block_rows * triton.cdiv(rows, tile.rows),)
    with on_device_of(x):
        _sparse_linear_kernel[grid](
            x_operand,
            values_operand,
            index,
            bias,
            out,
            rows,
            inputs,
            outputs,
            x.stride(0),
            x.stride(1),
            *at,
            block_rows,
            BLOCK=block,
            GROUP=1 if tile.descriptor else tile.group,
            ROWS=tile.rows,
            OUTPUTS=tile.outputs,
            TRANSPOSED=transposed,
            WHOLE=inputs % block == 0,
            DESCRIPTOR=tile.descriptor,
            PRECISION=precision(x.dtype),
            BIAS=bias is not None,
            ACTIVATION=activation,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )


def sparse_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
    tile: SparseTile | None = None,
) -> None:
    """activation(x [M, K] @ weight.T + bias [N]) -> out [M, N], contiguous.

    x: float32, bfloat16 or float16, any strides; values: [S, b, b] of any of these, rounded to x's dtype; index: int32.
    """
    _multiply(x, values, index, bias, activation, out, False, tile)


def sparse_linear_backward(
    grad: Tensor, values: Tensor, index: Tensor, out: Tensor, tile: SparseTile | None = None
) -> None:
    """grad [M, N] @ weight -> out [M, K], contiguous."""
    _multiply(grad, values, index, None, "none", out, True, tile)


def sparse_linear_weight_gradient(
    grad: Tensor, x: Tensor, index: Tensor, out: Tensor, tile: SparseGradientTile | None = None
) -> None:
    """The stored blocks of grad.T [N, M] @ x [M, K] -> out [S, b, b], contiguous; grad and x of one dtype."""
    stored, block, _ = out.shape
    if stored == 0:
        return
    rows, inputs = x.shape
    outputs = grad.shape[1]
    if tile is None:
        tile = sparse_gradient_tile(block, x.element_size())
    at = sections(stored, triton.cdiv(outputs, block), triton.cdiv(inputs, block), True)
    columns = sections(stored, triton.cdiv(outputs, block), triton.cdiv(inputs, block), False).others
    with on_device_of(x):
        _sparse_linear_gradient_kernel[(stored,)](
            grad,
            x,
            index,
            out,
            rows,
            inputs,
            outputs,
            *grad.stride(),
            *x.stride(),
            at.others,
            at.blocks,
            columns,
            BLOCK=block,
            ROWS=tile.rows,
            PRECISION=precision(x.dtype),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
