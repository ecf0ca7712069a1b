"""sparse_int8_linear: int8_linear where only the blocks of the weight that hold a nonzero are stored and multiplied."""

from typing import NamedTuple

import torch
from torch import Tensor

from lamina import _C
from lamina.ops import semi_structured
from lamina.ops.int8_linear import (
    check_gpu_operands,
    define_int8_product,
    gpu_codes,
    int8_product,
    plain_int8_weight,
)
from lamina.ops.library import define
from lamina.ops.sparse_blocks import BLOCKS, join, pack_blocks, split, unpack_blocks
from lamina.ops.token_panels import PANEL, new_codes
from lamina.quant.weights import quantize_weight

# Output channels x inputs of a block that the CPU's kernels know.
PATTERNS = ("1x4", "2x4", "4x4")

# Patterns that GPUs have kernels for, and what the CPU packs them as.
GPU_PATTERNS = {**dict.fromkeys(BLOCKS, "4x4"), semi_structured.PATTERN: "1x4"}

# Where the header of packed data names the pattern (SparseHeader in csrc/ops/sparse_format.h).
_PATTERN = slice(24, 40)

# The share of blocks with a nonzero above which int8_linear with the dense weight is as fast, measured with VNNI at 16
# to 128 rows of 3072 inputs and 768 outputs. For one row, which dense weights are only read for, it is 0.1, 0.2 and
# 0.45.
BREAK_EVEN_DENSITY = {"1x4": 0.35, "2x4": 0.55, "4x4": 0.7, **dict.fromkeys(BLOCKS, 0.7)}


class PackedSparseInt8Weight(NamedTuple):
    """A block-sparse int8 weight [N, K] as the kernels of a device read it; `move_sparse_int8_weight` makes that of
    another device.

    scale: float32 [N], weight = code * scale. On the CPU, where one layout serves every instruction set, data is uint8
    [packed bytes], which start with a header that names version, pattern and sizes; compensation: int32 [N rounded up
    to 16]. On a GPU compensation is empty, and data is int8:

        blocks   [S + index, b, b]: those of b x b codes that hold a nonzero, row by row, and behind them an int32 index
                 of their places (see kernels/sparse_linear.py); compensation [0, K].
        2:4      [N, S] as cuSPARSELt has it (see lamina/ops/semi_structured.py); compensation [0, K].
        dense    [N, K], of patterns that GPUs have no kernel for, as `int8_linear` takes it.
    """

    data: Tensor
    scale: Tensor
    compensation: Tensor


