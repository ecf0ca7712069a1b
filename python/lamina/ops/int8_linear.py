"""int8_linear: a linear layer with int8 weights and activations quantized per row inside the op."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.library import define
from lamina.quant.weights import dequantize_weight, quantize_weight

_aten = torch.ops.aten

# What can be fused, by name, and its gradient: (grad, value before the activation) -> grad before it.
ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, before: grad,
    "relu": lambda grad, before: _aten.threshold_backward(grad, before, 0),
    "gelu": lambda grad, before: _aten.gelu_backward(grad, before),
    "gelu_tanh": lambda grad, before: _aten.gelu_backward(grad, before, approximate="tanh"),
    "silu": lambda grad, before: _aten.silu_backward(grad, before),
}


class PackedInt8Weight(NamedTuple):
    """An int8 weight [N, K] in the order the kernels read it. One layout serves every instruction set.

    data: int8 [packed bytes]; scale: float32 [N], weight = code * scale; compensation: int32 [N rounded up to 16].
    """

    data: Tensor
    scale: Tensor
    compensation: Tensor


def pack_int8_weight(weight: Tensor, scale: Tensor | None = None) -> PackedInt8Weight:
    """Pack a weight [N, K] for `int8_linear`.

    `weight` is floating point and quantized per output channel here (symmetric, [-127, 127]), or int8 with its `scale`
    [N]. Raises ValueError for NaN or infinite values or scales and for codes of -128.

    >>> packed = lamina.ops.pack_int8_weight(torch.randn(3072, 768))
    """
    if weight.ndim != 2:
        raise ValueError(f"pack_int8_weight: weight has shape {list(weight.shape)}, but must be [N, K]")
    if weight.device.type != "cpu":
        raise ValueError(f"pack_int8_weight: weight is on {weight.device}, but int8 kernels run on the CPU")
    if weight.is_floating_point():
        if scale is not None:
            raise ValueError("pack_int8_weight: scale goes with an int8 weight, but the weight is floating point")
        weight, scale = quantize_weight(weight.detach())
    elif scale is None:
        raise ValueError("pack_int8_weight: an int8 weight needs its scale")
    n, k = weight.shape
    packed = PackedInt8Weight(
        data=torch.empty(_C.int8_linear_packed_size(n, k), dtype=torch.int8),
        scale=scale.detach().to(torch.float32).contiguous().clone(),
        compensation=torch.empty((n + 15) // 16 * 16, dtype=torch.int32),
    )
    _C.int8_linear_pack(weight.contiguous(), packed.scale, packed.data, packed.compensation)
    return packed


def unpack_int8_weight(packed: PackedInt8Weight, in_features: int) -> Tensor:
    """The int8 codes [N, in_features] of a packed weight; `pack_int8_weight(codes, packed.scale)` is the inverse."""
    weight = torch.empty(packed.scale.shape[0], in_features, dtype=torch.int8)
    _C.int8_linear_unpack(packed.data, weight)
    return weight


def _cpu(x: Tensor, data: Tensor, scale: Tensor, compensation: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if x.ndim == 0:
        raise ValueError("int8_linear: x is a scalar, but must have at least one dimension, [..., K]")
    out = x.new_empty(*x.shape[:-1], scale.shape[0])
    # No reshape(-1, K): torch cannot tell what -1 means when K is 0.
    rows = x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out_rows = out if out.ndim == 2 else out.view(rows.shape[0], scale.shape[0])
    _C.int8_linear(rows, data, scale, compensation, bias, activation, out_rows)
    return out


def _fake(x: Tensor, data: Tensor, scale: Tensor, compensation: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    torch._check(x.ndim >= 1, lambda: "int8_linear: x must have at least one dimension")
    torch._check(x.dtype in (torch.float32, torch.bfloat16), lambda: f"int8_linear: x is {x.dtype}")
    return x.new_empty(*x.shape[:-1], scale.shape[0])


_op = define(
    "int8_linear(Tensor x, Tensor data, Tensor scale, Tensor compensation, Tensor? bias, str activation) -> Tensor",
    cpu=_cpu,
    fake=_fake,
)


def _backward_cpu(grad: Tensor, data: Tensor, scale: Tensor, in_features: int) -> Tensor:
    weight = unpack_int8_weight(PackedInt8Weight(data, scale, data), in_features)
    return grad @ dequantize_weight(weight, scale).to(grad.dtype)


def _backward_fake(grad: Tensor, data: Tensor, scale: Tensor, in_features: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


_backward_op = define(
    "int8_linear_backward(Tensor grad, Tensor data, Tensor scale, SymInt in_features) -> Tensor",
    cpu=_backward_cpu,
    fake=_backward_fake,
)


def traced_weight(packed: PackedInt8Weight, in_features: int) -> Tensor:
    """The dequantized weight [N, in_features], float32, by an op that graphs can hold: the gradient of the identity."""
    return _backward_op(torch.eye(packed.scale.shape[0]), packed.data, packed.scale, in_features)


class _WithGradient(torch.autograd.Function):
    """The straight-through gradient: rounding counts as the identity, so x sees the dequantized weight."""

    @staticmethod
    def forward(ctx, x, data, scale, compensation, bias, activation):
        ctx.save_for_backward(x, data, scale, compensation, bias)
        ctx.activation = activation
        return _op(x, data, scale, compensation, bias, activation)

    @staticmethod
    def backward(ctx, grad):
        x, data, scale, compensation, bias = ctx.saved_tensors
        if ctx.activation != "none":
            before = _op(x, data, scale, compensation, bias, "none")
            grad = ACTIVATIONS[ctx.activation](grad, before)
        x_grad = _backward_op(grad, data, scale, x.shape[-1]) if ctx.needs_input_grad[0] else None
        bias_grad = None
        if bias is not None and ctx.needs_input_grad[4]:
            bias_grad = grad.flatten(0, -2).sum(0).to(bias.dtype) if grad.ndim > 1 else grad.to(bias.dtype)
        return x_grad, None, None, None, bias_grad, None


def call_int8_linear(
    x: Tensor, data: Tensor, scale: Tensor, compensation: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """The op on loose tensors, with a gradient where one is asked for.

    No torch.library autograd: a Python autograd kernel would cost every call outside inference_mode 5 us.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _WithGradient.apply(x, data, scale, compensation, bias, activation)
    return _op(x, data, scale, compensation, bias, activation)


def int8_linear(
    x: Tensor, packed_weight: PackedInt8Weight, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """`activation(x @ weight.T + bias)` with int8 arithmetic.

    Each row of `x` is quantized symmetrically to int8 (scale = max|row| / 127, round half to even), products are summed
    exactly in int32, and scales, bias and activation are applied in float32. A row that holds NaN or infinity gives
    NaN. The gradient for x and bias is the straight-through one: as if nothing had been rounded.

    Args:
        x: [..., K] float32 or bfloat16, any strides.
        packed_weight: from `pack_int8_weight` of a weight [N, K].
        bias: [N] float32 or bfloat16.
        activation: None, "relu", "gelu" (exact, within 6e-6), "gelu_tanh" or "silu".

    Returns [..., N] of x's dtype. Raises ValueError when shapes or dtypes do not fit.

    >>> y = lamina.ops.int8_linear(x, lamina.ops.pack_int8_weight(linear.weight), linear.bias, activation="gelu")
    """
    return call_int8_linear(x, *packed_weight, bias, activation or "none")
