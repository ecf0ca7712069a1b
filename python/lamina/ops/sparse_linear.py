"""sparse_linear: a linear layer whose weight is mostly zeros, of which only the blocks that hold others are stored."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina import _C
from lamina.ops import semi_structured
from lamina.ops.int8_linear import ACTIVATIONS, bias_gradient
from lamina.ops.library import define
from lamina.ops.sparse_blocks import BLOCKS, index_length, pack_blocks, places, unpack_blocks

# Patterns the float kernels of the CPU know, output channels x inputs of a block.
PATTERNS = ("unstructured", "2x1", "4x1")

# Patterns that GPUs have kernels for, and what the CPU packs them as.
GPU_PATTERNS = {**dict.fromkeys(BLOCKS, "4x1"), semi_structured.PATTERN: "unstructured"}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class PackedSparseWeight(NamedTuple):
    """A sparse weight [N, K] as the kernels of a device read it; `move_sparse_weight` makes that of another device.

    On the CPU, where one layout serves every instruction set, data is uint8 [packed bytes], whose header names the
    pattern and the version of the format, and index None. On a GPU data has the dtype of the weight:

        blocks   data [S, b, b], those of b x b that hold a value other than zero, row by row; index int32, which names
                 their places twice, by rows and by columns (see kernels/sparse_linear.py). `data` may require grad.
        2:4      data and index as one of torch's kernels has them (see lamina/ops/semi_structured.py).
        dense    data [N, K], index None: of patterns that GPUs have no kernel for, and of weights that those for 2:4 do
                 not take.

    out_features: N.
    """

    data: Tensor
    out_features: int
    index: Tensor | None = None


class SparseInfo(NamedTuple):
    """What a packed weight says of itself.

    pattern: see `pack_sparse_weight`; dtype: of the values; out_features, in_features: N and K; blocks: stored blocks;
    nonzeros: values other than zero, of which blocks may hold a few more.
    """

    pattern: str
    dtype: torch.dtype
    out_features: int
    in_features: int
    blocks: int
    nonzeros: int

    @property
    def density(self) -> float:
        """The share of values other than zero; 0 for a weight without values."""
        return self.nonzeros / max(self.out_features * self.in_features, 1)


def pack_sparse_weight(weight: Tensor, pattern: str = "unstructured") -> PackedSparseWeight:
    """Pack the blocks of a weight [N, K] that hold a value other than zero.

    weight: float32 or bfloat16, on a GPU float16 too, any strides; NaN and infinity are values like others. pattern:
    output channels x inputs of a block, "unstructured" (1 x 1), "2x1", "4x1", "16x16", "32x32" or "64x64"; or "2:4". A
    weight that was not pruned in that pattern is packed right too, only with more zeros among its values; channels and
    inputs that a block has beyond the edge of the weight count as zeros. Raises ValueError for other dtypes, shapes,
    devices and patterns.

    The CPU has kernels for the first three patterns, and packs the square blocks, which are made of such, as "4x1", and
    "2:4" as "unstructured". A GPU has kernels for the square blocks, and for "2:4" in bfloat16 and float16 at sizes in
    multiples of 64; it keeps other weights dense (`sparse_kernel` says so).

    >>> packed = lamina.ops.pack_sparse_weight(weight * (weight.abs() > threshold))
    """
    if weight.ndim != 2:
        raise ValueError(f"pack_sparse_weight: weight has shape {list(weight.shape)}, but must be [N, K]")
    weight = weight.detach()
    if weight.device.type == "cuda":
        return pack_gpu_sparse_weight(weight, pattern)
    if weight.device.type != "cpu":
        raise ValueError(
            f"pack_sparse_weight: weight is on {weight.device}, but sparse kernels run on the CPU and on NVIDIA GPUs"
        )
    pattern = GPU_PATTERNS.get(pattern, pattern)
    data = torch.empty(_C.sparse_linear_packed_size(weight, pattern), dtype=torch.uint8)
    _C.sparse_linear_pack(weight, pattern, data)
    return PackedSparseWeight(data, weight.shape[0])


def pack_gpu_sparse_weight(weight: Tensor, pattern: str) -> PackedSparseWeight:
    """A weight [N, K] in the layout of GPUs, on whatever device it is; otherwise as `pack_sparse_weight`."""
    if pattern not in (*PATTERNS, *GPU_PATTERNS):
        raise ValueError(
            f"pack_sparse_weight: pattern '{pattern}' is unknown; use {', '.join((*PATTERNS, *GPU_PATTERNS))}"
        )
    if weight.dtype not in _FLOATS:
        raise ValueError(f"pack_sparse_weight: weight is {weight.dtype}, but must be float32, bfloat16 or float16")
    if pattern == semi_structured.PATTERN and semi_structured.obstacle(weight) is None:
        data, index = semi_structured.pack(weight)
        return PackedSparseWeight(data, weight.shape[0], index)
    if pattern not in BLOCKS:
        return PackedSparseWeight(weight.clone(memory_format=torch.contiguous_format), weight.shape[0])
    values, index = pack_blocks(weight, BLOCKS[pattern])
    return PackedSparseWeight(values, weight.shape[0], index)


def unpack_sparse_weight(packed: PackedSparseWeight, in_features: int | None = None) -> Tensor:
    """The weight [N, K] with its zeros, in the dtype that was packed; `pack_sparse_weight` is the inverse.

    in_features: K, which the layout of GPUs does not tell.
    """
    data = packed.data
    if data.dtype is not torch.uint8:
        if packed.index is None:
            return data.clone()
        if semi_structured.kernel_of(data, packed.index) is not None:
            return semi_structured.unpack(data, packed.index)
        if in_features is None:
            raise ValueError("unpack_sparse_weight: the blocks of a GPU's layout do not tell in_features; give it")
        _check_index(data, packed.index, packed.out_features, in_features)
        return unpack_blocks(data, packed.index, packed.out_features, in_features)
    info = sparse_info(data)
    weight = torch.empty(info.out_features, info.in_features, dtype=info.dtype)
    _C.sparse_linear_unpack(data, weight)
    return weight


def move_sparse_weight(
    packed: PackedSparseWeight, in_features: int, pattern: str, device: torch.device | str
) -> PackedSparseWeight:
    """A packed weight [N, in_features] in the layout of `device`, on that device; `pattern` as it was packed with.

    Between the CPU and a GPU the weight is packed anew (float16 becomes float32 on the CPU); elsewhere it is copied.

    >>> packed = lamina.ops.move_sparse_weight(packed, linear.in_features, "64x64", "cuda")
    """
    device = torch.device(device)
    on_gpu = packed.data.dtype is not torch.uint8
    if on_gpu == (device.type == "cuda") or device.type not in ("cpu", "cuda"):
        index = None if packed.index is None else packed.index.to(device)
        return PackedSparseWeight(packed.data.to(device), packed.out_features, index)
    weight = unpack_sparse_weight(packed, in_features).detach().to(device)
    return pack_sparse_weight(weight.float() if weight.dtype is torch.float16 and on_gpu else weight, pattern)


def sparse_kernel(pattern: str, device: torch.device | str, weight: Tensor | None = None) -> str:
    """What multiplies a weight of that pattern on `device`, in words for reports; `weight`: whether 2:4 fits it.

    >>> lamina.ops.sparse_kernel("4x1", "cuda")
    'dense: NVIDIA GPUs have no kernel for 4x1, use 16x16, 32x32 or 64x64'
    """
    if torch.device(device).type != "cuda":
        return f"blocks of {GPU_PATTERNS.get(pattern, pattern)}"
    if pattern == semi_structured.PATTERN:
        why = None if weight is None else semi_structured.obstacle(weight)
        return pattern if why is None else f"dense: {why}"
    if pattern in BLOCKS:
        return f"blocks of {pattern}"
    return f"dense: NVIDIA GPUs have no kernel for {pattern}, use 16x16, 32x32 or 64x64"


def sparse_info(data: Tensor) -> SparseInfo:
    """Check a packed weight that comes from outside, every index in it, and say what it is.

    Raises FormatError for a tensor that is foreign, truncated, damaged or of another version: the kernels trust what
    they are given.

    >>> lamina.ops.sparse_info(packed.data).density
    """
    pattern, dtype, *sizes = _C.sparse_linear_info(data)
    return SparseInfo(pattern, _DTYPES[dtype], *sizes)


def _rows(x: Tensor) -> Tensor:
    # No reshape(-1, K): torch cannot tell what -1 means when K is 0.
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _cpu(
    x: Tensor, data: Tensor, bias: Tensor | None, out_features: int, activation: str, index: Tensor | None = None
) -> Tensor:
    if x.ndim == 0:
        raise ValueError("sparse_linear: x is a scalar, but must have at least one dimension, [..., K]")
    out = x.new_empty(*x.shape[:-1], out_features)
    rows = _rows(x)
    out_rows = out if out.ndim == 2 else out.view(rows.shape[0], out_features)
    _C.sparse_linear(rows, data, bias, activation, out_rows)
    return out


def _check_gpu(op: str, x: Tensor, data: Tensor, index: Tensor | None, shape: tuple[int, int]) -> None:
    """Refuses what is no weight of that shape in the layout of GPUs."""
    if x.dtype not in _FLOATS:
        raise ValueError(f"{op}: x is {x.dtype}, but must be float32, bfloat16 or float16")
    if data.dtype not in _FLOATS:
        raise ValueError(
            f"{op}: packed_weight has the layout of the CPU and x is on {x.device}; use move_sparse_weight"
        )
    if data.device != x.device:
        raise ValueError(f"{op}: x is on {x.device}, but packed_weight on {data.device}")
    if index is not None and semi_structured.kernel_of(data, index) is not None:
        if (data.shape[0], semi_structured.in_features(data, index)) != shape:
            raise ValueError(f"{op}: packed_weight was not packed for {list(shape)}")
    elif index is not None:
        _check_index(data, index, *shape)
    elif data.shape != shape:
        raise ValueError(f"{op}: packed_weight was packed for {list(data.shape)}, but is used as {list(shape)}")


def _check_index(data: Tensor, index: Tensor, out_features: int, in_features: int) -> None:
    fits = data.ndim == 3 and index.dtype == torch.int32 and data.shape[1] == data.shape[2] in BLOCKS.values()
    if not fits or index.shape != (index_length(data.shape[0], out_features, in_features, data.shape[1]),):
        raise ValueError(f"sparse_linear: packed_weight was not packed for [{out_features}, {in_features}]")


def _cuda(
    x: Tensor, data: Tensor, bias: Tensor | None, out_features: int, activation: str, index: Tensor | None = None
) -> Tensor:
    from lamina.kernels import sparse_linear as kernels

    if x.ndim == 0:
        raise ValueError("sparse_linear: x is a scalar, but must have at least one dimension, [..., K]")
    _check_gpu("sparse_linear", x, data, index, (out_features, x.shape[-1]))
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"sparse_linear: bias has shape {list(bias.shape)}, but must be [{out_features}]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"sparse_linear: activation '{activation}' is unknown; use {', '.join(ACTIVATIONS)}")
    if index is not None and data.ndim == 2 and data.dtype is x.dtype and x.numel():
        y = semi_structured.multiply(_rows(x), data, index, bias)
        return FORWARD[activation](y).view(*x.shape[:-1], out_features)
    if data.ndim == 2:
        # Dense, or 2:4 of another dtype than x.
        weight = data if index is None else semi_structured.unpack(data, index)
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return FORWARD[activation](y)
    out = x.new_empty(*x.shape[:-1], out_features)
    rows = _rows(x)
    if bias is not None:
        bias = bias.contiguous()
    kernels.sparse_linear(rows, data, index, bias, activation, out.view(rows.shape[0], out_features))
    return out


# The activations as torch computes them, behind products that fuse none.
FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
}


def _fake(
    x: Tensor, data: Tensor, bias: Tensor | None, out_features: int, activation: str, index: Tensor | None = None
) -> Tensor:
    torch._check(x.ndim >= 1, lambda: "sparse_linear: x must have at least one dimension")
    allowed = _FLOATS if x.device.type == "cuda" else _FLOATS[:2]
    torch._check(x.dtype in allowed, lambda: f"sparse_linear: x is {x.dtype}")
    return x.new_empty(*x.shape[:-1], out_features)


_op = define(
    "sparse_linear(Tensor x, Tensor data, Tensor? bias, int out_features, str activation, Tensor? index=None) -> "
    "Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)


def _backward_cpu(grad: Tensor, data: Tensor, in_features: int, index: Tensor | None = None) -> Tensor:
    weight = unpack_sparse_weight(PackedSparseWeight(data, grad.shape[-1], index), in_features)
    return grad @ weight.to(grad.dtype)


def _backward_cuda(grad: Tensor, data: Tensor, in_features: int, index: Tensor | None = None) -> Tensor:
    from lamina.kernels import sparse_linear as kernels

    _check_gpu("sparse_linear", grad, data, index, (grad.shape[-1], in_features))
    if index is None:
        return grad @ data.to(grad.dtype)
    if data.ndim == 2:
        return grad @ semi_structured.unpack(data, index).to(grad.dtype)
    out = grad.new_empty(*grad.shape[:-1], in_features)
    rows = _rows(grad)
    kernels.sparse_linear_backward(rows, data, index, out.view(rows.shape[0], in_features))
    return out


def _backward_fake(grad: Tensor, data: Tensor, in_features: int, index: Tensor | None = None) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


_backward_op = define(
    "sparse_linear_backward(Tensor grad, Tensor data, SymInt in_features, Tensor? index=None) -> Tensor",
    cpu=_backward_cpu,
    fake=_backward_fake,
    cuda=_backward_cuda,
)


def _weight_cpu(grad: Tensor, x: Tensor, data: Tensor, index: Tensor | None) -> Tensor:
    full = _rows(grad).T @ _rows(x)
    if index is None:
        return full.to(data.dtype)
    stored, block, _ = data.shape
    full = F.pad(full, (0, -full.shape[1] % block, 0, -full.shape[0] % block))
    height, width = full.shape[0] // block, full.shape[1] // block
    tiles = full.view(height, block, width, block).transpose(1, 2).reshape(height * width, block, block)
    return tiles[places(index, stored, height, width)].to(data.dtype)


def _weight_cuda(grad: Tensor, x: Tensor, data: Tensor, index: Tensor | None) -> Tensor:
    from lamina.kernels import sparse_linear as kernels

    if index is None:
        return _weight_cpu(grad, x, data, index)
    if data.ndim == 2:
        raise ValueError("sparse_linear: the values of a 2:4 weight do not train; train the dense weight and pack it")
    out = torch.empty_like(data, memory_format=torch.contiguous_format)
    kernels.sparse_linear_weight_gradient(_rows(grad), _rows(x), index, out)
    return out


def _weight_fake(grad: Tensor, x: Tensor, data: Tensor, index: Tensor | None) -> Tensor:
    return torch.empty_like(data, memory_format=torch.contiguous_format)


_weight_op = define(
    "sparse_linear_backward.weight(Tensor grad, Tensor x, Tensor data, Tensor? index) -> Tensor",
    cpu=_weight_cpu,
    fake=_weight_fake,
    cuda=_weight_cuda,
)


def traced_sparse_weight(packed: PackedSparseWeight, in_features: int) -> Tensor:
    """The weight [N, in_features], float32, by an op that graphs can hold: the gradient of the identity."""
    data, out_features, index = packed
    return _backward_op(torch.eye(out_features, device=data.device), data, in_features, index)


class _WithGradient(torch.autograd.Function):
    """The gradient of the dense layer with the same weight, of which a GPU's layout may train."""

    @staticmethod
    def forward(ctx, x, data, bias, out_features, activation, index):
        ctx.save_for_backward(x, data, bias, index)
        ctx.constants = out_features, activation
        return _op(x, data, bias, out_features, activation, index)

    @staticmethod
    def backward(ctx, grad):
        x, data, bias, index = ctx.saved_tensors
        out_features, activation = ctx.constants
        if activation != "none":
            grad = ACTIVATIONS[activation](grad, _op(x, data, bias, out_features, "none", index))
        needs = ctx.needs_input_grad
        x_grad = _backward_op(grad, data, x.shape[-1], index) if needs[0] else None
        data_grad = _weight_op(grad, x, data, index) if needs[1] else None
        bias_grad = bias_gradient(grad, bias) if needs[2] else None
        return x_grad, data_grad, bias_grad, None, None, None