def pack_sparse_int8_weight(
    weight: Tensor, scale: Tensor | None = None, *, pattern: str = "4x4"
) -> PackedSparseInt8Weight:
    """Pack a weight [N, K] for `sparse_int8_linear`.

    `weight` is floating point and quantized per output channel here (symmetric, [-127, 127]), or int8 with its `scale`
    [N]. `pattern` is the block that is kept or dropped whole, output channels x inputs: "1x4", "2x4", "4x4", "16x16",
    "32x32" or "64x64"; or it is "2:4". Any weight can be packed: a block is stored if any of its codes is not zero, and
    sizes that blocks do not divide are padded. A weight without zero blocks takes 13% to 50% more than
    `pack_int8_weight` makes of it and is slower.

    The CPU has kernels for the first three patterns, and packs the square blocks, which are made of such, as "4x4"; it
    gains nothing from "2:4". A GPU has kernels for the square blocks from 16, and for "2:4" at sizes in multiples of
    64, and keeps other weights dense.

    Raises ValueError for another pattern, NaN or infinite values or scales, and codes of -128.

    >>> packed = lamina.ops.pack_sparse_int8_weight(linear.weight, pattern="4x4")
    """
    known = *PATTERNS, *GPU_PATTERNS
    if pattern not in known:
        raise ValueError(f"pack_sparse_int8_weight: pattern '{pattern}' is unknown; use {', '.join(known)}")
    if weight.ndim != 2:
        raise ValueError(f"pack_sparse_int8_weight: weight has shape {list(weight.shape)}, but must be [N, K]")
    if weight.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"pack_sparse_int8_weight: weight is on {weight.device}, but int8 kernels run on the CPU and on NVIDIA GPUs"
        )
    if weight.is_floating_point():
        if scale is not None:
            raise ValueError(
                "pack_sparse_int8_weight: scale goes with an int8 weight, but the weight is floating point"
            )
        weight, scale = quantize_weight(weight.detach())
    elif scale is None:
        raise ValueError("pack_sparse_int8_weight: an int8 weight needs its scale")
    if weight.device.type == "cuda":
        return pack_gpu_sparse_int8_weight(weight, scale, pattern)
    pattern = GPU_PATTERNS.get(pattern, pattern)
    codes = weight.contiguous()
    packed = PackedSparseInt8Weight(
        data=torch.empty(_C.sparse_int8_linear_packed_size(codes, pattern), dtype=torch.uint8),
        scale=scale.detach().to(torch.float32).contiguous().clone(),
        compensation=torch.empty((weight.shape[0] + 15) // 16 * 16, dtype=torch.int32),
    )
    _C.sparse_int8_linear_pack(codes, packed.scale, pattern, packed.data, packed.compensation)
    return packed


def pack_gpu_sparse_int8_weight(codes: Tensor, scale: Tensor, pattern: str) -> PackedSparseInt8Weight:
    """int8 codes [N, K] and their scale [N] in the layout of GPUs, on whatever device they are."""
    data, scale, nothing = plain_int8_weight(codes, scale)
    two_of_four = pattern == semi_structured.PATTERN and semi_structured.obstacle(data) is None
    if two_of_four:
        data, _ = semi_structured.pack(data, "cusparselt")
    elif pattern in BLOCKS:
        data = join(*pack_blocks(data, BLOCKS[pattern]))
    if two_of_four or pattern in BLOCKS:
        nothing = nothing.view(0, codes.shape[1])  # whose shape tells what that of the blocks does not
    return PackedSparseInt8Weight(data, scale, nothing)


def move_sparse_int8_weight(
    packed: PackedSparseInt8Weight, in_features: int, device: torch.device | str, pattern: str = "4x4"
) -> PackedSparseInt8Weight:
    """A packed weight [N, in_features] in the layout of `device`, on that device; `pattern` as it was packed with.

    Between the CPU and a GPU it is packed anew, from the same codes; elsewhere it is copied.

    >>> packed = lamina.ops.move_sparse_int8_weight(packed, linear.in_features, "cuda", "64x64")
    """
    device = torch.device(device)
    on_gpu = packed.data.dtype is not torch.uint8
    if on_gpu == (device.type == "cuda") or device.type not in ("cpu", "cuda"):
        return PackedSparseInt8Weight(*(t.to(device) for t in packed))
    codes = unpack_sparse_int8_weight(packed, in_features).to(device)
    return pack_sparse_int8_weight(codes, packed.scale.to(device), pattern=pattern)


def unpack_sparse_int8_weight(packed: PackedSparseInt8Weight, in_features: int) -> Tensor:
    """The int8 codes [N, in_features] of a packed weight, zeros included, on its device.

    `pack_sparse_int8_weight(codes, packed.scale, pattern=...)` is the inverse. Raises FormatError, a ValueError, if
    `packed.data` is foreign, damaged or from another version.
    """
    _check_features(packed.data, packed.compensation, in_features)
    return _unpack(packed.data, packed.scale, in_features)


def packed_pattern(data: Tensor) -> str:
    """The pattern that the header of packed data names."""
    return bytes(data[_PATTERN].tolist()).rstrip(b"\0").decode()


def block_density(weight: Tensor, pattern: str) -> float:
    """The share of the blocks of `pattern` ("4x4": output channels x inputs) in a weight [N, K] that hold a nonzero.

    Blocks at the edges count as whole ones. A weight without elements has density 0.

    >>> block_density(torch.eye(8), "4x4")
    0.5
    """
    rows, columns = (int(size) for size in pattern.split("x"))
    n, k = weight.shape
    if n == 0 or k == 0:
        return 0.0
    padded = torch.nn.functional.pad(weight.detach() != 0, (0, -k % columns, 0, -n % rows))
    return padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).any(3).any(1).float().mean().item()


def _unpack(data: Tensor, scale: Tensor, in_features: int) -> Tensor:
    n = scale.shape[0]
    if data.dtype is torch.int8:
        if _is_two_of_four(data, n, in_features):
            return semi_structured.unpack(data, data.new_empty((0, in_features), dtype=torch.int32))
        values, index = _gpu_blocks(data, n, in_features)
        return values.clone() if index is None else unpack_blocks(values, index, n, in_features)
    weight = torch.empty(n, in_features, dtype=torch.int8)
    _C.sparse_int8_linear_unpack(data, weight)
    return weight


def _is_two_of_four(data: Tensor, out_features: int, in_features: int) -> bool:
    """Whether data has the size of cuSPARSELt's form: half of the values, and an index."""
    return data.ndim == 2 and data.shape[0] == out_features and in_features / 2 < data.shape[1] < in_features


