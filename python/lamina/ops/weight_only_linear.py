"""weight_only_linear: a linear layer with int8 or int4 weights and float activations, for memory-bound decoding."""

from typing import NamedTuple

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.int8_linear import (
    ACTIVATIONS,
    GPU_FLOATS,
    PackedInt8Weight,
    bias_gradient,
    input_gradient,
    unpack_int8_weight,
)
from lamina.ops.library import define
from lamina.quant.weights import dequantize_weight_groups, quantize_weight_groups


class PackedInt4Weight(NamedTuple):
    """An int4 weight [N, K] with its scales, in the order the kernels read it. One layout serves every instruction set.

    data: uint8 [packed bytes], two codes a byte and a bfloat16 scale for each group of a channel; out_features: N;
    group_size: inputs that share a scale, weight = code * scale. On a GPU the bytes are in another order, see
    kernels/weight_only_linear.py.
    """

    data: Tensor
    out_features: int
    group_size: int


def pack_int4_weight(weight: Tensor, scale: Tensor | None = None, *, group_size: int = 32) -> PackedInt4Weight:
    """Pack a weight [N, K] for `weight_only_linear`.

    `weight` is floating point and quantized here (`lamina.quant.quantize_weight_groups`), or int8 codes in [-8, 7] with
    their `scale` [N, ceil(K / group_size)]. `group_size` is a multiple of 32; the last group of a channel may be
    shorter. The packed weight lies where `weight` does, `move_int4_weight` takes it elsewhere. Raises ValueError for
    NaN or infinite values or scales and for codes outside [-8, 7].

    >>> packed = lamina.ops.pack_int4_weight(torch.randn(3072, 768))
    """
    if weight.ndim != 2:
        raise ValueError(f"pack_int4_weight: weight has shape {list(weight.shape)}, but must be [N, K]")
    if not (weight.is_cpu or weight.is_cuda):
        raise ValueError(
            f"pack_int4_weight: weight is on {weight.device}, but int4 kernels run on the CPU and on NVIDIA GPUs"
        )
    if weight.is_floating_point():
        if scale is not None:
            raise ValueError("pack_int4_weight: scale goes with int8 codes, but the weight is floating point")
        weight, scale = quantize_weight_groups(weight, group_size)
    elif scale is None:
        raise ValueError("pack_int4_weight: codes need their scale")
    if weight.is_cuda:
        return plain_int4_weight(weight, scale, group_size)
    n, k = weight.shape
    data = torch.empty(_C.weight_only_linear_packed_size(n, k, group_size), dtype=torch.uint8)
    _C.weight_only_linear_pack(weight.contiguous(), scale.detach().to(torch.bfloat16).contiguous(), group_size, data)
    return PackedInt4Weight(data, n, group_size)


