"""int8_linear: a linear layer with int8 weights; activations are quantized inside the op, or come in as codes."""

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
    "relu6": lambda grad, before: _aten.hardtanh_backward(grad, before, 0, 6),
    "gelu": lambda grad, before: _aten.gelu_backward(grad, before),
    "gelu_tanh": lambda grad, before: _aten.gelu_backward(grad, before, approximate="tanh"),
    "quick_gelu": lambda grad, before: _aten.silu_backward(grad, 1.702 * before),
    "silu": lambda grad, before: _aten.silu_backward(grad, before),
    "hardswish": lambda grad, before: _aten.hardswish_backward(grad, before),
    "tanh": lambda grad, before: _aten.tanh_backward(grad, before.tanh()),
}


# What float operands of kernels on a GPU may be.
GPU_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# 127 * 127 * K must stay below 2^31, or an int32 sum of extreme codes would wrap; 128 * 127 * K where x holds codes of
# -128.
_MAX_FEATURES = (2**31 - 1) // (127 * 127)
_MAX_FEATURES_OF_CODES = (2**31 - 1) // (128 * 127)


class PackedInt8Weight(NamedTuple):
    """An int8 weight [N, K] in the order the kernels read it. One layout serves every instruction set.

    data: int8 [packed bytes]; scale: float32 [N], weight = code * scale; compensation: int32 [N rounded up to 16]. On a
    GPU data are the codes themselves, [N, K], and compensation, which they do not need, is empty.
    """

    data: Tensor
    scale: Tensor
    compensation: Tensor


def pack_int8_weight(weight: Tensor, scale: Tensor | None = None) -> PackedInt8Weight:
    """Pack a weight [N, K] for `int8_linear`.

    `weight` is floating point and quantized per output channel here (symmetric, [-127, 127]), or int8 with its `scale`
    [N]. The packed weight lies where `weight` does, `move_int8_weight` takes it elsewhere. Raises ValueError for NaN
    or infinite values or scales and for codes of -128.

    >>> packed = lamina.ops.pack_int8_weight(torch.randn(3072, 768))
    """
    if weight.ndim != 2:
        raise ValueError(f"pack_int8_weight: weight has shape {list(weight.shape)}, but must be [N, K]")
    if not (weight.is_cpu or weight.is_cuda):
        raise ValueError(
            f"pack_int8_weight: weight is on {weight.device}, but int8 kernels run on the CPU and on NVIDIA GPUs"
        )
    if weight.is_floating_point():
        if scale is not None:
            raise ValueError("pack_int8_weight: scale goes with an int8 weight, but the weight is floating point")
        weight, scale = quantize_weight(weight.detach())
    elif scale is None:
        raise ValueError("pack_int8_weight: an int8 weight needs its scale")
    if weight.is_cuda:
        return plain_int8_weight(weight, scale)
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
    if packed.data.ndim == 2:
        return _plain_codes(packed.data, in_features).clone()
    weight = torch.empty(packed.scale.shape[0], in_features, dtype=torch.int8)
    _C.int8_linear_unpack(packed.data, weight)
    return weight


def _plain_codes(data: Tensor, in_features: int) -> Tensor:
    if data.shape[1] != in_features:
        raise ValueError(f"int8_linear: {in_features} features, but packed_weight was packed for {data.shape[1]}")
    return data


def plain_int8_weight(codes: Tensor, scale: Tensor) -> PackedInt8Weight:
    """Codes [N, K] and their scale [N] in the layout of GPUs: `pack_int8_weight` of a weight that lies on one."""
    n, k = codes.shape
    if codes.dtype is not torch.int8:
        raise ValueError(f"pack_int8_weight: weight is {codes.dtype}, but must be int8 or floating point")
    if scale.shape != (n,):
        raise ValueError(f"pack_int8_weight: scale has shape {list(scale.shape)}, but must be [{n}]")
    if k > _MAX_FEATURES:
        raise ValueError(f"pack_int8_weight: in_features is {k}, but int32 sums are exact only up to {_MAX_FEATURES}")
    scale = scale.detach().to(codes.device, torch.float32).contiguous().clone()
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise ValueError("pack_int8_weight: scale must be finite and not negative")
    if bool((codes == -128).any()):
        raise ValueError("pack_int8_weight: weight holds -128, but codes must lie in [-127, 127]")
    return PackedInt8Weight(codes.contiguous().clone(), scale, codes.new_empty(0, dtype=torch.int32))