def _gpu_blocks(data: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor | None]:
    """Blocks and their index, or a dense weight and None, of what must be a weight of that size in the layout of
    GPUs."""
    shape = out_features, in_features
    if data.dtype is torch.int8 and data.shape == shape:
        return data, None
    if data.dtype is torch.int8 and data.ndim == 3 and data.shape[1] == data.shape[2] in BLOCKS.values():
        parts = split(data, *shape)
        if parts is not None:
            return parts
    raise ValueError(
        f"sparse_int8_linear: packed_weight.data is {str(data.dtype).removeprefix('torch.')} {list(data.shape)}, which "
        f"is no weight {list(shape)} in the layout of GPUs; use move_sparse_int8_weight"
    )


def _check_features(data: Tensor, compensation: Tensor, in_features: int) -> None:
    if compensation.ndim == 2 and compensation.shape[1] != in_features:
        raise ValueError(
            f"sparse_int8_linear: x has {in_features} features, but packed_weight was packed for "
            f"{compensation.shape[-1]}"
        )


def _cuda_kernel(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    x_scale: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
) -> None:
    n = scale.shape[0]
    _check_features(data, compensation, x.shape[1])
    two_of_four = _is_two_of_four(data, n, x.shape[1])
    values, index = (data, None) if two_of_four else _gpu_blocks(data, n, x.shape[1])
    check_gpu_operands("sparse_int8_linear", x, n, scale, bias, activation, residual, x_scale, out_scale, out)
    codes, x_scale = gpu_codes(x, x_scale)
    bias = None if bias is None else bias.contiguous()
    if two_of_four:
        from lamina.kernels.int8_linear import finish_sums

        if x.shape[0]:
            sums = semi_structured.sums(codes, data)
            finish_sums(sums[None].contiguous(), x_scale, scale, bias, activation, residual, out_scale, out)
        return
    if index is None:
        int8_product(codes, x_scale, values, scale, bias, activation, residual, out_scale, out)
        return
    from lamina.kernels.sparse_int8_linear import sparse_int8_linear as launch

    launch(codes, x_scale, values, index, scale, bias, activation, residual, out_scale, out)


call_sparse_int8_linear, traced_sparse_int8_weight = define_int8_product(
    "sparse_int8_linear", _C.sparse_int8_linear, _unpack, _cuda_kernel
)


