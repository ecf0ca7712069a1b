"""int8_conv2d: a convolution with int8 weights; activations are quantized inside the op, or come in as codes."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.int8_linear import ACTIVATIONS, check_gpu_operands, plain_int8_weight
from lamina.ops.library import define
from lamina.quant.weights import dequantize_weight, quantize_weight


class PackedInt8ConvWeight(NamedTuple):
    """An int8 weight [N, C / groups, KH, KW] in the order the kernels read it; one layout for every instruction set.

    data: int8 [packed bytes]; scale: float32 [N], weight = code * scale; compensation: int32, sums of the weights and
    what they allow; size: (N, C / groups, KH, KW); groups. On a GPU data are the codes as [N, KH, KW, C / groups], and
    compensation, which they do not need, is empty.
    """

    data: Tensor
    scale: Tensor
    compensation: Tensor
    size: tuple[int, int, int, int]
    groups: int


def pack_int8_conv_weight(weight: Tensor, scale: Tensor | None = None, *, groups: int = 1) -> PackedInt8ConvWeight:
    """Pack a weight [N, C / groups, KH, KW] for `int8_conv2d`, or [N, C / groups, K] for `int8_conv1d`.

    `weight` is floating point and quantized per output channel here (symmetric, [-127, 127]), or int8 with its `scale`
    [N]. The packed weight lies where `weight` does, `move_int8_conv_weight` takes it elsewhere. Raises ValueError for
    NaN or infinite values or scales and for codes of -128.

    >>> packed = lamina.ops.pack_int8_conv_weight(torch.randn(64, 3, 7, 7))
    """
    if weight.ndim == 3:
        weight = weight.unsqueeze(2)
    if weight.ndim != 4:
        raise ValueError(f"pack_int8_conv_weight: weight has shape {list(weight.shape)}, but must be [N, C, KH, KW]")
    if not (weight.is_cpu or weight.is_cuda):
        raise ValueError(
            f"pack_int8_conv_weight: weight is on {weight.device}, but int8 kernels run on the CPU and on NVIDIA GPUs"
        )
    if weight.is_floating_point():
        if scale is not None:
            raise ValueError("pack_int8_conv_weight: scale goes with an int8 weight, but the weight is floating point")
        weight, scale = quantize_weight(weight.detach())
    elif scale is None:
        raise ValueError("pack_int8_conv_weight: an int8 weight needs its scale")
    if weight.is_cuda:
        return plain_int8_conv_weight(weight, scale, groups)
    size = tuple(weight.shape)
    packed = PackedInt8ConvWeight(
        data=torch.empty(_C.int8_conv2d_packed_size(size, groups), dtype=torch.int8),
        scale=scale.detach().to(torch.float32).contiguous().clone(),
        compensation=torch.empty(_C.int8_conv2d_compensation_size(size, groups), dtype=torch.int32),
        size=size,
        groups=groups,
    )
    _C.int8_conv2d_pack(weight.contiguous(), packed.scale, groups, packed.data, packed.compensation)
    return packed


def unpack_int8_conv_weight(packed: PackedInt8ConvWeight) -> Tensor:
    """The int8 codes [N, C / groups, KH, KW] of a packed weight."""
    return _unpack(packed.data, packed.size, packed.groups)


def plain_int8_conv_weight(codes: Tensor, scale: Tensor, groups: int) -> PackedInt8ConvWeight:
    """Codes [N, C / groups, KH, KW] and their scale [N] in the layout of GPUs: `pack_int8_conv_weight` of a weight that
    lies on one."""
    n = codes.shape[0]
    if groups < 1 or n % groups:
        raise ValueError(
            f"int8_conv2d_pack: groups is {groups}, but must be positive and divide the {n} output channels"
        )
    flat = plain_int8_weight(codes.permute(0, 2, 3, 1).flatten(1), scale)
    data = flat.data.reshape(n, *codes.shape[2:], codes.shape[1])
    return PackedInt8ConvWeight(data, flat.scale, flat.compensation, tuple(codes.shape), groups)


def move_int8_conv_weight(packed: PackedInt8ConvWeight, device: torch.device | str) -> PackedInt8ConvWeight:
    """A packed weight on `device`, in the form that the kernels there read: on a GPU the codes [N, KH, KW, C / groups].

    Between the CPU and a GPU it is packed anew, from the same codes; elsewhere it is copied.

    >>> packed = lamina.ops.move_int8_conv_weight(packed, "cuda")
    """
    device, plain = torch.device(device), packed.data.ndim == 4
    if device.type == "cpu" and plain:
        return pack_int8_conv_weight(unpack_int8_conv_weight(packed).cpu(), packed.scale.cpu(), groups=packed.groups)
    if device.type == "cuda" and not plain:
        packed = plain_int8_conv_weight(unpack_int8_conv_weight(packed), packed.scale, packed.groups)
    data, scale, compensation = (t.to(device) for t in packed[:3])
    return PackedInt8ConvWeight(data, scale, compensation, packed.size, packed.groups)


def _unpack(data: Tensor, size: Sequence[int], groups: int) -> Tensor:
    if data.ndim == 4:
        return data.permute(0, 3, 1, 2).contiguous()
    weight = torch.empty(tuple(size), dtype=torch.int8)
    _C.int8_conv2d_unpack(data, groups, weight)
    return weight


def _pixels_together(t: Tensor, rows_too: bool = False) -> Tensor:
    """t [images, channels, height, width] with the channels of a pixel side by side, or, `rows_too`, the columns of a
    row: itself where it is."""
    if t.is_contiguous(memory_format=torch.channels_last):
        return t
    if t.shape[1] == 1 or t.stride(1) == 1 or (rows_too and (t.shape[3] == 1 or t.stride(3) == 1)):
        return t
    return t.contiguous(memory_format=torch.channels_last)


def _out_shape(x: Sequence[int], size: Sequence[int], stride, padding, dilation) -> tuple:
    images, _, height, width = x
    n, _, window_y, window_x = size
    (top, bottom, left, right), (step_y, step_x), (tap_y, tap_x) = padding, stride, dilation
    out_height = (height + top + bottom - tap_y * (window_y - 1) - 1) // step_y + 1
    out_width = (width + left + right - tap_x * (window_x - 1) - 1) // step_x + 1
    return images, n, out_height, out_width


def _out_dtype(x: Tensor, out_scale: Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype:
    if out_scale is not None:
        if out_dtype is not None:
            raise ValueError(
                f"int8_conv2d: out_dtype {out_dtype} goes with a float output, but out_scale asks for int8"
            )
        return torch.int8
    if out_dtype is None:
        return torch.float32 if x.dtype is torch.int8 else x.dtype
    return out_dtype


@functools.lru_cache(maxsize=4096)
def _output(
    x: tuple[int, ...],
    size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of the output for an input of shape `x`; remembered: a layer asks for the same every time.

    Checks what must hold before an output can be allocated; the compiled op checks the rest.
    """
    if len(x) != 4:
        raise ValueError(
            f"int8_conv2d: x has shape {list(x)}, but must be [images, channels, height, width] or [channels, "
            "height, width]"
        )
    for name, values in (("stride", stride), ("dilation", dilation)):
        if len(values) != 2 or min(values) < 1:
            raise ValueError(f"int8_conv2d: {name} is {list(values)}, but must be two positive numbers")
    if len(padding) != 4 or min(padding) < 0:
        raise ValueError(
            f"int8_conv2d: padding is {list(padding)}, but must be top, bottom, left and right, none below 0"
        )
    if len(size) != 4 or min(size[2:]) < 1:
        raise ValueError(f"int8_conv2d: the weight's size is {list(size)}, but must be [N, C, KH, KW] with taps")
    for i in range(2):
        room = x[2 + i] + padding[2 * i] + padding[2 * i + 1]
        window = dilation[i] * (size[2 + i] - 1) + 1
        if room < window:
            raise ValueError(
                f"int8_conv2d: the padded input has {room} {('rows', 'columns')[i]}, but the kernel covers {window}"
            )
    shape = _out_shape(x, size, stride, padding, dilation)
    _, n, height, width = shape
    return shape, (height * width * n, 1, width * n, n)


