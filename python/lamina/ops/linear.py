"""linear: a float32 linear layer over a weight that is packed once, with residual and activation in the same call."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina import _C
from lamina.ops.int8_linear import ACTIVATIONS, bias_gradient
from lamina.ops.library import define
from lamina.reference.int8_linear import ACTIVATIONS as FORWARD


class PackedLinearWeight(NamedTuple):
    """A float32 weight [N, K] in the order the kernels read it. One layout serves every instruction set.

    data: float32 [N rounded up to 16, K], as many floats in another order: panels of 64 output channels, [K][channels];
    on a GPU the weight itself, [N, K]. out_features: N.
    """

    data: Tensor
    out_features: int


def pack_linear_weight(weight: Tensor) -> PackedLinearWeight:
    """Pack a weight [N, K] for `linear`: a copy of its size.

    weight: float32 on the CPU, or on a GPU, whose tensors torch's own product then takes; any strides; NaN and infinity
    are values like others. Raises ValueError for other dtypes, shapes and devices.

    >>> packed = lamina.ops.pack_linear_weight(linear.weight)
    """
    if weight.ndim != 2:
        raise ValueError(f"pack_linear_weight: weight has shape {list(weight.shape)}, but must be [N, K]")
    n, k = weight.shape
    if weight.is_cuda:
        if weight.dtype is not torch.float32:
            raise ValueError(f"pack_linear_weight: weight is {weight.dtype}, but must be torch.float32")
        return PackedLinearWeight(weight.detach().clone(memory_format=torch.contiguous_format), n)
    if weight.device.type != "cpu":
        raise ValueError(f"pack_linear_weight: weight is on {weight.device}, but lamina's linear layers run on the CPU")
    data = torch.empty((n + 15) // 16 * 16, k)
    _C.linear_pack(weight.detach(), data)
    return PackedLinearWeight(data, n)


def unpack_linear_weight(packed: PackedLinearWeight) -> Tensor:
    """The weight [N, K], the same bits that were packed; `pack_linear_weight` is the inverse."""
    if packed.data.is_cuda:
        return packed.data.clone()
    weight = torch.empty(packed.out_features, packed.data.shape[1])
    _C.linear_unpack(packed.data, weight)
    return weight


def _cpu(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    if x.ndim == 2:  # in as few calls of torch as can be: small layers take less time than one
        out = x.new_empty(x.size(0), out_features)
        if residual is not None:
            residual = _residual_like(out, residual)
        _C.linear(x, data, bias, activation, residual, out)
        return out
    if x.ndim == 0:
        raise ValueError("linear: x is a scalar, but must have at least one dimension, [..., K]")
    out = x.new_empty(*x.shape[:-1], out_features)
    # No reshape(-1, K): torch cannot tell what -1 means when K is 0.
    rows = x.shape[:-1].numel()
    if residual is not None:
        residual = _residual_like(out, residual).reshape(rows, out_features)
    _C.linear(x.reshape(rows, x.shape[-1]), data, bias, activation, residual, out.view(rows, out_features))
    return out


def _cuda(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    if activation not in FORWARD:
        raise ValueError(f"linear: activation '{activation}' is unknown; use one of {', '.join(FORWARD)}")
    y = F.linear(x.float(), data, None if bias is None else bias.float())
    if residual is not None:
        y = y + _residual_like(y, residual)
    return FORWARD[activation](y).to(x.dtype)


def _residual_like(out: Tensor, residual: Tensor) -> Tensor:
    """The residual with contiguous rows."""
    if residual.shape != out.shape:
        raise ValueError(
            f"linear: residual has shape {list(residual.shape)}, but must be {list(out.shape)} like the output"
        )
    return residual if residual.stride(-1) == 1 else residual.contiguous()


def _fake(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    torch._check(x.ndim >= 1, lambda: "linear: x must have at least one dimension")
    torch._check(x.dtype in (torch.float32, torch.bfloat16), lambda: f"linear: x is {x.dtype}")
    return x.new_empty(*x.shape[:-1], out_features)


_op = define(
    "linear(Tensor x, Tensor data, Tensor? bias, int out_features, str activation, Tensor? residual=None) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)


def _backward_cpu(grad: Tensor, data: Tensor) -> Tensor:
    return grad @ unpack_linear_weight(PackedLinearWeight(data, grad.shape[-1])).to(grad.dtype)


def _backward_fake(grad: Tensor, data: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], data.shape[1])


_backward_op = define(
    "linear_backward(Tensor grad, Tensor data) -> Tensor",
    cpu=_backward_cpu,
    fake=_backward_fake,
    cuda=lambda grad, data: grad @ data.to(grad.dtype),
)


class _WithGradient(torch.autograd.Function):
    """The gradient of the layer for everything but its weight, which does not train."""

    @staticmethod
    def forward(ctx, x, data, bias, out_features, activation, residual):
        # The value before the activation is computed again in backward, for which alone x and residual are needed.
        again = (x, residual) if activation != "none" else (None, None)
        ctx.save_for_backward(data, bias, *again)
        ctx.constants = out_features, activation
        ctx.residual_dtype = None if residual is None else residual.dtype
        return _op(x, data, bias, out_features, activation, residual)

    @staticmethod
    def backward(ctx, grad):
        data, bias, x, residual = ctx.saved_tensors
        out_features, activation = ctx.constants
        if activation != "none":
            grad = ACTIVATIONS[activation](grad, _op(x, data, bias, out_features, "none", residual))
        x_grad = _backward_op(grad, data) if ctx.needs_input_grad[0] else None
        bias_grad = bias_gradient(grad, bias) if ctx.needs_input_grad[2] else None
        residual_grad = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None
        return x_grad, None, bias_grad, None, None, residual_grad


def linear(
    x: Tensor,
    packed_weight: PackedLinearWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`activation(x @ weight.T + bias + residual)` in float32.

    Sums are float32, also of bfloat16 inputs, made of partial sums over 128 inputs, which gives about the rounding
    error of torch's own; residual and activation follow in float32 and the result is rounded once. The same inputs give
    the same bits for every number of threads and whatever other rows are in the call. The gradient for x, bias and
    residual is that of the plain layer; the weight does not train. On a GPU torch's own product computes it.

    Args:
        x: [..., K] float32 or bfloat16, any strides.
        packed_weight: from `pack_linear_weight` of a weight [N, K].
        bias: [N] float32 or bfloat16.
        activation: None, "relu", "relu6", "gelu" (exact GELU), "gelu_tanh", "quick_gelu" (x sigmoid(1.702 x)), "silu",
            "hardswish" or "tanh", within 3e-6, and exact beyond +-16.
        residual: [..., N] float32 or bfloat16, added before the activation.

    Returns [..., N] of x's dtype. Raises ValueError when shapes or dtypes do not fit.

    >>> y = lamina.ops.linear(x, lamina.ops.pack_linear_weight(linear.weight), linear.bias, activation="relu")
    """
    data, out_features = packed_weight
    # No torch.library autograd, for the reason in int8_linear.
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _WithGradient.apply(x, data, bias, out_features, activation or "none", residual)
    return _op(x, data, bias, out_features, activation or "none", residual)