def sparse_int8_linear(
    x: Tensor,
    packed_weight: PackedSparseInt8Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`activation(x @ weight.T + bias + residual)` with int8 arithmetic and a block-sparse weight.

    Only the blocks of the weight that hold a nonzero are stored, read and multiplied: time and memory fall with the
    share of zero blocks, which pruning has to make (`lamina.prune`). Otherwise as `int8_linear`: rows of `x` are
    quantized per row, sums are exact in int32, the epilogue is in float32, and everything before the activation is
    the same bits as `int8_linear` gives for the dense weight, on every instruction set and for every number of threads.
    The gradient for x, bias and residual is the straight-through one; the weight is frozen.

    Args:
        x: [..., K] float32 or bfloat16, any strides; or int8 codes with their `x_scale`.
        packed_weight: from `pack_sparse_int8_weight` of a weight [N, K].
        bias: [N] float32 or bfloat16.
        activation: None, "relu", "relu6", "gelu" (exact GELU), "gelu_tanh", "quick_gelu" (x sigmoid(1.702 x)), "silu",
            "hardswish" or "tanh", within 3e-6, and exact beyond +-16.
        residual: [..., N] float32 or bfloat16, added before the activation.
        x_scale: float32, as in `int8_linear`: [] for one static scale, or x.shape[:-1] for int8 x.
        out_scale: float32 scalar tensor []: the output is int8, round_half_even(y * (1 / out_scale)) clamped to
            [-127, 127].
        out_dtype: torch.float32 or torch.bfloat16; by default x's dtype, float32 for int8 x.

    Returns [..., N] of out_dtype, or int8 with `out_scale`. Raises ValueError when shapes, dtypes or scales do not fit,
    and FormatError (a ValueError) when `packed_weight.data` is foreign, damaged or from another version.

    >>> packed = lamina.ops.pack_sparse_int8_weight(linear.weight, pattern="4x4")
    >>> y = lamina.ops.sparse_int8_linear(x, packed, linear.bias, activation="gelu")
    """
    return call_sparse_int8_linear(
        x, *packed_weight, bias, activation or "none", residual, x_scale, out_scale, out_dtype
    )


def _new_panels(x_codes: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty((x_codes.shape[0], scale.shape[0], PANEL))


def _panels_cpu(
    x_codes: Tensor,
    x_scales: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    out = _new_panels(x_codes, scale)
    _C.sparse_int8_linear_panels(
        x_codes, x_scales, data, scale, compensation, bias, activation, residual, None, None, None, out, None, None
    )
    return out


def _panels_fake(
    x_codes: Tensor,
    x_scales: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    torch._check(x_codes.ndim == 4, lambda: "sparse_int8_linear_panels: x_codes must be [panels, K / 4, 32, 4]")
    return _new_panels(x_codes, scale)


def _codes_cpu(
    x_codes: Tensor,
    x_scales: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    codes, scales = new_codes(x_codes, scale.shape[0])
    _C.sparse_int8_linear_panels(
        x_codes,
        x_scales,
        data,
        scale,
        compensation,
        bias,
        activation,
        residual,
        None,
        None,
        None,
        None,
        codes,
        scales,
    )
    return codes, scales


def _codes_fake(
    x_codes: Tensor,
    x_scales: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    torch._check(x_codes.ndim == 4, lambda: "sparse_int8_linear_panels: x_codes must be [panels, K / 4, 32, 4]")
    return new_codes(x_codes, scale.shape[0])


def _norm_cpu(
    x_codes: Tensor,
    x_scales: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out = _new_panels(x_codes, scale)
    codes, scales = new_codes(x_codes, scale.shape[0])
    _C.sparse_int8_linear_panels(
        x_codes,
        x_scales,
        data,
        scale,
        compensation,
        bias,
        activation,
        residual,
        norm_weight,
        norm_bias,
        norm_eps,
        out,
        codes,
        scales,
    )
    return out, codes, scales


def _norm_fake(
    x_codes: Tensor,
    x_scales: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x_codes.ndim == 4, lambda: "sparse_int8_linear_panels: x_codes must be [panels, K / 4, 32, 4]")
    return _new_panels(x_codes, scale), *new_codes(x_codes, scale.shape[0])


_PANEL_ARGUMENTS = (
    "Tensor x_codes, Tensor x_scales, Tensor data, Tensor scale, Tensor compensation, Tensor? bias, str activation, "
    "Tensor? residual=None"
)
_panels = define(f"sparse_int8_linear.panels({_PANEL_ARGUMENTS}) -> Tensor", cpu=_panels_cpu, fake=_panels_fake)
_panel_codes = define(
    f"sparse_int8_linear.panel_codes({_PANEL_ARGUMENTS}) -> (Tensor codes, Tensor scales)",
    cpu=_codes_cpu,
    fake=_codes_fake,
)
_panel_norm = define(
    f"sparse_int8_linear.panel_norm({_PANEL_ARGUMENTS.removesuffix('=None')}, Tensor? norm_weight, Tensor? norm_bias, "
    "float norm_eps) -> (Tensor norm, Tensor codes, Tensor scales)",
    cpu=_norm_cpu,
    fake=_norm_fake,
)


def sparse_int8_linear_panels(
    x_codes: Tensor,
    x_scales: Tensor,
    packed_weight: PackedSparseInt8Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    quantize: bool = False,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """`sparse_int8_linear` from panels of tokens to panels, for the layers of a chain: see `token_panels`.

    Each token's sums, and everything before the activation, are the bits that `sparse_int8_linear` gives for its row.
    No gradient.

    Args:
        x_codes: uint8 [panels, ceil(K / 4), 32, 4], from `quantize_panels` or from the op before this one.
        x_scales: float32 [panels, 32], likewise.
        packed_weight: from `pack_sparse_int8_weight` of a weight [N, K].
        bias: [N] float32 or bfloat16.
        activation: as in `sparse_int8_linear`.
        residual: float32 [panels, N, 32], added before the activation.
        quantize: give the codes and scales of the result, for a layer behind it, instead of the result.
        norm: weight, bias and eps of a layer norm of the result: give what `layer_norm_panels` makes of it instead.

    Returns float32 [panels, N, 32], or its (codes, scales) as `quantize_panels` makes them, or with `norm` (norm,
    codes, scales). Raises ValueError when shapes or dtypes do not fit, and FormatError (a ValueError) as
    `sparse_int8_linear` does.

    >>> hidden = lamina.ops.sparse_int8_linear_panels(*codes, first, activation="gelu", quantize=True)
    >>> y = lamina.ops.sparse_int8_linear_panels(*hidden, second, residual=x)
    """
    arguments = (x_codes, x_scales, *packed_weight, bias, activation or "none", residual)
    if norm is not None:
        return _panel_norm(*arguments, *norm)
    return (_panel_codes if quantize else _panels)(*arguments)