def call_sparse_linear(
    x: Tensor, data: Tensor, bias: Tensor | None, out_features: int, activation: str, index: Tensor | None = None
) -> Tensor:
    """The op on loose tensors, with a gradient where one is asked for; why not by torch.library: see int8_linear."""
    if torch.is_grad_enabled() and (x.requires_grad or data.requires_grad or (bias is not None and bias.requires_grad)):
        return _WithGradient.apply(x, data, bias, out_features, activation, index)
    return _op(x, data, bias, out_features, activation, index)


def sparse_linear(
    x: Tensor, packed_weight: PackedSparseWeight, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """`activation(x @ weight.T + bias)` where only the stored blocks of the weight are multiplied.

    Sums are float32, also of bfloat16 values. Zeros that are not stored multiply nothing: an infinite or NaN input that
    meets only zeros leaves no trace, where the dense layer gives NaN. The gradient for x and bias is that of the dense
    layer; so is that for `packed_weight.data` on a GPU, where it holds the values of the stored blocks alone; on the
    CPU the weight does not train. The same inputs give the same bits for every number of threads.

    On a GPU values are rounded to x's dtype, and float32 is multiplied in three products of tf32, or in one where torch
    may (`torch.backends.cuda.matmul.allow_tf32`).

    The idea of multiplying transposed panels of activations: "Fast Sparse ConvNets", Elsen et al., 2019.

    Args:
        x: [..., K] float32 or bfloat16, on a GPU float16 too, any strides.
        packed_weight: of a weight [N, K], from `pack_sparse_weight`, on x's device; one that comes from outside the
            process goes through `sparse_info` first.
        bias: [N] float32 or bfloat16.
        activation: None, "relu", "relu6", "gelu" (exact GELU), "gelu_tanh", "quick_gelu", "silu",
            "hardswish" or "tanh",
            within 3e-6.

    Returns [..., N] of x's dtype. Raises ValueError when shapes or dtypes do not fit, and FormatError (a ValueError)
    when `packed_weight.data` is foreign, damaged or of another version.

    >>> y = lamina.ops.sparse_linear(x, lamina.ops.pack_sparse_weight(linear.weight, "4x1"), linear.bias)
    """
    data, out_features, index = packed_weight
    return call_sparse_linear(x, data, bias, out_features, activation or "none", index)