def _cpu(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    size: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    unbatched = x.ndim == 3
    if unbatched:
        x = x.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
    shape, strides = _output(x.shape, tuple(size), tuple(stride), tuple(padding), tuple(dilation))
    out = torch.empty_strided(shape, strides, dtype=_out_dtype(x, out_scale, out_dtype), device=x.device)
    if residual is not None:
        if residual.shape != shape:
            shown = slice(1, None) if unbatched else slice(None)
            raise ValueError(
                f"int8_conv2d: residual has shape {list(residual.shape[shown])}, but must be "
                f"{list(shape[shown])} like the output"
            )
        residual = _pixels_together(residual)
    _C.int8_conv2d(
        _pixels_together(x, rows_too=True),
        data,
        scale,
        compensation,
        size,
        bias,
        stride,
        padding,
        dilation,
        groups,
        activation,
        residual,
        residual_scale,
        x_scale,
        out_scale,
        out,
    )
    return out.squeeze(0) if unbatched else out


def _check_gpu_operands(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    size: Sequence[int],
    bias: Tensor | None,
    groups: int,
    activation: str,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    x_scale: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
) -> None:
    """What the CPU checks in csrc/ops/int8_conv2d.cpp, but for the values of scales: a GPU would have to be waited
    for."""
    n, c, kh, kw = size
    if tuple(data.shape) != (n, kh, kw, c) or data.dtype is not torch.int8:
        raise ValueError(
            f"int8_conv2d: packed_weight.data is {data.dtype} {list(data.shape)}, but on a GPU must be int8 "
            f"{[n, kh, kw, c]}, as move_int8_conv_weight gives it"
        )
    if x.shape[1] != c * groups:
        raise ValueError(f"int8_conv2d: x has {x.shape[1]} channels, but packed_weight was packed for {c * groups}")
    if x_scale is not None and x_scale.ndim and (x.dtype is not torch.int8 or x_scale.shape != x.shape[:1]):
        wanted = f"[] or [{x.shape[0]}]" if x.dtype is torch.int8 else "[]"
        raise ValueError(f"int8_conv2d: x_scale has shape {list(x_scale.shape)}, but must be {wanted}")
    floats = residual if residual is None or residual.dtype is not torch.int8 else None
    rows = x.new_empty(0, 0)  # how many channels there may be has been told when the weight was packed
    check_gpu_operands("int8_conv2d", rows, n, scale, bias, activation, floats, x_scale, out_scale, out)
    if (residual is not None and residual.dtype is torch.int8) != (residual_scale is not None):
        raise ValueError(
            "int8_conv2d: a residual of int8, and only that, goes with residual_scale, which says what its codes mean"
        )
    if residual_scale is not None and (residual_scale.ndim or residual_scale.dtype is not torch.float32):
        raise ValueError(
            f"int8_conv2d: residual_scale is {residual_scale.dtype} {list(residual_scale.shape)}, but must be float32 "
            "[]"
        )


def _cuda(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    size: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    from lamina.kernels.int8_conv2d import int8_conv2d as launch
    from lamina.kernels.int8_conv2d import quantize_pixels

    if x.ndim == 3:
        residual = None if residual is None else residual.unsqueeze(0)
        geometry = size, bias, stride, padding, dilation, groups, activation
        scales = residual_scale, x_scale, out_scale, out_dtype
        return _cuda(x.unsqueeze(0), data, scale, compensation, *geometry, residual, *scales).squeeze(0)
    shape, strides = _output(x.shape, tuple(size), tuple(stride), tuple(padding), tuple(dilation))
    out = torch.empty_strided(shape, strides, dtype=_out_dtype(x, out_scale, out_dtype), device=x.device)
    if residual is not None and residual.shape != out.shape:
        raise ValueError(
            f"int8_conv2d: residual has shape {list(residual.shape)}, but must be {list(out.shape)} like the output"
        )
    _check_gpu_operands(
        x, data, scale, size, bias, groups, activation, residual, residual_scale, x_scale, out_scale, out
    )
    images, channels, height, width = x.shape
    if x.dtype is torch.int8:
        codes = _pixels_together(x).permute(0, 2, 3, 1)
    else:
        codes = torch.empty((images, height, width, channels), dtype=torch.int8, device=x.device)
        scales = torch.empty(images, dtype=torch.float32, device=x.device)
        quantize_pixels(x, x_scale, codes, scales)
        x_scale = scales
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1).contiguous()
    launch(
        codes,
        x_scale,
        data,
        scale,
        None if bias is None else bias.contiguous(),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        activation,
        residual,
        residual_scale,
        out_scale,
        out.permute(0, 2, 3, 1),
    )
    return out


def _fake(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    size: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    torch._check(x.ndim in (3, 4), lambda: f"int8_conv2d: x has {x.ndim} dimensions, but must have 3 or 4")
    known = x.dtype in (torch.float32, torch.bfloat16, torch.int8) or (x.dtype is torch.float16 and not x.is_cpu)
    torch._check(known, lambda: f"int8_conv2d: x is {x.dtype}")
    batched = x if x.ndim == 4 else x.unsqueeze(0)
    shape = _out_shape(batched.shape, size, stride, padding, dilation)
    dtype = _out_dtype(x, out_scale, out_dtype)
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    return out if x.ndim == 4 else out.squeeze(0)


_op = define(
    "int8_conv2d(Tensor x, Tensor data, Tensor scale, Tensor compensation, int[] size, Tensor? bias, int[] stride, "
    "int[] padding, int[] dilation, int groups, str activation, Tensor? residual=None, Tensor? residual_scale=None, "
    "Tensor? x_scale=None, Tensor? out_scale=None, ScalarType? out_dtype=None) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)


def _input_gradient(
    grad: Tensor,
    data: Tensor,
    scale: Tensor,
    size: Sequence[int],
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """What the input sees of the gradient behind the sums: the dequantized weight."""
    if grad.ndim == 3:
        whole = _input_gradient(
            grad.unsqueeze(0), data, scale, size, (1, *input_shape), stride, padding, dilation, groups
        )
        return whole.squeeze(0)
    weight = dequantize_weight(_unpack(data, size, groups), scale).to(grad.dtype)
    images, channels, height, width = input_shape
    top, bottom, left, right = padding
    padded = (images, channels, height + top + bottom, width + left + right)
    whole = torch.nn.grad.conv2d_input(padded, weight, grad, tuple(stride), 0, tuple(dilation), groups)
    return whole[..., top : top + height, left : left + width].contiguous()


def _backward_fake(grad, data, scale, size, input_shape, stride, padding, dilation, groups) -> Tensor:
    return grad.new_empty(input_shape)


_backward_op = define(
    "int8_conv2d_backward(Tensor grad, Tensor data, Tensor scale, int[] size, SymInt[] input_shape, int[] stride, "
    "int[] padding, int[] dilation, int groups) -> Tensor",
    cpu=_input_gradient,
    fake=_backward_fake,
    cuda=_input_gradient,
)


def traced_conv_weight(packed: PackedInt8ConvWeight) -> Tensor:
    """The dequantized weight [N, C / groups, KH, KW], float32, by an op that graphs can hold: the gradient of an input
    as large as the kernel, for one output after the other."""
    n, c, kh, kw = packed.size
    one = torch.eye(n, device=packed.data.device).reshape(n, n, 1, 1)
    shape = [n, c * packed.groups, kh, kw]
    whole = _backward_op(
        one, packed.data, packed.scale, list(packed.size), shape, [1, 1], [0, 0, 0, 0], [1, 1], packed.groups
    )
    every = torch.arange(n, device=packed.data.device)
    return whole.reshape(n, packed.groups, c, kh, kw)[every, every // (n // packed.groups)]


class _WithGradient(torch.autograd.Function):
    """The straight-through gradient: rounding and clamping count as the identity; x sees the dequantized weight."""

    @staticmethod
    def forward(
        ctx,
        x,
        data,
        scale,
        compensation,
        size,
        bias,
        geometry,
        activation,
        residual,
        residual_scale,
        x_scale,
        out_dtype,
    ):
        again = (compensation, bias, residual, x_scale) if activation != "none" else (None, bias, None, None)
        ctx.save_for_backward(x, data, scale, residual_scale, *again)
        ctx.activation, ctx.size, ctx.geometry = activation, size, geometry
        ctx.residual_dtype = None if residual is None else residual.dtype
        return _op(
            x,
            data,
            scale,
            compensation,
            size,
            bias,
            *geometry,
            activation,
            residual,
            residual_scale,
            x_scale,
            None,
            out_dtype,
        )

    @staticmethod
    def backward(ctx, grad):
        x, data, scale, residual_scale, compensation, bias, residual, x_scale = ctx.saved_tensors
        if ctx.activation != "none":
            before = _op(
                x,
                data,
                scale,
                compensation,
                ctx.size,
                bias,
                *ctx.geometry,
                "none",
                residual,
                residual_scale,
                x_scale,
                None,
                grad.dtype,
            )
            grad = ACTIVATIONS[ctx.activation](grad, before)
        needs = ctx.needs_input_grad
        x_grad = None
        if needs[0]:
            x_grad = _backward_op(grad, data, scale, ctx.size, x.shape, *ctx.geometry).to(x.dtype)
        bias_grad = grad.sum((0, 2, 3)).to(bias.dtype) if needs[5] else None
        residual_grad = grad.to(ctx.residual_dtype) if needs[8] else None
        return x_grad, None, None, None, None, bias_grad, None, None, residual_grad, None, None, None


def call_int8_conv2d(
    x: Tensor,
    packed: PackedInt8ConvWeight,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The op on pairs of numbers (padding: top, bottom, left, right), with a gradient where one is asked for."""
    data, scale, compensation, size, groups = packed
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    if (
        torch.is_grad_enabled()
        and out_scale is None
        and (
            x.requires_grad
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )
    ):
        unbatched = x.ndim == 3
        if unbatched:
            x, residual = x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
        out = _WithGradient.apply(
            x,
            data,
            scale,
            compensation,
            size,
            bias,
            geometry,
            activation,
            residual,
            residual_scale,
            x_scale,
            out_dtype,
        )
        return out.squeeze(0) if unbatched else out
    return _op(
        x,
        data,
        scale,
        compensation,
        size,
        bias,
        *geometry,
        activation,
        residual,
        residual_scale,
        x_scale,
        out_scale,
        out_dtype,
    )


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) == 1:
        return value[0], value[0]
    if len(value) != 2:
        raise ValueError(f"int8_conv2d: {name} is {tuple(value)}, but must be one or two numbers")
    return value[0], value[1]


def four_paddings(
    padding: int | str | Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """nn.Conv2d's padding as top, bottom, left, right. "same" puts the odd one at the end, as torch does."""
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if max(stride) != 1:
            raise ValueError(f"int8_conv2d: padding 'same' goes with stride 1, not {tuple(stride)}")
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    if isinstance(padding, str):
        raise ValueError(f"int8_conv2d: padding '{padding}' is unknown; use 'same', 'valid' or numbers")
    y, x = _pair("padding", padding)
    return y, y, x, x


def int8_conv2d(
    x: Tensor,
    packed_weight: PackedInt8ConvWeight,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`activation(conv2d(x, weight) + bias + residual)` with int8 arithmetic; `groups` is the packed weight's.

    `x` is quantized symmetrically to int8, with the static scale given or with max|x| / 127 of each image: what else is
    in the batch never changes a result. Products are summed exactly in int32; scales, bias, residual and activation are
    applied in float32 and the result is rounded once. An image that holds NaN or infinity gives NaN. The gradient for
    x, bias and residual is the straight-through one, as if nothing had been rounded or clamped; an int8 output has
    none.

    Results lie in memory as torch.channels_last, and so should x: then int8 codes without padded columns are used in
    place. Contiguous x is turned round while it is quantized; other strides are copied first.

    The sums, and everything before the activation, are the same bits on every instruction set and for every number of
    threads; so are int8 outputs with activation None, "relu" or "relu6". GPUs give these bits too; there floats may be
    float16, and the values of scales are not checked.

    Args:
        x: [images, channels, height, width] or [channels, height, width], float32 or bfloat16; or int8 codes with their
            `x_scale`.
        packed_weight: from `pack_int8_conv_weight` of a weight [N, channels / groups, KH, KW].
        bias: [N] float32 or bfloat16.
        stride, padding, dilation: as in torch.nn.functional.conv2d; padding also "same" or "valid".
        activation: None, "relu", "relu6", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "hardswish" or
            "hardsigmoid".
        residual: shape of the output, added before the activation: float32, bfloat16, or int8 with its
            `residual_scale`.
        residual_scale, x_scale, out_scale: float32 scalar tensors [], finite and at least 1e-36; for int8 x also
            [images]. With `out_scale` the output is int8: y / out_scale, rounded half to even and clamped to +-127.
        out_dtype: torch.float32 or torch.bfloat16; by default x's dtype, float32 for int8 x.

    Returns [images, N, ...] of out_dtype, or int8 with `out_scale`. Raises ValueError when shapes, dtypes or scales do
    not fit, and when x_scale times a weight's scale overflows float32.

    >>> packed = lamina.ops.pack_int8_conv_weight(conv.weight)
    >>> y = lamina.ops.int8_conv2d(x, packed, conv.bias, padding=1, activation="relu")
    """
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    padding = four_paddings(padding, packed_weight.size[2:], stride, dilation)
    return call_int8_conv2d(
        x,
        packed_weight,
        bias,
        stride,
        padding,
        dilation,
        activation or "none",
        residual,
        residual_scale,
        x_scale,
        out_scale,
        out_dtype,
    )


def int8_conv1d(
    x: Tensor,
    packed_weight: PackedInt8ConvWeight,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`int8_conv2d` of images one row high: x [batch, channels, length] or [channels, length], weight [N, C, K].

    >>> y = lamina.ops.int8_conv1d(x, lamina.ops.pack_int8_conv_weight(conv.weight), conv.bias, stride=2)
    """
    along = [each if isinstance(each, int | str) else each[0] for each in (stride, padding, dilation)]
    y = int8_conv2d(
        x.unsqueeze(-2),
        packed_weight,
        bias,
        (1, along[0]),
        along[1] if isinstance(along[1], str) else (0, along[1]),
        (1, along[2]),
        activation=activation,
        residual=None if residual is None else residual.unsqueeze(-2),
        residual_scale=residual_scale,
        x_scale=x_scale,
        out_scale=out_scale,
        out_dtype=out_dtype,
    )
    return y.squeeze(-2)


class PackedInt8ConvTransposeWeight(NamedTuple):
    """An int8 weight of a transposed convolution: the packed weight of a plain one that gives all of its phases.

    conv: [N * strides, C / groups, KH', KW']; kernel_size, stride, dilation: of the transposed convolution.
    """

    conv: PackedInt8ConvWeight
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]


def _spread(weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """A kernel [..., KH, KW] with zeros between its taps and behind them, until its sizes are multiples of the stride.

    With stride 1 the plain convolution has the dilation itself.
    """
    if max(stride) == 1:
        return weight
    for dim, (step, every) in enumerate(zip(dilation, stride, strict=True), start=-2):
        size = (weight.shape[dim] - 1) * step + 1
        shape = list(weight.shape)
        shape[dim] = -(-size // every) * every
        wide = weight.new_zeros(shape)
        index = [slice(None)] * weight.ndim
        index[dim] = slice(0, size, step)
        wide[tuple(index)] = weight
        weight = wide
    return weight


def _phases(weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """[C, N / groups, KH, KW] -> [N * strides, C / groups, KH', KW'], with the output's phase inside the channel.

    Output row t = stride * q + r sees input row q - j through tap stride * j + r: for each r a plain convolution.
    """
    weight = _spread(weight, stride, dilation)
    c, n, kh, kw = weight.shape
    sy, sx = stride
    split = weight.reshape(groups, c // groups, n, kh // sy, sy, kw // sx, sx).flip(3, 5)
    return split.permute(0, 2, 4, 6, 1, 3, 5).reshape(groups * n * sy * sx, c // groups, kh // sy, kw // sx)


def pack_int8_conv_transpose_weight(
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> PackedInt8ConvTransposeWeight:
    """Pack a weight [C, N / groups, KH, KW] for `int8_conv_transpose2d`; float, or int8 with its scale [N].

    >>> packed = lamina.ops.pack_int8_conv_transpose_weight(conv.weight, stride=2)
    """
    if weight.ndim != 4 or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"pack_int8_conv_transpose_weight: weight has shape {list(weight.shape)}, but must be [C, N / groups, KH, "
            f"KW] with C a multiple of groups, {groups}"
        )
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    c, n, *kernel = weight.shape
    if weight.is_floating_point():
        if scale is not None:
            raise ValueError(
                "pack_int8_conv_transpose_weight: scale goes with an int8 weight, but the weight is floating point"
            )
        # Output channels first, for the scales.
        turned = weight.detach().reshape(groups, c // groups, n, *kernel).transpose(1, 2).flatten(0, 1)
        codes, scale = quantize_weight(turned)
        weight = codes.reshape(groups, n, c // groups, *kernel).transpose(1, 2).reshape(c, n, *kernel)
    elif scale is None:
        raise ValueError("pack_int8_conv_transpose_weight: an int8 weight needs its scale")
    phases = _phases(weight, stride, dilation, groups)
    conv = pack_int8_conv_weight(phases, scale.repeat_interleave(stride[0] * stride[1]), groups=groups)
    return PackedInt8ConvTransposeWeight(conv, tuple(kernel), stride, dilation)


def from_phases(weight: Tensor, packed: PackedInt8ConvTransposeWeight) -> Tensor:
    """The weight [C, N / groups, KH, KW] of the plain convolution's, codes or floats: the inverse of `_phases`."""
    (sy, sx), groups = packed.stride, packed.conv.groups
    n, c, jy, jx = packed.conv.size
    split = weight.reshape(groups, n // groups // sy // sx, sy, sx, c, jy, jx)
    wide = split.permute(0, 4, 1, 5, 2, 6, 3).flip(3, 5).reshape(groups * c, -1, jy * sy, jx * sx)
    if max(packed.stride) > 1:
        ends = [(k - 1) * d + 1 for k, d in zip(packed.kernel_size, packed.dilation, strict=True)]
        wide = wide[:, :, : ends[0] : packed.dilation[0], : ends[1] : packed.dilation[1]]
    return wide.contiguous()


def unpack_int8_conv_transpose_weight(packed: PackedInt8ConvTransposeWeight) -> tuple[Tensor, Tensor]:
    """The int8 codes [C, N / groups, KH, KW] and their scale [N]."""
    phases = packed.stride[0] * packed.stride[1]
    return from_phases(unpack_int8_conv_weight(packed.conv), packed), packed.conv.scale[::phases].clone()


def int8_conv_transpose2d(
    x: Tensor,
    packed_weight: PackedInt8ConvTransposeWeight,
    bias: Tensor | None = None,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    *,
    activation: str | None = None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`activation(conv_transpose2d(x, weight) + bias)` with int8 arithmetic; stride, dilation and groups are the packed
    weight's.

    One `int8_conv2d` with stride 1 computes all phases of the stride as channels; they are then put between each other.

    Args as in `int8_conv2d` and torch.nn.functional.conv_transpose2d. Returns [images, N, ...], channels_last.

    >>> y = lamina.ops.int8_conv_transpose2d(x, lamina.ops.pack_int8_conv_transpose_weight(weight, stride=2), bias)
    """
    conv, kernel, stride, dilation = packed_weight
    padding, output_padding = _pair("padding", padding), _pair("output_padding", output_padding)
    if x.ndim == 3:
        out = int8_conv_transpose2d(
            x.unsqueeze(0),
            packed_weight,
            bias,
            padding,
            output_padding,
            activation=activation,
            x_scale=x_scale,
            out_scale=out_scale,
            out_dtype=out_dtype,
        )
        return out.squeeze(0)
    steps = dilation if max(stride) == 1 else (1, 1)
    sizes, around = [], []
    for i in range(2):
        size = (x.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + output_padding[i] + 1
        if size < 1:
            raise ValueError(f"int8_conv_transpose2d: the output would have {size} {('rows', 'columns')[i]}")
        last = (padding[i] + size - 1) // stride[i]
        around += [(conv.size[2 + i] - 1) * steps[i], max(0, last + 1 - x.shape[2 + i])]
        sizes.append(size)
    phases = stride[0] * stride[1]
    y = call_int8_conv2d(
        x,
        conv,
        bias if bias is None or phases == 1 else bias.repeat_interleave(phases),
        (1, 1),
        around,
        steps,
        activation or "none",
        x_scale=x_scale,
        out_scale=out_scale,
        out_dtype=out_dtype,
    )
    if phases > 1:
        images, channels, height, width = y.shape
        split = y.reshape(images, channels // phases, *stride, height, width).permute(0, 4, 2, 5, 3, 1)
        y = split.reshape(images, height * stride[0], width * stride[1], channels // phases).permute(0, 3, 1, 2)
    y = y[:, :, padding[0] : padding[0] + sizes[0], padding[1] : padding[1] + sizes[1]]
    return y.contiguous(memory_format=torch.channels_last)