def move_int8_weight(packed: PackedInt8Weight, in_features: int, device: torch.device | str) -> PackedInt8Weight:
    """A packed weight on `device`, in the form that the kernels there read: on a GPU the codes [N, in_features].

    Between the CPU and a GPU it is packed anew, from the same codes; elsewhere it is copied.

    >>> packed = lamina.ops.move_int8_weight(packed, linear.in_features, "cuda")
    """
    device, plain = torch.device(device), packed.data.ndim == 2
    if device.type == "cpu" and plain:
        return pack_int8_weight(unpack_int8_weight(packed, in_features).cpu(), packed.scale.cpu())
    if device.type == "cuda" and not plain:
        packed = plain_int8_weight(unpack_int8_weight(packed, in_features), packed.scale)
    return PackedInt8Weight(*(t.to(device) for t in packed))


def int8_output_dtype(x: Tensor, out_scale: Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype of the output of an int8 product, None for x's."""
    if out_scale is not None:
        return torch.int8
    return torch.float32 if out_dtype is None and x.dtype is torch.int8 else out_dtype


def input_gradient(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """What the input of a layer with the int8 weight `codes` [N, K] sees of the gradient: the dequantized weight."""
    return grad @ dequantize_weight(codes, scale).to(grad.dtype)


def bias_gradient(grad: Tensor, bias: Tensor) -> Tensor:
    """The sum over all rows [..., N] of the gradient behind the bias, in the bias's dtype."""
    return (grad.flatten(0, -2).sum(0) if grad.ndim > 1 else grad).to(bias.dtype)


class Int8Product(NamedTuple):
    """An op of int8 rows times a packed weight, on loose tensors.

    call: (x, data, scale, compensation, bias, activation, residual, x_scale, out_scale, out_dtype), with a gradient
    where one is asked for; traced_weight: (packed weight, K) -> the dequantized weight [N, K], float32, by an op that
    graphs can hold.
    """

    call: Callable[..., Tensor]
    traced_weight: Callable[[tuple[Tensor, Tensor, Tensor], int], Tensor]


def _on_tensors(name: str, kernel: Callable) -> Callable[..., Tensor]:
    """An implementation of the op `name`, of x [..., K], by a kernel that takes rows [M, K] and writes into out."""

    def run(
        x: Tensor,
        data: Tensor,
        scale: Tensor,
        compensation: Tensor,
        bias: Tensor | None,
        activation: str,
        residual: Tensor | None = None,
        x_scale: Tensor | None = None,
        out_scale: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if x.ndim == 0:
            raise ValueError(f"{name}: x is a scalar, but must have at least one dimension, [..., K]")
        lead = x.shape[:-1]
        if out_scale is not None and out_dtype is not None:
            raise ValueError(f"{name}: out_dtype {out_dtype} goes with a float output, but out_scale asks for int8")
        out = x.new_empty(*lead, scale.shape[0], dtype=int8_output_dtype(x, out_scale, out_dtype))
        if residual is not None:
            if residual.shape != out.shape:
                raise ValueError(
                    f"{name}: residual has shape {list(residual.shape)}, but must be {list(out.shape)} like the output"
                )
            if residual.stride(-1) != 1:
                residual = residual.contiguous()
        if x_scale is not None and x_scale.ndim and x_scale.shape != lead:
            raise ValueError(
                f"{name}: x_scale has shape {list(x_scale.shape)}, but must be [] or, for int8 x, {list(lead)}"
            )
        if x.ndim == 2:
            kernel(x, data, scale, compensation, bias, activation, residual, x_scale, out_scale, out)
            return out
        # No reshape(-1, K): torch cannot tell what -1 means when K is 0.
        rows, n = lead.numel(), scale.shape[0]
        if residual is not None:
            residual = residual.reshape(rows, n)
        if x_scale is not None and (x_scale.ndim or (x.ndim == 1 and x.dtype is torch.int8)):
            x_scale = x_scale.reshape(rows)
        x = x.reshape(rows, x.shape[-1])
        kernel(x, data, scale, compensation, bias, activation, residual, x_scale, out_scale, out.view(rows, n))
        return out

    return run


def define_int8_product(
    name: str,
    kernel: Callable,
    unpack: Callable[[Tensor, Tensor, int], Tensor],
    cuda_kernel: Callable | None = None,
) -> Int8Product:
    """Defines `lamina::<name>` and `lamina::<name>_backward`: int8_linear, whatever the packed weight holds.

    kernel: of _C, which takes rows [M, K]; unpack: (data, scale, K) -> the int8 codes [N, K]; cuda_kernel: as kernel,
    for tensors on a GPU.
    """

    def fake(
        x: Tensor,
        data: Tensor,
        scale: Tensor,
        compensation: Tensor,
        bias: Tensor | None,
        activation: str,
        residual: Tensor | None = None,
        x_scale: Tensor | None = None,
        out_scale: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        torch._check(x.ndim >= 1, lambda: f"{name}: x must have at least one dimension")
        known = x.dtype in (torch.float32, torch.bfloat16, torch.int8) or (x.dtype is torch.float16 and not x.is_cpu)
        torch._check(known, lambda: f"{name}: x is {x.dtype}")
        return x.new_empty(*x.shape[:-1], scale.shape[0], dtype=int8_output_dtype(x, out_scale, out_dtype))

    op = define(
        f"{name}(Tensor x, Tensor data, Tensor scale, Tensor compensation, Tensor? bias, str activation, "
        "Tensor? residual=None, Tensor? x_scale=None, Tensor? out_scale=None, ScalarType? out_dtype=None) -> Tensor",
        cpu=_on_tensors(name, kernel),
        fake=fake,
        cuda=None if cuda_kernel is None else _on_tensors(name, cuda_kernel),
    )

    def backward(grad: Tensor, data: Tensor, scale: Tensor, in_features: int) -> Tensor:
        return input_gradient(grad, unpack(data, scale, in_features), scale)

    def backward_fake(grad: Tensor, data: Tensor, scale: Tensor, in_features: int) -> Tensor:
        return grad.new_empty(*grad.shape[:-1], in_features)

    backward_op = define(
        f"{name}_backward(Tensor grad, Tensor data, Tensor scale, SymInt in_features) -> Tensor",
        cpu=backward,
        fake=backward_fake,
        cuda=None if cuda_kernel is None else backward,
    )

    class WithGradient(torch.autograd.Function):
        """The straight-through gradient: rounding and clamping count as the identity; x sees the dequantized weight."""

        @staticmethod
        def forward(ctx, x, data, scale, compensation, bias, activation, residual, x_scale, out_dtype):
            # The value before the activation is computed again in backward, for which alone these four are needed.
            again = (compensation, bias, residual, x_scale) if activation != "none" else (None, bias, None, None)
            ctx.save_for_backward(x, data, scale, *again)
            ctx.activation = activation
            ctx.residual_dtype = None if residual is None else residual.dtype
            return op(x, data, scale, compensation, bias, activation, residual, x_scale, None, out_dtype)

        @staticmethod
        def backward(ctx, grad):
            x, data, scale, compensation, bias, residual, x_scale = ctx.saved_tensors
            if ctx.activation != "none":
                before = op(x, data, scale, compensation, bias, "none", residual, x_scale, None, grad.dtype)
                grad = ACTIVATIONS[ctx.activation](grad, before)
            needs = ctx.needs_input_grad
            x_grad = backward_op(grad, data, scale, x.shape[-1]).to(x.dtype) if needs[0] else None
            bias_grad = bias_gradient(grad, bias) if needs[4] else None
            residual_grad = grad.to(ctx.residual_dtype) if needs[6] else None
            return x_grad, None, None, None, bias_grad, None, residual_grad, None, None

    def call(
        x: Tensor,
        data: Tensor,
        scale: Tensor,
        compensation: Tensor,
        bias: Tensor | None,
        activation: str,
        residual: Tensor | None = None,
        x_scale: Tensor | None = None,
        out_scale: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The op on loose tensors, with a gradient where one is asked for.

        No torch.library autograd: a Python autograd kernel would cost every call outside inference_mode 5 us.
        """
        if (
            torch.is_grad_enabled()
            and out_scale is None
            and (
                x.requires_grad
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
            )
        ):
            return WithGradient.apply(x, data, scale, compensation, bias, activation, residual, x_scale, out_dtype)
        return op(x, data, scale, compensation, bias, activation, residual, x_scale, out_scale, out_dtype)

    def traced_weight(packed: tuple[Tensor, Tensor, Tensor], in_features: int) -> Tensor:
        data, scale, _ = packed
        one = torch.eye(scale.shape[0], device=scale.device)
        return backward_op(one, data, scale, in_features)  # the gradient of the identity

    return Int8Product(call, traced_weight)


def _unpack(data: Tensor, scale: Tensor, in_features: int) -> Tensor:
    if data.ndim == 2:
        return _plain_codes(data, in_features)
    return unpack_int8_weight(PackedInt8Weight(data, scale, data), in_features)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_gpu_operands(
    op: str,
    x: Tensor,
    n: int,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    x_scale: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
) -> None:
    """What the CPU checks in csrc/ops/int8_operands.cpp, but for the values of scales: a GPU would have to be waited
    for."""

    def check_float(name: str, t: Tensor | None) -> None:
        if t is not None and t.dtype not in GPU_FLOATS:
            raise ValueError(f"{op}: {name} is {_dtype_name(t.dtype)}, but must be float32, bfloat16 or float16")

    if x.dtype is not torch.int8:
        check_float("x", x)
    elif x_scale is None:
        raise ValueError(f"{op}: x is int8, but x_scale, which says what its codes mean, is missing")
    elif x.shape[1] > _MAX_FEATURES_OF_CODES:
        raise ValueError(
            f"{op}: x has {x.shape[1]} features, but int32 sums of int8 codes are exact only up to "
            f"{_MAX_FEATURES_OF_CODES}"
        )
    for name, t in (("x_scale", x_scale), ("out_scale", out_scale), ("packed_weight.scale", scale)):
        if t is not None and t.dtype is not torch.float32:
            raise ValueError(f"{op}: {name} is {_dtype_name(t.dtype)}, but must be float32")
    if x_scale is not None and x_scale.ndim and x.dtype is not torch.int8:
        raise ValueError(f"{op}: x_scale has shape {list(x_scale.shape)}, but must be []")
    if out_scale is not None and out_scale.ndim:
        raise ValueError(f"{op}: out_scale has shape {list(out_scale.shape)}, but must be []")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{op}: bias has shape {list(bias.shape)}, but must be [{n}]")
    check_float("bias", bias)
    check_float("residual", residual)
    if out_scale is None:
        check_float("out", out)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation '{activation}' is unknown; use {', '.join(ACTIVATIONS)}")


def int8_product(
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
) -> None:
    """The product of codes [M, K] and weight [N, K], int8 on a GPU, into out [M, N]: by CUTLASS, whose tiles want rows
    in steps of 16 bytes, or else by Triton. x_scale: [] or [M]."""
    if (
        _C.with_cuda
        and codes.is_cuda
        and getattr(_C, "with_cutlass", False)
        and _C.int8_linear_fits_cuda(codes, weight, out)
    ):
        _C.int8_linear_cuda(codes, weight, x_scale, w_scale, bias, residual, activation, out_scale, out)
        return
    from lamina.kernels.int8_linear import int8_linear as launch

    launch(codes, x_scale, weight, w_scale, bias, activation, residual, out_scale, out)


def gpu_codes(x: Tensor, x_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows [M, K] on a GPU as int8 codes with adjacent columns, and their scale, [] or [M]."""
    if x.dtype is torch.int8:
        return x if x.stride(1) == 1 else x.contiguous(), x_scale
    from lamina.kernels.quantize_rows import quantize_rows as quantize

    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    quantize(x, x_scale, codes, scales)
    return codes, scales


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
    if data.ndim != 2 or data.dtype is not torch.int8 or data.shape[0] != scale.shape[0]:
        raise ValueError(
            f"int8_linear: packed_weight.data is {_dtype_name(data.dtype)} {list(data.shape)}, but on a GPU must be "
            f"int8 [{scale.shape[0]}, K], as move_int8_weight gives it"
        )
    if data.shape[1] != x.shape[1]:
        raise ValueError(f"int8_linear: x has {x.shape[1]} features, but packed_weight was packed for {data.shape[1]}")
    check_gpu_operands("int8_linear", x, data.shape[0], scale, bias, activation, residual, x_scale, out_scale, out)
    codes, x_scale = gpu_codes(x, x_scale)
    bias = None if bias is None else bias.contiguous()
    int8_product(codes, x_scale, data, scale, bias, activation, residual, out_scale, out)


call_int8_linear, traced_weight = define_int8_product("int8_linear", _C.int8_linear, _unpack, _cuda_kernel)


def int8_linear(
    x: Tensor,
    packed_weight: PackedInt8Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`activation(x @ weight.T + bias + residual)` with int8 arithmetic.

    Rows of `x` are quantized symmetrically to int8 as `quantize_rows` does, with a scale per row or the one given;
    products are summed exactly in int32; scales, bias, residual and activation are applied in float32 and the result is
    rounded once. A row of x that holds NaN or infinity gives NaN. The gradient for x, bias and residual is the
    straight-through one, as if nothing had been rounded or clamped; an int8 output has none.

    The sums, and everything before the activation, are the same bits on every instruction set, on GPUs, and for every
    number of threads; so are int8 outputs with activation None, "relu" or "relu6". Other activations differ between
    instruction sets within their error. On a GPU floats may be float16 too, and the values of scales are not checked.

    Args:
        x: [..., K] float32 or bfloat16, any strides; or int8 codes with their `x_scale`.
        packed_weight: from `pack_int8_weight` of a weight [N, K].
        bias: [N] float32 or bfloat16.
        activation: None, "relu", "relu6", "gelu" (exact GELU), "gelu_tanh", "quick_gelu" (x sigmoid(1.702 x)), "silu",
            "hardswish" or "tanh", within 3e-6, and exact beyond +-16.
        residual: [..., N] float32 or bfloat16, added before the activation.
        x_scale: float32. For a float x a scalar tensor []: the static scale of all rows, with codes clamped to
            [-127, 127]. For int8 x [], or x.shape[:-1] with one scale per row, from `quantize_rows`. A scalar must be
            finite and at least 1e-36.
        out_scale: float32 scalar tensor [], finite and at least 1e-36: the output is int8, round_half_even(y *
            (1 / out_scale)) clamped to [-127, 127], NaN as -127.
        out_dtype: torch.float32 or torch.bfloat16; by default x's dtype, float32 for int8 x.

    Returns [..., N] of out_dtype, or int8 with `out_scale`. Raises ValueError when shapes, dtypes or scales do not fit.

    >>> y = lamina.ops.int8_linear(x, lamina.ops.pack_int8_weight(linear.weight), linear.bias, activation="gelu")
    """
    return call_int8_linear(x, *packed_weight, bias, activation or "none", residual, x_scale, out_scale, out_dtype)
