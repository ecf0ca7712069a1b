"""sparse_linear: a linear layer whose weight is mostly zeros, of which only the blocks that hold others are stored."""

from typing import NamedTuple

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.int8_linear import ACTIVATIONS, bias_gradient
from lamina.ops.library import define

# Patterns the float kernels know, output channels x inputs of a block.
PATTERNS = ("unstructured", "2x1", "4x1")

# Patterns that GPUs have kernels for, and what the CPU packs them as.
GPU_PATTERNS: dict[str, str] = {}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PackedSparseWeight(NamedTuple):
    """A sparse weight [N, K] as the kernels read it. One layout serves every instruction set.

    data: uint8 [packed bytes], whose header names the pattern and the version of the format; out_features: N.
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

    weight: float32 or bfloat16 on the CPU, any strides; NaN and infinity are values like others. pattern: output
    channels x inputs of a block, "unstructured" (1 x 1), "2x1" or "4x1". A weight that was not pruned in that pattern
    is packed right too, only with more zeros among its values; channels and inputs that a block has beyond the edge of
    the weight count as zeros. Raises ValueError for other dtypes, shapes, devices and patterns.

    >>> packed = lamina.ops.pack_sparse_weight(weight * (weight.abs() > threshold))
    """
    if weight.ndim != 2:
        raise ValueError(f"pack_sparse_weight: weight has shape {list(weight.shape)}, but must be [N, K]")
    if weight.device.type != "cpu":
        raise ValueError(f"pack_sparse_weight: weight is on {weight.device}, but sparse kernels run on the CPU")
    weight = weight.detach()
    data = torch.empty(_C.sparse_linear_packed_size(weight, pattern), dtype=torch.uint8)
    _C.sparse_linear_pack(weight, pattern, data)
    return PackedSparseWeight(data, weight.shape[0])


def unpack_sparse_weight(packed: PackedSparseWeight) -> Tensor:
    """The weight [N, K] with its zeros, in the dtype that was packed; `pack_sparse_weight` is the inverse."""
    info = sparse_info(packed.data)
    weight = torch.empty(info.out_features, info.in_features, dtype=info.dtype)
    _C.sparse_linear_unpack(packed.data, weight)
    return weight


def move_sparse_weight(
    packed: PackedSparseWeight, in_features: int, pattern: str, device: torch.device | str
) -> PackedSparseWeight:
    """A packed weight [N, in_features] in the layout of `device`, on that device; `pattern` as it was packed with."""
    if torch.device(device).type == "cuda":
        raise NotImplementedError("move_sparse_weight: sparse kernels run on the CPU")
    return packed._replace(data=packed.data.to(device))


def sparse_info(data: Tensor) -> SparseInfo:
    """Check a packed weight that comes from outside, every index in it, and say what it is.

    Raises FormatError for a tensor that is foreign, truncated, damaged or of another version: the kernels trust what
    they are given.

    >>> lamina.ops.sparse_info(packed.data).density
    """
    pattern, dtype, *sizes = _C.sparse_linear_info(data)
    return SparseInfo(pattern, _DTYPES[dtype], *sizes)


def _cpu(x: Tensor, data: Tensor, bias: Tensor | None, out_features: int, activation: str) -> Tensor:
    if x.ndim == 0:
        raise ValueError("sparse_linear: x is a scalar, but must have at least one dimension, [..., K]")
    out = x.new_empty(*x.shape[:-1], out_features)
    # No reshape(-1, K): torch cannot tell what -1 means when K is 0.
    rows = x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out_rows = out if out.ndim == 2 else out.view(rows.shape[0], out_features)
    _C.sparse_linear(rows, data, bias, activation, out_rows)
    return out


def _fake(x: Tensor, data: Tensor, bias: Tensor | None, out_features: int, activation: str) -> Tensor:
    torch._check(x.ndim >= 1, lambda: "sparse_linear: x must have at least one dimension")
    torch._check(x.dtype in (torch.float32, torch.bfloat16), lambda: f"sparse_linear: x is {x.dtype}")
    return x.new_empty(*x.shape[:-1], out_features)


_op = define(
    "sparse_linear(Tensor x, Tensor data, Tensor? bias, int out_features, str activation) -> Tensor",
    cpu=_cpu,
    fake=_fake,
)


def _backward_cpu(grad: Tensor, data: Tensor, in_features: int) -> Tensor:
    weight = unpack_sparse_weight(PackedSparseWeight(data, grad.shape[-1]))
    return grad @ weight.to(grad.dtype)


def _backward_fake(grad: Tensor, data: Tensor, in_features: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


_backward_op = define(
    "sparse_linear_backward(Tensor grad, Tensor data, SymInt in_features) -> Tensor",
    cpu=_backward_cpu,
    fake=_backward_fake,
)


def traced_sparse_weight(packed: PackedSparseWeight, in_features: int) -> Tensor:
    """The weight [N, in_features], float32, by an op that graphs can hold: the gradient of the identity."""
    return _backward_op(torch.eye(packed.out_features), packed.data, in_features)


class _WithGradient(torch.autograd.Function):
    """The gradient of the dense layer with the same weight, which does not train."""

    @staticmethod
    def forward(ctx, x, data, bias, out_features, activation):
        ctx.save_for_backward(x, data, bias)
        ctx.constants = out_features, activation
        return _op(x, data, bias, out_features, activation)

    @staticmethod
    def backward(ctx, grad):
        x, data, bias = ctx.saved_tensors
        out_features, activation = ctx.constants
        if activation != "none":
            grad = ACTIVATIONS[activation](grad, _op(x, data, bias, out_features, "none"))
        x_grad = _backward_op(grad, data, x.shape[-1]) if ctx.needs_input_grad[0] else None
        bias_grad = bias_gradient(grad, bias) if ctx.needs_input_grad[2] else None
        return x_grad, None, bias_grad, None, None


def call_sparse_linear(x: Tensor, data: Tensor, bias: Tensor | None, out_features: int, activation: str) -> Tensor:
    """The op on loose tensors, with a gradient where one is asked for; why not by torch.library: see int8_linear."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _WithGradient.apply(x, data, bias, out_features, activation)
    return _op(x, data, bias, out_features, activation)


def sparse_linear(
    x: Tensor, packed_weight: PackedSparseWeight, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """`activation(x @ weight.T + bias)` where only the stored blocks of the weight are multiplied.

    Sums are float32, also of bfloat16 values. Zeros that are not stored multiply nothing: an infinite or NaN input that
    meets only zeros leaves no trace, where the dense layer gives NaN. The gradient for x and bias is that of the dense
    layer; the weight does not train. The same inputs give the same bits for every number of threads.

    The idea of multiplying transposed panels of activations: "Fast Sparse ConvNets", Elsen et al., 2019.

    Args:
        x: [..., K] float32 or bfloat16, any strides.
        packed_weight: of a weight [N, K], from `pack_sparse_weight`; one that comes from outside the process goes
            through `sparse_info` first.
        bias: [N] float32 or bfloat16.
        activation: None, "relu", "relu6", "gelu" (exact GELU), "gelu_tanh", "quick_gelu", "silu",
            "hardswish" or "tanh",
            within 3e-6.

    Returns [..., N] of x's dtype. Raises ValueError when shapes or dtypes do not fit, and FormatError (a ValueError)
    when `packed_weight.data` is foreign, damaged or of another version.

    >>> y = lamina.ops.sparse_linear(x, lamina.ops.pack_sparse_weight(linear.weight, "4x1"), linear.bias)
    """
    data, out_features, _ = packed_weight
    return call_sparse_linear(x, data, bias, out_features, activation or "none")
