"""sparse_int8_linear in Triton: rows of int8 codes times the stored blocks of an int8 weight, summed exactly in int32.

The blocks, their index and the walk along them are those of sparse_linear; what follows the sums is what follows those
of int8_linear, in the same order of operations, so that the bits are those of int8_linear with the dense weight.
"""

import triton
import triton.language as tl
from lamina.kernels.device import capability, check_same_device, on_device_of
from lamina.kernels.int8_linear import finish_block
from lamina.kernels.sparse_linear import block_operands, block_products, sections
from lamina.kernels.tuning.sparse_linear import SparseTile, sparse_tile
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "outputs", "first", "order", "others", "block_rows"])
def _sparse_int8_linear_kernel(
    x,
    values,
    index,
    x_scale,
    w_scale,
    bias,
    residual,
    out_scale,
    out,
    rows,
    inputs,
    outputs,
    x_row,
    x_scale_step,
    residual_row,
    out_row,
    first,
    order,
    others,
    block_rows,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WHOLE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WANTS_CODES: tl.constexpr,
):
    program = tl.program_id(0)
    PARTS: tl.constexpr = BLOCK // OUTPUTS
    part = program % PARTS
    block_row = tl.load(index + order + program // PARTS % block_rows)
    row = program // (PARTS * block_rows) * ROWS
    begin = tl.load(index + first + block_row)
    end = tl.load(index + first + block_row + 1)
    sums = block_products(
        x,
        values,
        index,
        begin,
        end,
        others,
        0,
        row,
        part * OUTPUTS,
        rows,
        inputs,
        x_row,
        1,
        BLOCK,
        GROUP,
        ROWS,
        OUTPUTS,
        False,
        WHOLE,
        DESCRIPTOR,
        "ieee",
        tl.int32,
    )
    operands = (x_scale, x_scale_step, w_scale, bias, residual, residual_row, out_scale, out, out_row)
    FLAGS: tl.constexpr = (ACTIVATION, HAS_BIAS, HAS_RESIDUAL, WANTS_CODES)
    row += tl.arange(0, ROWS)
    column = block_row * BLOCK + part * OUTPUTS + tl.arange(0, OUTPUTS)
    finish_block(sums, row, column, rows, outputs, operands, FLAGS)


def sparse_int8_linear(
    codes: Tensor,
    x_scale: Tensor,
    values: Tensor,
    index: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
    tile: SparseTile | None = None,
) -> None:
    """Writes out [M, N]: float, or int8 with out_scale float32 [].

    values: int8 [S, b, b], index int32: of a weight [N, K]; the other operands as `int8_linear` takes them.
    """
    check_same_device(
        "sparse_int8_linear",
        codes,
        x_scale=x_scale,
        packed_weight=values,
        scale=w_scale,
        bias=bias,
        residual=residual,
        out_scale=out_scale,
    )
    (rows, inputs), outputs = codes.shape, out.shape[1]
    if rows == 0 or outputs == 0:
        return
    stored, block, _ = values.shape
    if tile is None:
        tile = sparse_tile(block, rows, 1, capability(codes))
    block_rows = triton.cdiv(outputs, block)
    at = sections(stored, block_rows, triton.cdiv(inputs, block), False)
    x_operand, values_operand, tile = block_operands(codes, values, tile, False)
    with on_device_of(codes):
        _sparse_int8_linear_kernel[(block // tile.outputs * block_rows * triton.cdiv(rows, tile.rows),)](
            x_operand,
            values_operand,
            index,
            x_scale,
            w_scale,
            bias,
            residual,
            out_scale,
            out,
            rows,
            inputs,
            outputs,
            codes.stride(0),
            x_scale.stride(0) if x_scale.ndim else 0,
            0 if residual is None else residual.stride(0),
            out.stride(0),
            at.first,
            at.order,
            at.others,
            block_rows,
            BLOCK=block,
            GROUP=1 if tile.descriptor else tile.group,
            ROWS=tile.rows,
            OUTPUTS=tile.outputs,
            WHOLE=inputs % block == 0,
            DESCRIPTOR=tile.descriptor,
            ACTIVATION=activation,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            WANTS_CODES=out_scale is not None,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
            enable_fp_fusion=False,
        )