def unpack_int4_weight(packed: PackedInt4Weight, in_features: int) -> tuple[Tensor, Tensor]:
    """(codes int8 [N, in_features], scale bfloat16 [N, groups]) of a packed weight.

    `pack_int4_weight(codes, scale, group_size=packed.group_size)` is the inverse.
    """
    data, n, group_size = packed
    if data.is_cuda:
        return plain_int4_codes(packed, in_features)
    codes = torch.empty(n, in_features, dtype=torch.int8)
    scale = torch.empty(n, -(-in_features // group_size), dtype=torch.bfloat16)
    _C.weight_only_linear_unpack(data, group_size, codes, scale)
    return codes, scale


def _plain_sizes(n: int, k: int, group_size: int) -> tuple[int, int, int]:
    """Bytes of an int4 weight on a GPU: of codes, of scales, and of zeros behind them, as many as k has padding, so
    that the size tells k."""
    blocks = -(-k // 32)
    return blocks * n * 16, -(-k // group_size) * n * 4, blocks * 32 - k


def plain_int4_weight(codes: Tensor, scale: Tensor, group_size: int) -> PackedInt4Weight:
    """Codes int8 [N, K] and scale [N, groups] in the layout of GPUs: `pack_int4_weight` of a weight on one."""
    n, k = codes.shape
    if group_size <= 0 or group_size % 32:
        raise ValueError(f"pack_int4_weight: group_size is {group_size}, but must be a positive multiple of 32")
    if codes.dtype is not torch.int8 or scale.shape != (n, -(-k // group_size)):
        raise ValueError(
            f"pack_int4_weight: weight is {codes.dtype} and scale {list(scale.shape)}, but must be int8 and "
            f"{[n, -(-k // group_size)]}"
        )
    if bool(((codes < -8) | (codes > 7)).any()):
        raise ValueError("pack_int4_weight: codes must lie in [-8, 7]")
    # As on the CPU, scales are bfloat16 numbers.
    scale = scale.detach().to(codes.device).to(torch.bfloat16).to(torch.float32)
    if not bool(scale.isfinite().all()):
        raise ValueError("pack_int4_weight: scale is not finite")
    _, _, padding = _plain_sizes(n, k, group_size)
    offset = torch.nn.functional.pad(codes + 8, (0, padding), value=8).to(torch.uint8)
    low, high = offset.reshape(n, (k + padding) // 32, 2, 16).transpose(0, 1).unbind(2)
    parts = (low | high << 4).flatten(), scale.T.contiguous().flatten().view(torch.uint8), codes.new_zeros(padding)
    return PackedInt4Weight(torch.cat([part.to(torch.uint8) for part in parts]), n, group_size)


def plain_int4_codes(packed: PackedInt4Weight, in_features: int) -> tuple[Tensor, Tensor]:
    """The inverse of `plain_int4_weight`."""
    data, n, group_size = packed
    of_codes, of_scales, _ = sizes = _plain_sizes(n, in_features, group_size)
    if data.shape != (sum(sizes),):
        raise ValueError(_wrong_size(data, n, in_features, group_size))
    blocks, groups = -(-in_features // 32), -(-in_features // group_size)
    both = data[:of_codes].reshape(blocks, n, 16)
    codes = torch.stack((both & 15, both >> 4), 2).transpose(0, 1).reshape(n, 32 * blocks)[:, :in_features]
    scale = data[of_codes : of_codes + of_scales].view(torch.float32).reshape(groups, n).T.to(torch.bfloat16)
    return codes.to(torch.int8) - 8, scale.contiguous()


def _wrong_size(data: Tensor, n: int, k: int, group_size: int) -> str:
    return (
        f"weight_only_linear: packed_weight.data has {data.numel()} bytes, but on a GPU a weight [{n}, {k}] in groups "
        f"of {group_size} takes {sum(_plain_sizes(n, k, group_size))}"
    )


def move_int4_weight(packed: PackedInt4Weight, in_features: int, device: torch.device | str) -> PackedInt4Weight:
    """A packed weight on `device`, in the form that the kernels there read.

    Between the CPU and a GPU it is packed anew, from the same codes; elsewhere it is copied.

    >>> packed = lamina.ops.move_int4_weight(packed, linear.in_features, "cuda")
    """
    device = torch.device(device)
    if device.type == "cpu" and packed.data.is_cuda:
        codes, scale = unpack_int4_weight(packed, in_features)
        return pack_int4_weight(codes.cpu(), scale.cpu(), group_size=packed.group_size)
    if device.type == "cuda" and packed.data.is_cpu:
        packed = plain_int4_weight(*unpack_int4_weight(packed, in_features), packed.group_size)
    return packed._replace(data=packed.data.to(device))


def _cpu(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    compensation: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    activation: str,
) -> Tensor:
    if x.ndim == 0:
        raise ValueError("weight_only_linear: x is a scalar, but must have at least one dimension, [..., K]")
    out = x.new_empty(*x.shape[:-1], out_features)
    # No reshape(-1, K): torch cannot tell what -1 means when K is 0.
    rows = x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out_rows = out if out.ndim == 2 else out.view(rows.shape[0], out_features)
    _C.weight_only_linear(rows, data, scale, compensation, bias, group_size, activation, out_rows)
    return out


def _cuda(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    compensation: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    activation: str,
) -> Tensor:
    from lamina.kernels.weight_only_linear import weight_only_linear as launch

    if x.ndim == 0:
        raise ValueError("weight_only_linear: x is a scalar, but must have at least one dimension, [..., K]")
    for name, t in (("x", x), ("bias", bias)):
        if t is not None and t.dtype not in GPU_FLOATS:
            kind = str(t.dtype).removeprefix("torch.")
            raise ValueError(f"weight_only_linear: {name} is {kind}, but must be float32, bfloat16 or float16")
    k = x.shape[-1]
    if group_size:
        if data.shape != (sum(_plain_sizes(out_features, k, group_size)),):
            raise ValueError(_wrong_size(data, out_features, k, group_size))
    elif data.ndim != 2 or data.shape[0] != out_features:
        raise ValueError(
            f"weight_only_linear: packed_weight.data has shape {list(data.shape)}, but on a GPU must be "
            f"[{out_features}, K], as move_int8_weight gives it"
        )
    elif data.shape[1] != k:
        raise ValueError(f"weight_only_linear: x has {k} features, but packed_weight was packed for {data.shape[1]}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"weight_only_linear: bias has shape {list(bias.shape)}, but must be [{out_features}]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"weight_only_linear: activation '{activation}' is unknown; use {', '.join(ACTIVATIONS)}")
    out = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)
    rows = x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    bias = None if bias is None else bias.contiguous()
    launch(rows, data, scale, bias, group_size, activation, out.view(rows.shape[0], out_features))
    return out


def _fake(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    compensation: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    activation: str,
) -> Tensor:
    torch._check(x.ndim >= 1, lambda: "weight_only_linear: x must have at least one dimension")
    known = x.dtype in (torch.float32, torch.bfloat16) or (x.dtype is torch.float16 and not x.is_cpu)
    torch._check(known, lambda: f"weight_only_linear: x is {x.dtype}")
    return x.new_empty(*x.shape[:-1], out_features)


_op = define(
    "weight_only_linear(Tensor x, Tensor data, Tensor? scale, Tensor? compensation, Tensor? bias, int out_features, "
    "int group_size, str activation) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)


def _backward_cpu(grad: Tensor, data: Tensor, scale: Tensor | None, in_features: int, group_size: int) -> Tensor:
    if group_size == 0:
        codes = unpack_int8_weight(PackedInt8Weight(data, scale, data), in_features)
        return input_gradient(grad, codes, scale)
    packed = PackedInt4Weight(data, grad.shape[-1], group_size)
    weight = dequantize_weight_groups(*unpack_int4_weight(packed, in_features), group_size)
    return grad @ weight.to(grad.dtype)


def _backward_cuda(grad: Tensor, data: Tensor, scale: Tensor | None, in_features: int, group_size: int) -> Tensor:
    if group_size == 0:
        return input_gradient(grad, data, scale)
    packed = PackedInt4Weight(data, grad.shape[-1], group_size)
    weight = dequantize_weight_groups(*plain_int4_codes(packed, in_features), group_size)
    return grad @ weight.to(grad.dtype)


def _backward_fake(grad: Tensor, data: Tensor, scale: Tensor | None, in_features: int, group_size: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


_backward_op = define(
    "weight_only_linear_backward(Tensor grad, Tensor data, Tensor? scale, SymInt in_features, int group_size) -> "
    "Tensor",
    cpu=_backward_cpu,
    fake=_backward_fake,
    cuda=_backward_cuda,
)


def traced_int4_weight(packed: PackedInt4Weight, in_features: int) -> Tensor:
    """The dequantized weight [N, in_features], float32, by an op that graphs can hold: the gradient of the identity."""
    one = torch.eye(packed.out_features, device=packed.data.device)
    return _backward_op(one, packed.data, None, in_features, packed.group_size)


class _WithGradient(torch.autograd.Function):
    """The gradient of the layer with its dequantized weight, which is what the forward computes."""

    @staticmethod
    def forward(ctx, x, data, scale, compensation, bias, out_features, group_size, activation):
        ctx.save_for_backward(x, data, scale, compensation, bias)
        ctx.constants = out_features, group_size, activation
        return _op(x, data, scale, compensation, bias, out_features, group_size, activation)

    @staticmethod
    def backward(ctx, grad):
        x, data, scale, compensation, bias = ctx.saved_tensors
        out_features, group_size, activation = ctx.constants
        if activation != "none":
            before = _op(x, data, scale, compensation, bias, out_features, group_size, "none")
            grad = ACTIVATIONS[activation](grad, before)
        x_grad = _backward_op(grad, data, scale, x.shape[-1], group_size) if ctx.needs_input_grad[0] else None
        bias_grad = bias_gradient(grad, bias) if ctx.needs_input_grad[4] else None
        return x_grad, None, None, None, bias_grad, None, None, None


def call_weight_only_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    compensation: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    activation: str,
) -> Tensor:
    """The op on loose tensors, with a gradient where one is asked for; why not by torch.library: see int8_linear."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _WithGradient.apply(x, data, scale, compensation, bias, out_features, group_size, activation)
    return _op(x, data, scale, compensation, bias, out_features, group_size, activation)


def weight_only_linear(
    x: Tensor,
    packed_weight: PackedInt8Weight | PackedInt4Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """`activation(x @ weight.T + bias)` where only the weight is quantized.

    Made for few rows, where reading the weight is what takes the time: int8 is a quarter of its float32 bytes, int4
    with its scales 14%. Activations keep the precision of float32. Processors with VNNI hold each row as 24-bit fixed
    point below its largest magnitude (an error of at most 2^-23 of that) and sum exactly in int32; others sum in
    float32, as GPUs do. A row that holds NaN or infinity gives NaN with VNNI, and what IEEE arithmetic gives elsewhere
    (on a GPU float32 rows with infinity give NaN). On a GPU floats may be float16 too, and a row's last bits may depend
    on how many rows come with it. The gradient for x and bias is that of the layer with the dequantized weight.

    Args:
        x: [..., K] float32 or bfloat16, any strides.
        packed_weight: of a weight [N, K], from `pack_int8_weight` (one scale per output channel; the same as for
            `int8_linear`) or `pack_int4_weight` (one scale per group of inputs).
        bias: [N] float32 or bfloat16.
        activation: None, "relu", "relu6", "gelu" (exact GELU), "gelu_tanh", "quick_gelu", "silu",
            "hardswish" or "tanh",
            within 3e-6.

    Returns [..., N] of x's dtype. Raises ValueError when shapes or dtypes do not fit.

    >>> y = lamina.ops.weight_only_linear(x, lamina.ops.pack_int4_weight(linear.weight), linear.bias)
    """
    if isinstance(packed_weight, PackedInt4Weight):
        data, out_features, group_size = packed_weight
        return call_weight_only_linear(x, data, None, None, bias, out_features, group_size, activation or "none")
    data, scale, compensation = packed_weight
    return call_weight_only_linear(x, data, scale, compensation, bias, scale.shape[0], 0, activation or "none")
