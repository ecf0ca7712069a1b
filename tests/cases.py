"""The shapes somebody cares about, as data: sizes where kernels change their path, and layouts that models produce.

`SUITES[op]` has the cases of an op of torch.ops.lamina, its float64 truth and how its result is judged. A new op gets a
function `<op>_suite` here; the generic tests find it by the op's name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import tolerances
import torch
from torch import Tensor
from torch.nn import functional as F

import lamina
from lamina.ops.elementwise import elementwise_program, instructions
from lamina.reference.attention import attention as attention_reference
from lamina.reference.attention_backward import attention_backward as attention_backward_reference
from lamina.reference.attention_decode import attention_decode as attention_decode_reference
from lamina.reference.attention_varlen import attention_varlen as attention_varlen_reference
from lamina.reference.concatenate import concatenate as concatenate_reference
from lamina.reference.conv2d import conv2d as conv2d_reference
from lamina.reference.copy import copy as copy_reference
from lamina.reference.elementwise import elementwise as elementwise_reference
from lamina.reference.embedding import embedding as embedding_reference
from lamina.reference.group_norm import group_norm as group_norm_reference
from lamina.reference.gru import gru as gru_reference
from lamina.reference.int8_conv2d import int8_conv2d as int8_conv2d_reference
from lamina.reference.int8_conv2d import quantize_images
from lamina.reference.int8_gru import int8_gru as int8_gru_reference
from lamina.reference.int8_linear import int8_linear as int8_linear_reference
from lamina.reference.int8_linear import requantize
from lamina.reference.int8_lstm import int8_lstm as int8_lstm_reference
from lamina.reference.int8_pool2d import int8_pool2d as int8_pool2d_reference
from lamina.reference.layer_norm import layer_norm as layer_norm_reference
from lamina.reference.linear import linear as linear_reference
from lamina.reference.lstm import lstm as lstm_reference
from lamina.reference.pool2d import pool2d as pool2d_reference
from lamina.reference.quantize_rows import quantize_rows as quantize_rows_reference
from lamina.reference.reduce import REDUCTIONS
from lamina.reference.reduce import reduce as reduce_reference
from lamina.reference.rms_norm import rms_norm as rms_norm_reference
from lamina.reference.rnn_relu import rnn_relu as rnn_relu_reference
from lamina.reference.rnn_tanh import rnn_tanh as rnn_tanh_reference
from lamina.reference.softmax import softmax as softmax_reference
from lamina.reference.sparse_conv2d import sparse_conv2d as sparse_conv2d_reference
from lamina.reference.sparse_linear import sparse_linear as sparse_linear_reference
from lamina.reference.token_panels import token_panels as token_panels_reference
from lamina.reference.weight_only_linear import dequantize
from lamina.reference.weight_only_linear import weight_only_linear as weight_only_linear_reference


@dataclass(frozen=True)
class Case:
    """One call of an op. `make(generator)` gives the arguments of torch.ops.lamina.<op>, the same for the same seed.

    tags: "empty", "one", "odd" (primes, block +-1), "strided", "bf16", "nd" (not the usual number of dimensions),
    "threads" (large enough to be shared out).
    """

    id: str
    make: Callable[[torch.Generator], tuple]
    tags: frozenset[str]

    def inputs(self, seed: int = 0) -> tuple:
        return self.make(torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Suite:
    """All cases of an op. truth(*inputs) is float64; check(actual, inputs) raises if `actual` is not close enough.

    own_kernel: whether lamina's kernels compute it, which give the same bits for every layout, ISA and thread count.
        An op that calls torch's matrix product inside can promise only what torch does.
    """

    op: str
    cases: tuple[Case, ...]
    truth: Callable[..., Tensor | tuple[Tensor, ...]]
    check: Callable[[Tensor | tuple[Tensor, ...], tuple], None]
    own_kernel: bool = True

    def case(self, case_id: str) -> Case:
        return next(case for case in self.cases if case.id == case_id)


# -- layouts: the same values, lying differently in memory

# "misaligned" starts one element past a 64-byte boundary.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.mT.contiguous().mT,
    "heads_inside": lambda t: t.transpose(-3, -2).contiguous().transpose(-3, -2),
    "misaligned": lambda t: _shifted(t),
    "sliced": lambda t: _inside(t, [(1, 2)] * (t.ndim - 1) + [(3, 2)]),
    "every_second": lambda t: _every(t, 2),
    "every_third": lambda t: _every(t, 3),
    "rows_repeated": lambda t: t[..., :1, :].expand_as(t),
    "columns_repeated": lambda t: t[..., :1].expand_as(t),
    "batch_repeated": lambda t: t[:1].expand_as(t),
}

# Memory around a slice is NaN: reading it shows.
_OUTSIDE = math.nan


def _inside(t: Tensor, margins: list[tuple[int, int]]) -> Tensor:
    """A slice of a larger tensor whose other elements are NaN."""
    whole = torch.full([size + low + high for size, (low, high) in zip(t.shape, margins, strict=True)], _OUTSIDE).to(
        t.dtype
    )
    view = whole
    for dim, (low, _) in enumerate(margins):
        view = view.narrow(dim, low, t.shape[dim])
    view.copy_(t)
    return view


def _shifted(t: Tensor) -> Tensor:
    """Contiguous, but starting one element into its storage and ending one before its end."""
    whole = torch.full((t.numel() + 2,), _OUTSIDE).to(t.dtype)
    view = whole[1:-1].view(t.shape)
    view.copy_(t)
    return view


def _every(t: Tensor, step: int) -> Tensor:
    """The last stride is `step`."""
    whole = torch.full((*t.shape[:-1], max(t.shape[-1] * step - 1, 0)), _OUTSIDE).to(t.dtype)
    view = whole[..., ::step]
    view.copy_(t)
    return view


# -- int8_linear


def _int8_linear_case(
    *lead: int,
    k: int,
    n: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    bias: torch.dtype | None = torch.float32,
    bias_step: int = 1,
    activation: str = "none",
    residual: torch.dtype | None = None,
    x_scale: str | None = None,
    out: torch.dtype | None = None,
    tags: str = "",
) -> Case:
    """x_scale: "static" for one scale of a float x that clamps a few codes; "codes" and "static_codes" for an int8 x
    with a scale per row and with one for all. out: the output's dtype, int8 with an out_scale."""

    def make(generator: torch.Generator) -> tuple:
        # Outputs of a few units, so that one rounding of bfloat16 stays below them at every k.
        x = 8 * torch.randn(*lead, k, generator=generator) / max(k, 1) ** 0.25
        weight = torch.randn(n, k, generator=generator) / max(k, 1) ** 0.25
        b = None
        if bias is not None:
            b = 4 * torch.randn(n * bias_step, generator=generator).to(bias)[::bias_step]
        x, scales = x.to(dtype), None
        if x_scale is not None:
            largest = x.float().abs().max() if x.numel() else torch.tensor(1.0)
            scales = largest / 127 if x_scale == "static_codes" else largest / 150
            if x_scale != "static":
                x, scales = quantize_rows_reference(x, scales if x_scale == "static_codes" else None)
                scales = scales.flatten()[0] if x_scale == "static_codes" and scales.numel() else scales
        # Before the tensors of the epilogue, so that they do not change what the others are.
        arguments = LAYOUTS[layout](x), *lamina.ops.pack_int8_weight(weight), b, activation
        if (residual, x_scale, out) == (None, None, None):
            return arguments
        r = None
        if residual is not None:
            r = LAYOUTS[layout]((4 * torch.randn(*lead, n, generator=generator)).to(residual))
        to_int8 = out is torch.int8
        return *arguments, r, scales, torch.tensor(0.11) if to_int8 else None, None if to_int8 else out

    name = f"{'x'.join(map(str, lead)) or 'vector'}-k{k}-n{n}"
    if dtype is torch.bfloat16:
        name += "-bf16"
    name += f"-{layout}" if layout != "contiguous" else ""
    name += {None: "-nobias", torch.float32: "", torch.bfloat16: "-bf16bias"}[bias]
    name += "-stridedbias" if bias_step > 1 else ""
    name += f"-{activation}" if activation != "none" else ""
    name += f"-residual_{_short(residual)}" if residual else ""
    name += f"-{x_scale}" if x_scale else ""
    name += f"-to_{_short(out)}" if out else ""
    words = set(tags.split())
    if 0 in (*lead, k, n):
        words.add("empty")
    if layout != "contiguous" or bias_step > 1:
        words.add("strided")
    if dtype is torch.bfloat16:
        words.add("bf16")
    if len(lead) != 1:
        words.add("nd")
    return Case(name, make, frozenset(words))


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "int8"}[dtype]


def _int8_linear_cases() -> list[Case]:
    case = _int8_linear_case
    f32, bf16, int8 = torch.float32, torch.bfloat16, torch.int8
    activations = [name for name in tolerances.ACTIVATION_SLOPE if name != "none"]
    cases = [
        case(0, k=8, n=8),
        case(3, k=0, n=5),
        case(3, k=8, n=0),
        case(0, k=0, n=0, bias=None),
        case(2, 0, 3, k=4, n=4),
        case(2, 3, k=0, n=4),
        case(1, k=1, n=1, tags="one"),
        case(1, k=300, n=1, tags="one"),
        case(1, k=1, n=300, tags="one"),
        case(7, k=1, n=1, bias=None, tags="one"),
        case(k=17, n=19, tags="odd"),
        case(k=0, n=3),
        case(2, 3, k=24, n=10),
        case(2, 3, 5, k=24, n=10, dtype=bf16),
        case(1, 1, 1, 4, k=12, n=20),
        case(2, 5, k=20, n=9, layout="transposed"),
        case(2, 5, k=20, n=9, layout="sliced"),
        case(4, 3, k=20, n=9, layout="batch_repeated"),
        case(2, 3, 4, k=6, n=33, layout="heads_inside"),
        # Rows: tiles of 6 (AVX-512) and 4 (AVX2) and one more or less.
        *(case(m, k=20, n=24, tags="odd") for m in (2, 3, 4, 5, 6, 7, 11, 12, 13)),
        # Channels: registers of 4, 8 and 16, panels of 64.
        *(case(5, k=20, n=n, tags="odd") for n in (3, 7, 15, 16, 17, 31, 48, 49, 63, 64, 65, 127, 129, 193)),
        # Inputs: groups of 4, registers of 4, 8 and 16, unrolled blocks of 16 and 64.
        *(
            case(5, k=k, n=21, tags="odd")
            for k in (2, 3, 4, 5, 7, 9, 13, 15, 16, 17, 31, 33, 61, 63, 64, 65, 67, 127, 129)
        ),
        *(case(5, k=k, n=21, dtype=bf16, tags="odd") for k in (1, 3, 7, 15, 16, 17, 63, 65)),
        *(
            case(7, k=37, n=41, dtype=bf16, layout=name)
            for name in ("transposed", "misaligned", "sliced", "every_third")
        ),
        *(
            case(7, k=37, n=41, layout=name)
            for name in LAYOUTS
            if name not in ("contiguous", "heads_inside", "batch_repeated")
        ),
        case(130, k=67, n=19, layout="transposed", tags="odd"),
        *(case(5, k=33, n=70, activation=a) for a in activations),
        *(case(5, k=33, n=70, activation=a, dtype=bf16, bias=bf16) for a in activations),
        case(5, k=33, n=70, bias=None),
        case(5, k=33, n=70, bias=bf16),
        case(5, k=33, n=70, bias_step=2),
        case(5, k=33, n=70, bias=bf16, bias_step=3),
        # The epilogue's other ends: residual, scales from outside, output formats.
        case(7, k=33, n=70, residual=f32),
        case(7, k=33, n=70, residual=bf16, activation="relu"),
        case(7, k=33, n=70, residual=f32, dtype=bf16, activation="gelu"),
        case(2, 3, k=24, n=10, residual=f32, bias=None),
        case(k=17, n=19, residual=f32),
        *(case(7, k=33, n=70, residual=f32, layout=name) for name in ("transposed", "misaligned", "sliced")),
        *(case(7, k=33, n=70, out=out, dtype=dtype) for out in (f32, bf16, int8) for dtype in (f32, bf16)),
        *(case(5, k=20, n=n, out=int8, tags="odd") for n in (1, 3, 15, 17, 63, 65)),
        *(case(5, k=33, n=70, out=int8, activation=a) for a in activations),
        case(2, 3, k=24, n=10, residual=bf16, out=int8, activation="relu"),
        *(case(7, k=k, n=70, x_scale="static", tags="odd") for k in (1, 15, 16, 17, 33, 67)),
        case(7, k=33, n=70, x_scale="static", dtype=bf16, layout="sliced"),
        *(case(7, k=k, n=70, x_scale="codes", tags="odd") for k in (1, 15, 16, 17, 33, 67)),
        *(case(7, k=37, n=41, x_scale="codes", layout=name) for name in ("transposed", "misaligned", "every_third")),
        case(2, 3, k=24, n=10, x_scale="codes", residual=f32),
        case(k=17, n=19, x_scale="codes"),
        case(0, k=8, n=8, x_scale="codes", out=int8),
        case(3, k=0, n=5, x_scale="codes", residual=f32),
        case(7, k=33, n=70, x_scale="static_codes", out=bf16),
        case(2, 3, k=24, n=10, x_scale="static_codes", out=int8, residual=f32, activation="gelu"),
        # Large enough for several threads, by rows, by panels and by both.
        case(600, k=130, n=63, tags="threads odd"),
        case(3, k=515, n=900, tags="threads odd"),
        case(131, k=257, n=197, tags="threads odd"),
        case(128, k=768, n=64, activation="gelu", dtype=bf16, tags="threads"),
        case(131, k=257, n=197, residual=f32, x_scale="codes", out=int8, tags="threads"),
    ]
    return cases


def _int8_codes(x: Tensor, data: Tensor, scale: Tensor, compensation: Tensor) -> Tensor:
    return lamina.ops.unpack_int8_weight(lamina.ops.PackedInt8Weight(data, scale, compensation), x.shape[-1])


def int8_linear_truth(
    x, data, scale, compensation, bias, activation, residual=None, x_scale=None, out_scale=None, out_dtype=None
) -> Tensor:
    codes = _int8_codes(x, data, scale, compensation)
    y = int8_linear_reference(x, codes, scale, bias, activation, residual, x_scale)
    return y if out_scale is None else requantize(y, out_scale)


def int8_linear_check(actual: Tensor, inputs: tuple) -> None:
    x, data, scale, compensation, bias, activation, *rest = inputs
    residual, x_scale, out_scale, out_dtype = rest or (None, None, None, None)
    float_x = torch.float32 if x.dtype is torch.int8 else x.dtype
    dtype = torch.int8 if out_scale is not None else out_dtype or float_x
    assert actual.dtype == dtype
    linear = int8_linear_truth(x, data, scale, compensation, bias, "none", residual, x_scale)
    truth = int8_linear_truth(x, data, scale, compensation, bias, activation, residual, x_scale)
    # The int32 sums are exact. Up to five roundings of half an eps follow: to float, times two scales, plus bias, plus
    # residual. None is of a value above |linear| + 2 |bias| + 2 |residual|.
    magnitude = linear.abs()
    for added in (bias, residual):
        if added is not None:
            magnitude = magnitude + 2 * added.double().abs()
    slope = tolerances.ACTIVATION_SLOPE[activation]
    extra = tolerances.activation_error(activation, linear)
    if out_scale is not None:
        error = slope * magnitude * 3 * tolerances.EPS_ACC + extra
        tolerances.assert_rounded(actual, truth, scale=out_scale, error=error, what=activation)
        return
    tolerances.assert_sum(actual, truth, terms=3, magnitude=slope * magnitude, extra=extra, what=activation)


def int8_linear_suite() -> Suite:
    return Suite("int8_linear", tuple(_int8_linear_cases()), int8_linear_truth, int8_linear_check)


# -- int8_linear_backward


def _int8_linear_backward_case(
    *lead: int, k: int, n: int, dtype=torch.float32, layout="contiguous", tags: str = ""
) -> Case:
    forward = _int8_linear_case(*lead, k=k, n=n, dtype=dtype, layout=layout, tags=tags)

    def make(generator: torch.Generator) -> tuple:
        grad = torch.randn(*lead, n, generator=generator).to(dtype)
        packed = lamina.ops.pack_int8_weight(torch.randn(n, k, generator=generator) / max(n, 1) ** 0.5)
        return LAYOUTS[layout](grad), packed.data, packed.scale, k

    return Case(forward.id, make, forward.tags)


def int8_linear_backward_truth(grad, data, scale, in_features) -> Tensor:
    weight = lamina.ops.unpack_int8_weight(lamina.ops.PackedInt8Weight(data, scale, data), in_features)
    return grad.double() @ (weight.double() * scale.double()[:, None])


def int8_linear_backward_check(actual: Tensor, inputs: tuple) -> None:
    grad, data, scale, in_features = inputs
    weight = lamina.ops.unpack_int8_weight(lamina.ops.PackedInt8Weight(data, scale, data), in_features)
    magnitude = grad.double().abs() @ (weight.double().abs() * scale.double()[:, None])
    # The dequantized weight is rounded to the dtype of grad before the product.
    rounding = tolerances.eps(grad.dtype) * magnitude
    tolerances.assert_sum(
        actual, int8_linear_backward_truth(*inputs), terms=scale.shape[0], magnitude=magnitude, extra=rounding
    )


def int8_linear_backward_suite() -> Suite:
    case = _int8_linear_backward_case
    cases = (
        case(0, k=8, n=8),
        case(3, k=0, n=5),
        case(3, k=8, n=0),
        case(2, 3, k=0, n=4),
        case(1, k=1, n=1, tags="one"),
        case(k=17, n=19, tags="odd"),
        case(5, k=21, n=67, tags="odd"),
        case(7, k=13, n=129, tags="odd"),
        case(2, 3, k=24, n=10),
        case(7, k=37, n=41, dtype=torch.bfloat16),
        *(case(7, k=37, n=41, layout=name) for name in ("transposed", "sliced", "rows_repeated", "columns_repeated")),
        case(131, k=197, n=257, tags="threads odd"),
    )
    return Suite(
        "int8_linear_backward", cases, int8_linear_backward_truth, int8_linear_backward_check, own_kernel=False
    )


# -- int8_conv2d


# Pixels with their channels together, as in torch.channels_last, and lying otherwise.
IMAGE_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "last": lambda t: t.movedim(-3, -1).contiguous().movedim(-1, -3),
    "first": lambda t: t.contiguous(),
    "last_sliced": lambda t: LAYOUTS["sliced"](t.movedim(-3, -1)).movedim(-1, -3),
    "first_sliced": lambda t: LAYOUTS["sliced"](t),
    "pixels_apart": lambda t: _inside(t.movedim(-3, -1), [(0, 0)] * (t.ndim - 1) + [(4, 8)]).movedim(-1, -3),
    "every_second": lambda t: LAYOUTS["every_second"](t),
    "turned": lambda t: t.mT.contiguous().mT,
    "rows_repeated": lambda t: t[..., :1, :].expand_as(t),
}


@dataclass(frozen=True)
class Conv:
    """Sizes of a convolution: images, channels, height, width -> n channels; padding: top, bottom, left, right."""

    images: int
    c: int
    h: int
    w: int
    n: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def name(self) -> str:
        words = [f"{self.images}x{self.c}x{self.h}x{self.w}-n{self.n}-k{self.kernel[0]}x{self.kernel[1]}"]
        words += [f"s{self.stride[0]}x{self.stride[1]}"] if self.stride != (1, 1) else []
        words += ["p" + "".join(map(str, self.padding))] if any(self.padding) else []
        words += [f"d{self.dilation[0]}x{self.dilation[1]}"] if self.dilation != (1, 1) else []
        words += [f"g{self.groups}"] if self.groups > 1 else []
        return "-".join(words)

    def out_shape(self) -> tuple[int, ...]:
        sizes = []
        for i, size in enumerate((self.h, self.w)):
            room = size + self.padding[2 * i] + self.padding[2 * i + 1]
            sizes.append((room - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1)
        return self.images, self.n, *sizes


def _int8_conv2d_case(
    conv: Conv,
    dtype: torch.dtype = torch.float32,
    layout: str = "last",
    bias: torch.dtype | None = torch.float32,
    activation: str = "none",
    residual: torch.dtype | None = None,
    x_scale: str | None = None,
    out: torch.dtype | None = None,
    unbatched: bool = False,
    tags: str = "",
) -> Case:
    """x_scale: "static" for one scale of a float x that clamps a few codes; "codes" and "static_codes" for an int8 x
    with a scale per image and with one for all. out: the output's dtype, int8 with an out_scale."""

    def make(generator: torch.Generator) -> tuple:
        depth = max(conv.c // conv.groups * conv.kernel[0] * conv.kernel[1], 1)
        x = 8 * torch.randn(conv.images, conv.c, conv.h, conv.w, generator=generator) / depth**0.25
        weight = torch.randn(conv.n, conv.c // conv.groups, *conv.kernel, generator=generator) / depth**0.25
        packed = lamina.ops.pack_int8_conv_weight(weight, groups=conv.groups)
        b = None if bias is None else 4 * torch.randn(conv.n, generator=generator).to(bias)
        x, scales = x.to(dtype), None
        if x_scale is not None:
            largest = x.float().abs().max() if x.numel() else torch.tensor(1.0)
            scales = largest / 127 if x_scale == "static_codes" else largest / 150
            if x_scale != "static":
                x, scales = quantize_images(x, scales if x_scale == "static_codes" else None)
                scales = scales.flatten()[0] if x_scale == "static_codes" and scales.numel() else scales
        r = factor = None
        if residual is not None:
            r = 4 * torch.randn(conv.out_shape(), generator=generator)
            if residual is torch.int8:
                r, factor = (16 * r).round().clamp(-128, 127), torch.tensor(0.0625)
            r = IMAGE_LAYOUTS[layout](r.to(residual))
        x = IMAGE_LAYOUTS[layout](x)
        if unbatched:
            x, r = x[0], None if r is None else r[0]
        to_int8 = out is torch.int8
        return (
            *(x, packed.data, packed.scale, packed.compensation, list(packed.size), b),
            *(list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups, activation),
            *(r, factor, scales, torch.tensor(0.11) if to_int8 else None, None if to_int8 else out),
        )

    name = conv.name + ("-bf16" if dtype is torch.bfloat16 else "")
    name += f"-{layout}" if layout != "last" else ""
    name += {None: "-nobias", torch.float32: "", torch.bfloat16: "-bf16bias"}[bias]
    name += f"-{activation}" if activation != "none" else ""
    name += f"-residual_{_short(residual)}" if residual else ""
    name += f"-{x_scale}" if x_scale else ""
    name += f"-to_{_short(out)}" if out else ""
    words = set(tags.split())
    words |= {"empty"} if 0 in (conv.images, conv.n) else set()
    words |= {"strided"} if layout not in ("last", "first") else set()
    words |= {"bf16"} if dtype is torch.bfloat16 else set()
    words |= {"nd"} if unbatched else set()
    return Case(name + ("-unbatched" if unbatched else ""), make, frozenset(words))


def _int8_conv2d_cases() -> list[Case]:
    case = _int8_conv2d_case
    f32, bf16, int8 = torch.float32, torch.bfloat16, torch.int8
    three = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
    return [
        case(Conv(0, 8, 5, 5, 8, **three)),
        case(Conv(0, 8, 5, 5, 8), x_scale="codes", out=int8),
        case(Conv(1, 1, 1, 1, 1), tags="one"),
        case(Conv(1, 1, 1, 1, 1, **three), x_scale="static_codes", out=int8, tags="one"),
        case(Conv(1, 12, 6, 5, 20, **three), unbatched=True),
        case(Conv(1, 12, 6, 5, 20), unbatched=True, residual=f32, dtype=bf16, layout="first"),
        # Pixels: tiles of up to 14 within lines of equal rows; channels: registers of 4 to 16, panels of 32, 16 left.
        *(case(Conv(1, 8, 1, w, 24), tags="odd") for w in (3, 29)),
        *(case(Conv(2, 5, 3, 7, n, **three), x_scale="codes", out=int8, tags="odd") for n in (7, 16, 65)),
        # Depth: groups of four, unrolled blocks of 16, runs of taps that are no multiple of four.
        *(
            case(Conv(2, c, 5, 7, 21, **three), layout=name, tags="odd")
            for c, name in ((1, "first"), (3, "last"), (7, "first"))
        ),
        case(Conv(1, 3, 17, 19, 33, (7, 7), (2, 2), (3, 3, 3, 3)), layout="first", activation="relu", tags="odd"),
        case(Conv(1, 3, 9, 11, 5, (3, 3), dilation=(1, 2)), tags="odd"),
        # Windows: strides, dilation, padding that is larger than the kernel, rows of taps that lie outside.
        case(Conv(2, 8, 9, 10, 24, (3, 3), (2, 2), (1, 1, 1, 1)), residual=f32),
        case(Conv(2, 8, 9, 10, 24, (1, 1), (2, 3)), x_scale="codes", layout="pixels_apart"),
        case(Conv(1, 8, 2, 3, 9, (5, 4), (1, 1), (4, 5, 3, 2), (1, 1))),
        case(Conv(2, 8, 7, 7, 9, (3, 3), (3, 2), (4, 4, 4, 4), (3, 2)), activation="gelu"),
        case(Conv(2, 6, 7, 8, 9, (2, 3), (1, 2), (0, 1, 2, 0), (2, 1), 3), bias=None),
        case(
            Conv(1, 12, 6, 6, 40, **three, groups=2),
            x_scale="static_codes",
            residual=int8,
            out=int8,
            activation="relu6",
        ),
        *(
            case(Conv(2, c, 7, 9, c, kernel, stride, padding, dilation, groups=c), layout=name, out=out, tags="odd")
            for c, kernel, stride, padding, dilation, name, out in (
                (37, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "last", int8),
                (130, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), "first", None),
                (17, (5, 5), (1, 2), (2, 2, 2, 2), (1, 1), "last", int8),
                (64, (7, 7), (1, 1), (3, 3, 3, 3), (1, 1), "last", None),
                (5, (2, 4), (2, 1), (0, 1, 3, 1), (2, 3), "last", int8),
            )
        ),
        case(Conv(2, 33, 5, 6, 33, **three, groups=33), x_scale="codes", residual=int8, out=int8, activation="relu"),
        *(case(Conv(2, 7, 5, 6, 21, **three), layout=name) for name in ("turned", "every_second", "rows_repeated")),
        *(case(Conv(2, 8, 5, 6, 40, (2, 2)), layout=name, x_scale="codes") for name in ("first", "last_sliced")),
        *(case(Conv(2, 8, 5, 6, 40), dtype=bf16, activation=a, bias=bf16) for a in ("silu", "hardswish")),
        case(Conv(2, 8, 5, 6, 40, **three), dtype=bf16, layout="first_sliced", out=f32),
        *(case(Conv(2, 8, 5, 6, 40), residual=r, out=int8, activation="relu") for r in (f32, bf16, int8)),
        case(Conv(2, 8, 5, 6, 40), residual=int8, activation="hardswish", out=int8, layout="pixels_apart"),
        case(Conv(3, 20, 19, 23, 70, **three), tags="threads odd"),
        # By Winograd's filtering, shared out by panels and by tiles.
        case(Conv(1, 100, 19, 23, 64, **three), x_scale="codes", residual=int8, out=int8, tags="threads odd"),
        case(Conv(2, 100, 19, 23, 64, **three), layout="first", activation="silu", tags="threads odd"),
        case(Conv(2, 64, 5, 5, 200, **three), x_scale="codes", residual=int8, out=int8, tags="threads"),
        case(Conv(1, 200, 33, 31, 200, **three, groups=200), out=int8, tags="threads"),
    ]


def int8_conv2d_truth(
    x,
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
    residual=None,
    residual_scale=None,
    x_scale=None,
    out_scale=None,
    out_dtype=None,
) -> Tensor:
    packed = lamina.ops.PackedInt8ConvWeight(data, scale, compensation, size, groups)
    codes = lamina.ops.unpack_int8_conv_weight(packed)
    unbatched = x.ndim == 3
    if unbatched:
        x, residual = x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
    y = int8_conv2d_reference(
        x, codes, scale, bias, stride, padding, dilation, groups, activation, residual, residual_scale, x_scale
    )
    y = y.squeeze(0) if unbatched else y
    return y if out_scale is None else requantize(y, out_scale)


def int8_conv2d_check(actual: Tensor, inputs: tuple) -> None:
    x, bias, activation = inputs[0], inputs[5], inputs[10]
    residual, residual_scale, x_scale, out_scale, out_dtype = inputs[11:]
    float_x = torch.float32 if x.dtype is torch.int8 else x.dtype
    assert actual.dtype == (torch.int8 if out_scale is not None else out_dtype or float_x)
    before = (*inputs[:10], "none", residual, residual_scale, x_scale)
    linear = int8_conv2d_truth(*before)
    truth = int8_conv2d_truth(*inputs[:14])
    # The int32 sums are exact. Up to eight roundings of half an eps follow: to float, the product of scales, with it,
    # bias, residual and its product, each of these times 1 / out_scale. None is of a value above |linear| + 2 |bias| +
    # 2 |residual|.
    magnitude = linear.abs()
    if bias is not None:
        magnitude = magnitude + 2 * bias.double().abs()[:, None, None]
    if residual is not None:
        magnitude = magnitude + 2 * residual.double().abs() * (1.0 if residual_scale is None else residual_scale)
    slope = tolerances.ACTIVATION_SLOPE[activation]
    extra = tolerances.activation_error(activation, linear)
    if out_scale is not None:
        error = slope * magnitude * 5 * tolerances.EPS_ACC + extra
        tolerances.assert_rounded(actual, truth, scale=out_scale, error=error, what=activation)
        return
    tolerances.assert_sum(actual, truth, terms=4, magnitude=slope * magnitude, extra=extra, what=activation)


def int8_conv2d_suite() -> Suite:
    return Suite("int8_conv2d", tuple(_int8_conv2d_cases()), int8_conv2d_truth, int8_conv2d_check)


# -- int8_conv2d_backward


def _int8_conv2d_backward_case(conv: Conv, dtype=torch.float32, layout="last", unbatched=False, tags="") -> Case:
    forward = _int8_conv2d_case(conv, dtype=dtype, layout=layout, unbatched=unbatched, tags=tags)

    def make(generator: torch.Generator) -> tuple:
        grad = torch.randn(conv.out_shape(), generator=generator).to(dtype)
        weight = torch.randn(conv.n, conv.c // conv.groups, *conv.kernel, generator=generator)
        packed = lamina.ops.pack_int8_conv_weight(weight / max(conv.n, 1) ** 0.5, groups=conv.groups)
        grad = IMAGE_LAYOUTS[layout](grad)
        shape = [conv.images, conv.c, conv.h, conv.w]
        return (
            *(grad[0] if unbatched else grad, packed.data, packed.scale, list(packed.size)),
            *(
                shape[1:] if unbatched else shape,
                list(conv.stride),
                list(conv.padding),
                list(conv.dilation),
                conv.groups,
            ),
        )

    return Case(forward.id, make, forward.tags)


def _int8_conv2d_gradient(
    grad, data, scale, size, input_shape, stride, padding, dilation, groups, of=lambda t: t
) -> Tensor:
    """The gradient by torch's own derivative of the float64 convolution; `of` is applied to weight and grad."""
    packed = lamina.ops.PackedInt8ConvWeight(data, scale, data, size, groups)
    weight = lamina.ops.unpack_int8_conv_weight(packed).double() * scale.double()[:, None, None, None]
    x = torch.zeros(input_shape, dtype=torch.float64, requires_grad=True)
    top, bottom, left, right = padding
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), of(weight), None, stride, 0, dilation, groups)
    return torch.autograd.grad(y, x, of(grad.double()))[0]


def int8_conv2d_backward_check(actual: Tensor, inputs: tuple) -> None:
    magnitude = _int8_conv2d_gradient(*inputs, of=torch.abs)
    size = inputs[3]
    # The dequantized weight is rounded to the dtype of grad before the sum.
    rounding = tolerances.eps(inputs[0].dtype) * magnitude
    terms = size[0] * size[2] * size[3]
    truth = _int8_conv2d_gradient(*inputs)
    tolerances.assert_sum(actual, truth, terms=terms, magnitude=magnitude, extra=rounding)


def int8_conv2d_backward_suite() -> Suite:
    case, bf16 = _int8_conv2d_backward_case, torch.bfloat16
    cases = (
        case(Conv(0, 8, 5, 5, 8)),
        case(Conv(1, 1, 1, 1, 1), tags="one"),
        case(Conv(1, 4, 6, 5, 7, (3, 3), padding=(1, 1, 1, 1)), unbatched=True),
        case(Conv(2, 5, 7, 9, 11, (3, 3), (2, 1), (0, 1, 2, 0)), tags="odd"),
        case(Conv(2, 6, 7, 9, 9, (3, 2), (1, 2), (1, 1, 0, 0), (2, 1), 3), layout="turned", tags="odd"),
        case(Conv(2, 8, 7, 7, 8, (3, 3), padding=(1, 1, 1, 1), groups=8), dtype=bf16, tags="odd"),
        case(Conv(2, 16, 15, 15, 33, (3, 3), padding=(1, 1, 1, 1)), tags="threads"),
    )
    return Suite("int8_conv2d_backward", cases, _int8_conv2d_gradient, int8_conv2d_backward_check, own_kernel=False)


# -- int8_pool2d


def _int8_pool2d_case(
    *shape: int,
    kind: str,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
    layout: str = "last",
    scales: str = "",
    out: torch.dtype | None = None,
    tags: str = "",
) -> Case:
    """scales: "x" for float values, "x out" for codes in other steps."""

    def make(generator: torch.Generator) -> tuple:
        x = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
        x_scale = torch.tensor(0.7) if "x" in scales else None
        out_scale = torch.tensor(0.3) if "out" in scales else None
        geometry = list(kernel), list(stride), list(padding), list(dilation), ceil_mode, count_include_pad, divisor
        return IMAGE_LAYOUTS[layout](x), kind, *geometry, x_scale, out_scale, out

    name = f"{kind}-{'x'.join(map(str, shape))}-k{kernel}-s{stride}-p{padding}-d{dilation}".replace(" ", "")
    name += "-ceil" * ceil_mode + "-without_pad" * (not count_include_pad) + (f"-divisor{divisor}" if divisor else "")
    name += (f"-{layout}" if layout != "last" else "") + (f"-{scales.replace(' ', '_')}" if scales else "")
    words = set(tags.split()) | ({"empty"} if 0 in shape else set()) | ({"nd"} if len(shape) == 3 else set())
    words |= {"strided"} if layout not in ("last", "first") else set()
    words |= {"bf16"} if out is torch.bfloat16 else set()
    return Case(name + (f"-to_{_short(out)}" if out else ""), make, frozenset(words))


def int8_pool2d_truth(x, kind, *arguments) -> Tensor:
    *geometry, x_scale, out_scale, _ = arguments
    y = int8_pool2d_reference(x, kind, *geometry)
    if x_scale is not None:
        y = y * x_scale.double()
    if x_scale is not None and out_scale is None:
        return y
    y = y if out_scale is None else y / out_scale.double()
    return y if kind == "max" else y.round().clamp(-127, 127)


def int8_pool2d_check(actual: Tensor, inputs: tuple) -> None:
    x, kind, *geometry, x_scale, out_scale, _ = inputs
    if kind == "max":
        return tolerances.assert_exact(actual, int8_pool2d_truth(*inputs).to(torch.int8))
    mean = int8_pool2d_reference(x, kind, *geometry)
    if x_scale is not None and out_scale is None:
        y = mean * x_scale.double()
        return tolerances.assert_sum(actual, y, terms=2, magnitude=y.abs())
    # Sums are exact; the factor and the product are rounded.
    ratio = torch.tensor(1.0) if out_scale is None else out_scale / x_scale
    tolerances.assert_rounded(actual, mean, scale=ratio, error=2 * tolerances.EPS_ACC * mean.abs(), what=kind)


def int8_pool2d_suite() -> Suite:
    case = _int8_pool2d_case
    ceil = {"kernel": (3, 2), "stride": (2, 3), "ceil_mode": True}
    cases = (
        case(0, 8, 5, 5, kind="max", kernel=(2, 2)),
        case(0, 3, 5, 5, kind="avg", kernel=(2, 2), scales="x"),
        case(1, 1, 1, 1, kind="avg", kernel=(1, 1), tags="one"),
        case(7, 6, 5, kind="max", kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
        case(2, 37, 9, 8, kind="max", kernel=(3, 3), stride=(2, 2), padding=(1, 1), layout="first", tags="odd"),
        case(2, 131, 9, 8, kind="max", kernel=(2, 3), dilation=(2, 2), padding=(1, 1), layout="turned"),
        case(2, 16, 10, 9, kind="max", **ceil, padding=(1, 1), layout="pixels_apart"),
        case(2, 37, 9, 8, kind="avg", kernel=(3, 3), stride=(2, 2), padding=(1, 1), tags="odd"),
        case(2, 5, 9, 8, kind="avg", kernel=(3, 2), padding=(1, 1), count_include_pad=False, scales="x out"),
        case(2, 16, 10, 9, kind="avg", **ceil, padding=(1, 1), out=torch.bfloat16, scales="x"),
        case(2, 16, 10, 9, kind="avg", **ceil, count_include_pad=False, divisor=5, layout="rows_repeated"),
        case(2, 21, 7, 7, kind="adaptive_avg", kernel=(1, 1), scales="x", tags="odd"),
        case(2, 21, 7, 9, kind="adaptive_avg", kernel=(3, 12), layout="last_sliced", scales="x out"),
        case(3, 200, 23, 21, kind="avg", kernel=(3, 3), stride=(2, 1), tags="threads odd"),
    )
    return Suite("int8_pool2d", cases, int8_pool2d_truth, int8_pool2d_check)


# -- pool2d


def _pool2d_case(
    *shape: int,
    kind: str,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "first",
    tags: str = "",
) -> Case:
    windows = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    modes = {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad, "divisor": divisor}
    like = _int8_pool2d_case(*shape, kind=kind, **windows, **modes, layout=layout, tags=tags)

    def make(generator: torch.Generator) -> tuple:
        x = torch.randn(shape, generator=generator).to(dtype)
        return IMAGE_LAYOUTS[layout](x), kind, *map(list, windows.values()), *modes.values()

    is_bf16 = dtype is torch.bfloat16
    return Case(like.id + "-bf16" * is_bf16, make, like.tags | ({"bf16"} if is_bf16 else set()))


def pool2d_truth(x: Tensor, *arguments) -> Tensor:
    return pool2d_reference(x.double(), *arguments)


def pool2d_check(actual: Tensor, inputs: tuple) -> None:
    x, kind, kernel, *rest = inputs
    truth = pool2d_truth(*inputs)
    if kind == "max":
        return tolerances.assert_exact(actual, truth.to(x.dtype))
    # An adaptive window is two pixels longer than its share at most.
    shares = [size // max(k, 1) + 2 for size, k in zip(x.shape[-2:], kernel, strict=True)]
    terms = math.prod(shares if kind == "adaptive_avg" else kernel)
    tolerances.assert_sum(actual, truth, terms=terms + 1, magnitude=pool2d_truth(x.abs(), kind, kernel, *rest))


def pool2d_suite() -> Suite:
    case, bf16 = _pool2d_case, torch.bfloat16
    ceil = {"kernel": (3, 2), "stride": (2, 3), "ceil_mode": True}
    three = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
    cases = (
        case(0, 8, 5, 5, kind="max", kernel=(2, 2)),
        case(1, 1, 1, 1, kind="avg", kernel=(1, 1), tags="one"),
        case(7, 6, 5, kind="max", **three),
        case(7, 6, 5, kind="avg", **three, layout="last"),
        *(
            case(2, 37, 9, 38, kind=kind, **three, layout=layout, tags="odd")
            for kind in ("max", "avg")
            for layout in ("first", "last")
        ),
        *(
            case(2, 131, 9, 8, kind="max", kernel=(2, 3), dilation=(2, 2), padding=(1, 1), layout=layout)
            for layout in ("first", "last", "turned", "every_second")
        ),
        *(
            case(2, 16, 10, 49, kind=kind, **ceil, padding=(1, 1), layout=layout, dtype=dtype)
            for kind in ("max", "avg")
            for layout in ("first", "pixels_apart", "first_sliced")
            for dtype in (torch.float32, bf16)
        ),
        case(2, 5, 9, 8, kind="avg", kernel=(3, 2), padding=(1, 1), count_include_pad=False),
        case(2, 5, 9, 8, kind="avg", kernel=(3, 2), padding=(1, 1), count_include_pad=False, layout="last"),
        case(2, 16, 10, 9, kind="avg", **ceil, count_include_pad=False, divisor=5, layout="rows_repeated"),
        *(
            case(2, 21, 7, 9, kind="adaptive_avg", kernel=size, layout=layout, tags="odd")
            for size in ((1, 1), (3, 12))
            for layout in ("first", "last", "last_sliced")
        ),
        case(2, 21, 7, 9, kind="adaptive_avg", kernel=(2, 2), dtype=bf16),
        case(3, 1, 40, 33, kind="max", kernel=(1, 5), stride=(1, 1), padding=(0, 2), layout="last"),
        case(3, 200, 23, 21, kind="avg", kernel=(3, 3), stride=(2, 1), tags="threads odd"),
        case(3, 200, 23, 21, kind="avg", kernel=(3, 3), stride=(2, 1), layout="last", tags="threads odd"),
        case(3, 64, 43, 41, kind="max", **three, tags="threads odd"),
    )
    return Suite("pool2d", cases, pool2d_truth, pool2d_check)


# -- quantize_rows


def _quantize_rows_case(
    *lead: int, k: int, dtype=torch.float32, layout="contiguous", scale: float | None = None, tags: str = ""
) -> Case:
    def make(generator: torch.Generator) -> tuple:
        x = (8 * torch.randn(*lead, k, generator=generator)).to(dtype)
        return LAYOUTS[layout](x), None if scale is None else torch.tensor(scale)

    name = _int8_linear_case(*lead, k=k, n=0, dtype=dtype, layout=layout).id.replace("-n0", "")
    words = set(tags.split())
    words |= {"empty"} if 0 in (*lead, k) else set()
    words |= {"strided"} if layout != "contiguous" else set()
    words |= {"bf16"} if dtype is torch.bfloat16 else set()
    words |= {"nd"} if len(lead) != 1 else set()
    return Case(name + ("" if scale is None else f"-scale{scale}"), make, frozenset(words))


def quantize_rows_check(actual: tuple, inputs: tuple) -> None:
    """The format is defined bit by bit."""
    for ours, truth in zip(actual, quantize_rows_reference(*inputs), strict=True):
        tolerances.assert_exact(ours, truth)


def quantize_rows_suite() -> Suite:
    case, bf16 = _quantize_rows_case, torch.bfloat16
    cases = (
        case(0, k=8),
        case(3, k=0),
        case(3, k=0, scale=0.5),
        case(2, 0, 3, k=4),
        case(1, k=1, tags="one"),
        case(k=17, tags="odd"),
        case(k=17, scale=0.125, tags="odd"),
        case(2, 3, k=24),
        case(2, 3, 5, k=24, dtype=bf16),
        *(case(5, k=k, tags="odd") for k in (2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129)),
        *(case(5, k=k, scale=0.125, tags="odd") for k in (3, 15, 16, 17, 63, 64, 65, 129)),
        *(case(5, k=k, dtype=bf16, tags="odd") for k in (1, 7, 15, 17, 63, 65)),
        case(5, k=37, dtype=bf16, scale=0.1),
        *(case(7, k=37, layout=name) for name in LAYOUTS if name not in ("contiguous", "heads_inside")),
        *(case(7, k=37, dtype=bf16, layout=name) for name in ("transposed", "misaligned", "every_third")),
        case(2, 3, 4, k=6, layout="heads_inside", scale=0.1),
        case(300, k=515, tags="threads odd"),
        case(300, k=515, dtype=bf16, scale=0.1, tags="threads odd"),
    )
    return Suite("quantize_rows", cases, quantize_rows_reference, quantize_rows_check)


# -- attention


def _attention_case(
    name: str,
    *lead: int,
    q: int,
    s: int,
    d: int,
    dv: int | None = None,
    kv_lead: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    mask: tuple[int, ...] | None = None,
    mask_dtype: torch.dtype = torch.bool,
    causal: bool = False,
    scale: float | None = None,
    tags: str = "",
) -> Case:
    kv = kv_lead or lead
    dv = d if dv is None else dv

    def make(generator: torch.Generator) -> tuple:
        query = torch.randn(*lead, q, d, generator=generator).to(dtype)
        key = torch.randn(*kv, s, d, generator=generator).to(dtype)
        value = torch.randn(*kv, s, dv, generator=generator).to(dtype)
        attn_mask = None
        if mask is not None:
            keep = torch.rand(mask, generator=generator) < 0.6
            if mask_dtype is torch.bool:
                attn_mask = keep
            else:
                bias = torch.randn(mask, generator=generator).masked_fill(~keep, -math.inf)
                attn_mask = bias.to(mask_dtype)
        gqa = len(lead) > 1 and lead[-1] != kv[-1]
        tensors = [LAYOUTS[layout](t) for t in (query, key, value)]
        return *tensors, attn_mask, causal, scale, gqa

    words = set(tags.split())
    if 0 in (*lead, q, s, d, dv):
        words.add("empty")
    if layout != "contiguous":
        words.add("strided")
    if dtype is torch.bfloat16:
        words.add("bf16")
    if len(lead) != 2:
        words.add("nd")
    return Case(name, make, frozenset(words))


def _attention_cases() -> list[Case]:
    case = _attention_case
    f32, bf16 = torch.float32, torch.bfloat16
    return [
        case("no_batch", 0, 2, q=4, s=5, d=8),
        case("no_heads", 2, 0, q=4, s=5, d=8),
        case("no_queries", 2, 2, q=0, s=5, d=8),
        case("no_keys", 2, 2, q=4, s=0, d=8),
        case("no_value_size", 2, 2, q=4, s=5, d=8, dv=0),
        case("ones", 1, 1, q=1, s=1, d=1, tags="one"),
        case("one_query", 1, 3, q=1, s=77, d=64, tags="one"),
        case("one_key", 1, 3, q=9, s=1, d=64, tags="one"),
        case("primes", 2, 3, q=37, s=53, d=29, dv=31, tags="odd"),
        # Row blocks of 64, chunks of 256 keys (a rest of 64 joins the last), registers of 4, 8 and 16.
        *(case(f"queries_{q}", 1, 2, q=q, s=19, d=16, tags="odd") for q in (3, 15, 16, 17, 33, 63, 64, 65, 129)),
        *(
            case(f"keys_{s}", 1, 2, q=5, s=s, d=16, tags="odd")
            for s in (3, 15, 17, 31, 255, 256, 257, 319, 320, 321, 577)
        ),
        *(
            case(f"head_{d}", 1, 2, q=5, s=21, d=d, tags="odd")
            for d in (1, 2, 3, 7, 8, 9, 15, 17, 33, 64, 80, 127, 255, 256)
        ),
        *(case(f"value_{dv}", 1, 2, q=5, s=21, d=24, dv=dv, tags="odd") for dv in (1, 3, 17, 64, 256)),
        *(
            case(f"bf16_head_{d}", 1, 2, q=5, s=21, d=d, dtype=bf16, tags="odd")
            for d in (1, 2, 15, 16, 17, 31, 33, 64, 256)
        ),
        *(case(f"bf16_keys_{s}", 1, 2, q=66, s=s, d=32, dtype=bf16, tags="odd") for s in (1, 2, 3, 255, 257, 321)),
        *(
            case(f"causal_{q}_{s}", 1, 2, q=q, s=s, d=16, causal=True, tags="odd")
            for q, s in ((65, 65), (7, 300), (130, 9))
        ),
        *(
            case(f"f16_{name}", 1, 2, q=66, s=77, d=d, dtype=torch.float16, causal=name == "causal", tags="odd")
            for name, d in (("even", 32), ("odd", 33), ("causal", 40))
        ),
        case("causal_bf16", 2, 2, q=97, s=97, d=24, causal=True, dtype=bf16, tags="odd"),
        *(case(f"layout_{name}", 2, 3, q=18, s=25, d=20, layout=name) for name in LAYOUTS if name != "contiguous"),
        *(
            case(f"bf16_layout_{name}", 2, 3, q=18, s=25, d=20, layout=name, dtype=bf16)
            for name in ("transposed", "heads_inside", "misaligned", "sliced", "every_second")
        ),
        case("mask_full", 2, 3, q=18, s=25, d=16, mask=(2, 3, 18, 25)),
        case("mask_of_keys", 2, 3, q=18, s=25, d=16, mask=(2, 1, 1, 25)),
        case("mask_matrix", 2, 3, q=18, s=25, d=16, mask=(18, 25)),
        case("mask_vector", 2, 3, q=18, s=25, d=16, mask=(25,)),
        case("mask_of_queries", 2, 3, q=18, s=25, d=16, mask=(18, 1)),
        case("mask_additive", 2, 3, q=18, s=25, d=16, mask=(2, 1, 18, 25), mask_dtype=f32),
        case("mask_additive_bf16", 2, 3, q=18, s=25, d=16, mask=(2, 3, 18, 25), mask_dtype=bf16, dtype=bf16),
        case("mask_additive_mixed", 2, 3, q=18, s=25, d=16, mask=(1, 1, 1, 25), mask_dtype=f32, dtype=bf16),
        case("mask_and_causal", 2, 3, q=30, s=30, d=16, mask=(2, 1, 1, 30), causal=True),
        case("grouped", 2, 6, q=21, s=40, d=16, kv_lead=(2, 2)),
        case("grouped_one_query", 2, 8, q=1, s=70, d=32, kv_lead=(2, 2), causal=False),
        case("grouped_causal_bf16", 1, 6, q=70, s=70, d=16, kv_lead=(1, 1), causal=True, dtype=bf16),
        case("grouped_mask", 2, 4, q=20, s=33, d=16, kv_lead=(2, 2), mask=(2, 4, 20, 33)),
        case("matrices", q=9, s=12, d=16),
        case("three_dimensions", 3, q=9, s=12, d=16),
        case("five_dimensions", 2, 3, 2, q=9, s=12, d=16, mask=(9, 12)),
        case("broadcast_batch", 3, 2, q=9, s=12, d=16, kv_lead=(1, 2)),
        case("scale", 1, 2, q=9, s=12, d=16, scale=0.5),
        case("scale_zero", 1, 2, q=9, s=12, d=16, scale=0.0),
        case("threads", 2, 4, q=130, s=190, d=64, tags="threads"),
        case("threads_causal", 1, 4, q=259, s=259, d=64, causal=True, tags="threads odd"),
        case("threads_bf16", 1, 4, q=200, s=300, d=64, dtype=bf16, tags="threads"),
    ]


def attention_truth(query, key, value, attn_mask, is_causal, scale, enable_gqa) -> Tensor:
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.double()
    return attention_reference(
        query.double(), key.double(), value.double(), attn_mask, 0.0, is_causal, scale, enable_gqa
    )


def attention_eager(query, key, value, attn_mask, is_causal, scale, enable_gqa) -> Tensor:
    """torch's own op on the same inputs; it refuses a mask together with is_causal, so they are joined before."""
    if attn_mask is not None and is_causal:
        corner = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        if attn_mask.dtype is torch.bool:
            attn_mask, is_causal = attn_mask & corner, False
        else:
            attn_mask, is_causal = attn_mask.masked_fill(~corner, -math.inf), False
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(query.dtype)
    if attn_mask is not None and attn_mask.ndim < 2:
        attn_mask = attn_mask.expand(query.shape[-2], key.shape[-2])
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def attention_check(actual: Tensor, inputs: tuple) -> None:
    query, _, value, *_ = inputs
    assert actual.dtype == query.dtype
    truth = attention_truth(*inputs)
    # Beside the rounding of the output: each weight has the relative error of exp2, which weighs at most max |v|.
    largest = value.abs().max().item() if value.numel() else 0.0
    floor = tolerances.eps(query.dtype) * _largest(truth) + tolerances.EXP2_ERROR * largest
    tolerances.assert_composite(actual, attention_eager(*inputs), truth, floor=floor)


def _largest(truth: Tensor) -> float:
    return truth[truth.isfinite()].abs().max().item() if truth.numel() else 0.0


def attention_suite() -> Suite:
    return Suite("attention", tuple(_attention_cases()), attention_truth, attention_check)


# -- attention_decode


def _attention_decode_case(
    name: str,
    batch: int,
    heads: int,
    kv_heads: int,
    *,
    lengths: tuple[int, ...] | None = None,
    q: int = 1,
    s: int,
    d: int,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None,
    layout: str = "contiguous",
    block: int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi: bool = False,
    sinks: bool = False,
    tags: str = "",
) -> Case:
    """lengths: tokens in the cache of each sequence, all of s by default. block: tokens of a block of a paged cache."""
    dv = d if dv is None else dv

    def make(generator: torch.Generator) -> tuple:
        query = torch.randn(batch, q, heads, d, generator=generator).to(dtype)
        seqlens = torch.tensor(lengths or [s] * batch, dtype=torch.int32)
        table = None
        shape = (batch, s, kv_heads)
        if block:
            blocks = -(-s // block)
            shape = (batch * blocks + 2, block, kv_heads)
            table = torch.randperm(shape[0], generator=generator)[: batch * blocks].to(torch.int32).view(batch, blocks)
        caches = [torch.randn(*shape, size, generator=generator) for size in (d, dv)]
        scales = [None, None]
        if cache is torch.int8:
            caches, scales = zip(*(quantize_rows_reference(t) for t in caches), strict=True)
        else:
            caches = [t.to(dtype) for t in caches]
        slopes = torch.rand(heads, generator=generator) / 8 if alibi else None
        sink = torch.randn(heads, generator=generator) if sinks else None
        tensors = [LAYOUTS[layout](t) for t in (query, *caches)]
        return *tensors, seqlens, table, scale, window, softcap, slopes, sink, *scales

    words = set(tags.split())
    if 0 in (batch, q, heads, kv_heads):
        words.add("empty")
    if layout != "contiguous":
        words.add("strided")
    if dtype is torch.bfloat16:
        words.add("bf16")
    if block:
        words.add("nd")
    return Case(name, make, frozenset(words))


def _attention_decode_cases() -> list[Case]:
    case = _attention_decode_case
    bf16, i8 = torch.bfloat16, torch.int8
    return [
        case("no_batch", 0, 2, 2, s=5, d=8),
        case("no_heads", 2, 0, 0, s=5, d=8),
        case("no_queries", 2, 2, 2, q=0, s=5, d=8),
        case("no_keys", 2, 2, 2, s=0, d=8),
        case("ones", 1, 1, 1, s=1, d=1, tags="one"),
        case("lengths_0_and_1", 3, 2, 1, lengths=(0, 1, 9), s=9, d=16, tags="one"),
        case("primes", 2, 3, 1, s=53, d=29, dv=31, tags="odd"),
        # Registers of 4, 8 and 16, groups of 32 values, pieces of 512 keys.
        *(
            case(f"keys_{s}", 1, 2, 2, s=s, d=16, tags="odd")
            for s in (3, 16, 33, 511, 513, 1600)
        ),
        *(case(f"group_{g}", 1, 2 * g, 2, s=37, d=24, tags="odd") for g in (2, 5, 33)),
        *(case(f"bf16_group_{g}", 1, 2 * g, 2, s=37, d=24, dtype=bf16, tags="odd") for g in (1, 2, 6)),
        *(case(f"head_{d}", 1, 2, 1, s=21, d=d, tags="odd") for d in (3, 9, 33, 127, 256)),
        *(case(f"value_{dv}", 1, 4, 1, s=21, d=24, dv=dv, tags="odd") for dv in (1, 17, 100, 256)),
        *(
            case(f"bf16_head_{d}", 1, 4, 1, s=40, d=d, dtype=bf16, tags="odd")
            for d in (1, 15, 33, 65, 256)
        ),
        *(case(f"bf16_keys_{s}", 1, 4, 1, s=s, d=32, dtype=bf16, tags="odd") for s in (3, 513)),
        *(case(f"int8_head_{d}", 1, 4, 2, s=40, d=d, cache=i8, tags="odd") for d in (15, 65)),
        case("int8_keys_600", 2, 4, 2, s=600, d=64, cache=i8),
        case("new_3", 2, 4, 2, q=3, lengths=(50, 47), s=50, d=32, tags="odd"),
        case("new_more_than_cached", 1, 2, 2, q=5, lengths=(3,), s=9, d=16, tags="odd"),
        case("new_70", 1, 4, 2, q=70, s=600, d=16, tags="odd"),
        case("new_9_bf16", 2, 6, 2, q=9, lengths=(520, 13), s=521, d=48, dtype=bf16, tags="odd"),
        *(case(f"layout_{name}", 2, 6, 3, s=25, d=20, layout=name) for name in LAYOUTS if name != "contiguous"),
        *(
            case(f"bf16_layout_{name}", 2, 6, 3, q=2, s=25, d=20, layout=name, dtype=bf16)
            for name in ("transposed", "heads_inside", "misaligned", "sliced", "every_second")
        ),
        *(case(f"paged_{b}", 3, 4, 2, lengths=(90, 1, 33), s=90, d=16, block=b, tags="odd") for b in (1, 7, 64)),
        case("paged_256_bf16", 2, 8, 2, lengths=(700, 513), s=700, d=64, block=256, dtype=bf16),
        case("paged_int8", 2, 4, 2, lengths=(70, 55), s=70, d=32, block=16, cache=i8),
        case("paged_strided", 2, 4, 2, s=70, d=32, block=16, layout="sliced"),
        case("scale", 1, 2, 2, s=12, d=16, scale=0.5),
        case("scale_zero", 1, 2, 2, s=12, d=16, scale=0.0),
        *(case(f"window_{w}", 2, 4, 2, q=3, lengths=(700, 20), s=700, d=16, window=w) for w in (1, 190)),
        case("window_bf16", 2, 4, 2, q=3, s=700, d=32, window=40, dtype=bf16),
        case("float16", 2, 4, 2, q=2, s=600, d=40, dtype=torch.float16, tags="odd"),
        case("int8_float16", 2, 4, 2, s=60, d=64, dtype=torch.float16, cache=i8),
        case("softcap", 2, 4, 2, s=60, d=16, softcap=2.0),
        case("alibi", 2, 4, 2, q=2, s=600, d=16, alibi=True),
        case("sinks", 2, 4, 2, lengths=(0, 60), s=60, d=16, sinks=True),
        case("everything", 2, 6, 2, q=4, lengths=(600, 30), s=640, d=64, block=64, window=500, softcap=5.0, alibi=True,
             sinks=True),
        case("threads", 2, 16, 4, lengths=(1500, 700), s=1500, d=64, tags="threads"),
        case("threads_odd", 1, 6, 3, q=5, s=1100, d=72, tags="threads odd"),
        case("threads_bf16", 2, 16, 4, s=1500, d=64, dtype=bf16, tags="threads"),
    ]  # fmt: skip


def attention_decode_truth(
    q, k_cache, v_cache, seqlens, table, scale, window, softcap, slopes, sinks, ks, vs
) -> Tensor:
    return attention_decode_reference(
        q.double(), k_cache, v_cache, seqlens, table, scale, window, softcap, slopes, sinks, ks, vs
    )[0]


def attention_decode_check(actual: Tensor, inputs: tuple) -> None:
    """The yardstick is the reference in eager PyTorch of the query's dtype."""
    q, _, v_cache, *_, v_scale = inputs
    assert actual.dtype == q.dtype
    truth = attention_decode_truth(*inputs)
    eager = attention_decode_reference(*inputs)[0]
    # Beside the rounding of the output: each weight has the relative error of exp2 and, with a bfloat16 cache, of its
    # rounding, which weigh at most max |v|.
    values = v_cache.float() if v_scale is None else v_cache.float() * v_scale[..., None]
    largest = values[values.isfinite()].abs().max().item() if values.isfinite().any() else 0.0
    error = tolerances.EXP2_ERROR + (tolerances.eps(q.dtype) / 2 if v_cache.dtype is torch.bfloat16 else 0.0)
    floor = tolerances.eps(q.dtype) * _largest(truth) + error * largest
    tolerances.assert_composite(actual, eager, truth, floor=floor)


def attention_decode_suite() -> Suite:
    return Suite("attention_decode", tuple(_attention_decode_cases()), attention_decode_truth, attention_decode_check)


# -- attention_varlen


def _attention_varlen_case(
    name: str,
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    *,
    keys: tuple[int, ...] | None = None,
    d: int,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi: tuple[int, ...] | None = None,
    sinks: bool = False,
    tags: str = "",
) -> Case:
    keys = lengths if keys is None else keys

    def make(generator: torch.Generator) -> tuple:
        tensors = [
            LAYOUTS[layout](torch.randn(sum(tokens), h, size, generator=generator).to(dtype))
            for tokens, h, size in ((lengths, heads, d), (keys, kv_heads, d), (keys, kv_heads, dv or d))
        ]
        ends = [F.pad(torch.tensor(n, dtype=torch.int32).cumsum(0), (1, 0)).to(torch.int32) for n in (lengths, keys)]
        slopes = torch.rand(alibi, generator=generator) / 8 if alibi else None
        sink = torch.randn(heads, generator=generator) if sinks else None
        longest = max(lengths, default=0), max(keys, default=0)
        return *tensors, *ends, *longest, causal, scale, *window, softcap, slopes, sink

    words = set(tags.split())
    if 0 in (sum(lengths), heads):
        words.add("empty")
    if layout != "contiguous":
        words.add("strided")
    if dtype is torch.bfloat16:
        words.add("bf16")
    return Case(name, make, frozenset(words))


def _attention_varlen_cases() -> list[Case]:
    case = _attention_varlen_case
    bf16 = torch.bfloat16
    return [
        case("no_sequences", (), 2, 2, d=8),
        case("no_tokens", (0, 0), 2, 2, d=8),
        case("no_heads", (3, 4), 0, 0, d=8),
        case("ones", (1,), 1, 1, d=1, tags="one"),
        case("lengths_0_and_1", (0, 1, 5, 0), 2, 1, d=16, tags="one nd"),
        case("no_keys", (2, 3), 2, 2, keys=(0, 3), d=16),
        case("primes", (7, 31, 13), 3, 1, d=29, dv=31, tags="odd"),
        case("causal", (70, 3, 64), 2, 2, d=16, causal=True, tags="odd"),
        case("causal_more_keys", (3, 1, 20), 4, 2, keys=(40, 7, 20), d=16, causal=True, tags="odd"),
        case("causal_fewer_keys", (9, 20), 2, 2, keys=(4, 20), d=16, causal=True, tags="odd"),
        case("bf16", (65, 9, 130), 4, 2, d=24, dtype=bf16, causal=True, tags="odd"),
        case("float16", (65, 9), 2, 2, d=24, dtype=torch.float16),
        *(case(f"layout_{name}", (9, 4), 3, 3, d=20, layout=name) for name in LAYOUTS if name != "contiguous"),
        case("window", (70, 20), 2, 2, d=16, window=(5, 3)),
        case("softcap", (30, 8), 2, 2, d=16, softcap=2.0),
        case("alibi", (30, 8), 4, 2, d=16, causal=True, alibi=(4,)),
        case("alibi_of_each", (30, 8), 4, 2, d=16, causal=True, alibi=(2, 4)),
        case("sinks", (30, 8), 4, 2, d=16, causal=True, sinks=True, scale=0.3),
        case("threads", (200, 3, 90, 150, 0, 60, 17, 33, 80), 4, 4, d=64, tags="threads"),
        case("threads_grouped", (100, 30, 300), 8, 2, d=64, causal=True, tags="threads odd"),
    ]


def _attention_varlen_options(inputs: tuple) -> tuple:
    q, k, v, q_ends, k_ends, _, _, causal, scale, left, right, softcap, slopes, sinks = inputs
    return q, k, v, (q_ends, k_ends, causal, scale, (left, right), softcap, slopes, sinks)


def attention_varlen_truth(*inputs) -> Tensor:
    q, k, v, options = _attention_varlen_options(inputs)
    return attention_varlen_reference(q.double(), k.double(), v.double(), *options)[0]


def attention_varlen_check(actual: Tensor, inputs: tuple) -> None:
    """The yardstick is the reference in eager PyTorch of the query's dtype."""
    q, k, v, options = _attention_varlen_options(inputs)
    assert actual.dtype == q.dtype
    truth = attention_varlen_truth(*inputs)
    eager = attention_varlen_reference(q, k, v, *options)[0].to(q.dtype)
    # Beside the rounding of the output: each weight has the relative error of exp2 and, in bfloat16, of its rounding.
    largest = v.abs().max().item() if v.numel() else 0.0
    error = tolerances.EXP2_ERROR + (tolerances.eps(q.dtype) / 2 if q.dtype is torch.bfloat16 else 0.0)
    tolerances.assert_composite(actual, eager, truth, floor=tolerances.eps(q.dtype) * _largest(truth) + error * largest)


def attention_varlen_suite() -> Suite:
    return Suite("attention_varlen", tuple(_attention_varlen_cases()), attention_varlen_truth, attention_varlen_check)


# -- attention_backward


def _attention_backward_case(
    name: str,
    *lead: int,
    q: int,
    s: int,
    d: int,
    dv: int | None = None,
    kv_lead: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    mask: tuple[int, ...] | None = None,
    mask_dtype: torch.dtype = torch.bool,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    bottom_right: bool = False,
    softcap: float = 0.0,
    slopes: tuple[int, ...] | None = None,
    sinks: bool = False,
    lse_gradient: bool = False,
    dropout_p: float = 0.0,
    tags: str = "",
) -> Case:
    """Output and log-sum-exp are those of the float64 reference, rounded."""
    floats = torch.float64 if dtype is torch.float64 else torch.float32

    def make(generator: torch.Generator) -> tuple:
        forward = _attention_case(
            name,
            *lead,
            q=q,
            s=s,
            d=d,
            dv=dv,
            kv_lead=kv_lead,
            dtype=dtype,
            layout=layout,
            mask=mask,
            mask_dtype=mask_dtype,
            causal=causal,
        )
        query, key, value, attn_mask, _, scale, gqa = forward.make(generator)
        alibi = torch.rand(slopes, generator=generator, dtype=floats) if slopes else None
        sink = torch.randn(lead[-1], generator=generator, dtype=floats) if sinks else None
        seed = torch.tensor(20) if dropout_p else None
        options = {"window": window, "softcap": softcap, "seed": seed, "alibi_slopes": alibi, "sinks": sink}
        out, lse = attention_reference(
            query.double(),
            key.double(),
            value.double(),
            attn_mask,
            dropout_p,
            causal,
            scale,
            gqa,
            causal_alignment="bottom_right" if bottom_right else "top_left",
            return_lse=True,
            **options,
        )
        grad_out = LAYOUTS[layout](torch.randn(*out.shape, generator=generator).to(dtype))
        grad_lse = torch.randn(lse.shape, generator=generator).to(floats) if lse_gradient else None
        tensors = grad_out, query, key, value, out.to(dtype), lse.to(floats), grad_lse, attn_mask
        rest = causal, scale, *window, bottom_right, softcap, alibi, sink, dropout_p, seed
        wanted = attn_mask is not None and attn_mask.is_floating_point(), alibi is not None, sink is not None
        return *tensors, *rest, *wanted

    words = set(tags.split())
    if 0 in (*lead, q, s, dv):
        words.add("empty")
    if layout != "contiguous":
        words.add("strided")
    if dtype is torch.bfloat16:
        words.add("bf16")
    if len(lead) != 2:
        words.add("nd")
    return Case(name, make, frozenset(words))


def _attention_backward_cases() -> list[Case]:
    case = _attention_backward_case
    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    return [
        case("no_batch", 0, 2, q=4, s=5, d=8),
        case("no_queries", 2, 2, q=0, s=5, d=8),
        case("no_keys", 2, 2, q=4, s=0, d=8),
        case("no_value_size", 2, 2, q=4, s=5, d=8, dv=0),
        case("ones", 1, 1, q=1, s=1, d=1, tags="one"),
        case("one_query", 1, 3, q=1, s=77, d=64, tags="one"),
        case("one_key", 1, 3, q=9, s=1, d=64, tags="one"),
        case("primes", 2, 3, q=37, s=53, d=29, dv=31, tags="odd"),
        # Row blocks of 64 and registers of 4, 8 and 16; chunks of 96 keys; ranges of 384 keys for few heads.
        *(case(f"queries_{q}", 1, 2, q=q, s=19, d=16, tags="odd") for q in (15, 17, 65)),
        *(case(f"keys_{s}", 1, 2, q=5, s=s, d=16, tags="odd") for s in (95, 97, 385)),
        *(case(f"head_{d}", 1, 2, q=5, s=21, d=d) for d in (3, 64, 80, 256)),
        case("value_1", 1, 2, q=5, s=21, d=24, dv=1),
        *(case(f"bf16_head_{d}", 1, 2, q=5, s=21, d=d, dtype=bf16, tags="odd") for d in (1, 17, 64)),
        case("bf16_keys", 1, 2, q=66, s=97, d=32, dtype=bf16, tags="odd"),
        case("f16", 1, 2, q=66, s=97, d=32, dtype=f16, causal=True),
        case("f64", 1, 2, q=9, s=11, d=5, dtype=f64, causal=True, mask=(9, 11), mask_dtype=f64, sinks=True),
        case("causal", 1, 2, q=130, s=70, d=16, causal=True, tags="odd"),
        case("causal_bottom_right", 1, 2, q=40, s=100, d=16, causal=True, bottom_right=True),
        case("window", 1, 2, q=130, s=150, d=16, window=(20, 9), bottom_right=True),
        case("window_bf16", 1, 2, q=130, s=130, d=16, window=(20, 0), dtype=bf16),
        *(
            case(f"layout_{name}", 2, 3, q=18, s=25, d=20, layout=name)
            for name in ("transposed", "heads_inside", "misaligned", "sliced", "every_second", "rows_repeated")
        ),
        case("bf16_layout_sliced", 2, 3, q=18, s=25, d=20, layout="sliced", dtype=bf16),
        case("mask", 2, 3, q=18, s=25, d=16, mask=(2, 1, 18, 25)),
        case("mask_of_keys_bf16", 2, 3, q=18, s=25, d=16, mask=(2, 1, 1, 25), dtype=bf16),
        case("mask_added", 2, 3, q=18, s=25, d=16, mask=(2, 3, 18, 25), mask_dtype=f32),
        case("mask_added_matrix", 2, 3, q=18, s=25, d=16, mask=(18, 25), mask_dtype=f32),
        case("mask_added_heads", 2, 4, q=18, s=25, d=16, mask=(4, 1, 25), mask_dtype=f32, kv_lead=(2, 2)),
        case("mask_added_bf16", 2, 3, q=18, s=25, d=16, mask=(2, 1, 18, 25), mask_dtype=bf16, dtype=bf16),
        case("softcap", 2, 3, q=18, s=25, d=16, softcap=2.0, mask=(18, 25), mask_dtype=f32),
        case("alibi", 2, 3, q=18, s=25, d=16, slopes=(3,), causal=True),
        case("alibi_of_batches_bf16", 2, 3, q=18, s=25, d=16, slopes=(2, 3), bottom_right=True, dtype=bf16),
        case("sinks", 2, 3, q=18, s=25, d=16, sinks=True, lse_gradient=True, causal=True),
        case("dropout", 2, 3, q=38, s=45, d=16, dropout_p=0.3),
        case("dropout_bf16", 2, 3, q=38, s=45, d=16, dropout_p=0.3, causal=True, dtype=bf16),
        case("grouped", 2, 6, q=21, s=40, d=16, kv_lead=(2, 2), causal=True),
        case("matrices", q=9, s=12, d=16),
        case("three_dimensions", 3, q=9, s=12, d=16, lse_gradient=True),
        case(
            "threads",
            2,
            4,
            q=130,
            s=190,
            d=64,
            mask=(1, 4, 130, 190),
            mask_dtype=f32,
            slopes=(4,),
            sinks=True,
            tags="threads",
        ),
        case("threads_ranges", 1, 2, q=259, s=900, d=32, causal=True, bottom_right=True, tags="threads odd"),
        case("threads_bf16", 1, 4, q=200, s=300, d=64, dtype=bf16, tags="threads"),
    ]


def attention_backward_options(inputs: tuple) -> dict:
    """The keyword arguments of the reference."""
    causal, scale, left, right, bottom_right, softcap, alibi, sinks, dropout_p, seed = inputs[8:18]
    return {
        "attn_mask": inputs[7],
        "dropout_p": dropout_p,
        "is_causal": causal,
        "scale": scale,
        "grad_lse": inputs[6],
        "window": (left, right),
        "softcap": softcap,
        "alibi_slopes": alibi,
        "sinks": sinks,
        "causal_alignment": "bottom_right" if bottom_right else "top_left",
        "seed": seed,
    }


def attention_backward_truth(*inputs) -> tuple[Tensor, ...]:
    options = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in attention_backward_options(inputs).items()
    }
    return _all_six(attention_backward_reference(*(t.double() for t in inputs[:4]), **options), inputs)


def _all_six(gradients: list[Tensor], inputs: tuple) -> tuple[Tensor, ...]:
    """With an empty one for each that is not wanted."""
    rest = iter(gradients[3:])
    return *gradients[:3], *(next(rest) if want else gradients[0].new_empty(0) for want in inputs[18:21])


def attention_backward_check(actual: tuple[Tensor, ...], inputs: tuple) -> None:
    grad_out, query, key, value = inputs[:4]
    truths = attention_backward_truth(*inputs)
    # The same in plain PyTorch, of the same dtype.
    options = attention_backward_options(inputs)
    if options["attn_mask"] is not None and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(query.dtype)
    eager = _all_six(attention_backward_reference(grad_out, query, key, value, **options), inputs)
    names = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks")
    # A sum may cancel: each of its terms dS is rounded like dP, a product over the value size.
    largest = 0.0
    if grad_out.numel() and value.numel():
        largest = (grad_out.double().norm(dim=-1).amax() * value.double().norm(dim=-1).amax()).item()
    for name, got, other, truth in zip(names, actual, eager, truths, strict=True):
        roundings = 8 * tolerances.EPS_ACC * largest + tolerances.eps(got.dtype) * _largest(truth)
        tolerances.assert_composite(got, other.to(got.dtype), truth, floor=roundings, what=name)


def attention_backward_suite() -> Suite:
    return Suite(
        "attention_backward", tuple(_attention_backward_cases()), attention_backward_truth, attention_backward_check
    )


# -- concatenate


def _concatenate_case(
    *shapes: tuple[int, ...],
    dim: int,
    dtype: torch.dtype = torch.float32,
    layouts: tuple[str, ...] = (),
    tags: str = "",
) -> Case:
    """layouts: of each tensor; contiguous where there are fewer."""

    def make(generator: torch.Generator) -> tuple:
        tensors = [_values(shape, dtype, generator) for shape in shapes]
        return [_laid_out(t, layout) for t, layout in zip(tensors, _all_layouts(shapes, layouts), strict=True)], dim

    names = [
        "x".join(map(str, shape)) + ("" if layout == "contiguous" else f"_{layout}")
        for shape, layout in zip(shapes, _all_layouts(shapes, layouts), strict=True)
    ]
    words = set(tags.split()) | ({"empty"} if all(0 in shape for shape in shapes) else set())
    words |= {"strided"} if set(layouts) - {"contiguous", "last"} else set()
    words |= {"bf16"} if dtype is torch.bfloat16 else set()
    words |= {"nd"} if len(shapes[0]) != 2 else set()
    return Case(f"{'-'.join(names)}-dim{dim}-{_dtype_name(dtype)}", make, frozenset(words))


def _all_layouts(shapes, layouts: tuple[str, ...]) -> list[str]:
    return [*layouts, *["contiguous"] * (len(shapes) - len(layouts))]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers that each dtype has a few of, among them halves and zeros."""
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x if dtype.is_floating_point else (40 * x).abs() if dtype is torch.uint8 else 40 * x).to(dtype)


def _laid_out(t: Tensor, layout: str) -> Tensor:
    return IMAGE_LAYOUTS[layout](t) if layout in IMAGE_LAYOUTS and t.ndim >= 3 else LAYOUTS[layout](t)


def concatenate_truth(tensors: list[Tensor], dim: int) -> Tensor:
    return concatenate_reference([t.double() for t in tensors], dim)


def concatenate_check(actual: Tensor, inputs: tuple) -> None:
    tolerances.assert_exact(actual, concatenate_reference(*inputs))


def concatenate_suite() -> Suite:
    case = _concatenate_case
    images = (2, 5, 7, 6), (2, 3, 7, 6)
    cases = (
        case((0, 4), (0, 4), dim=0),
        case((3, 0), (3, 4), dim=1),
        case((1,), dim=0, tags="one"),
        case((3,), (5,), (1,), dim=-1, tags="odd"),
        case((3, 17), (3, 5), dim=1, tags="odd"),
        case((3, 17), (2, 17), dim=0, dtype=torch.bfloat16, tags="odd"),
        *(case(*images, dim=dim, layouts=("last", "last")) for dim in (1, -3)),
        case((2, 5, 7, 6), (2, 5, 3, 6), dim=2, layouts=("last", "contiguous"), tags="odd"),
        case(*images, dim=1, layouts=("last_sliced", "turned")),
        case((2, 5, 4), (2, 5, 7), dim=2, layouts=("every_third", "rows_repeated")),
        *(
            case((4, 33), (4, 31), dim=1, dtype=dtype, layouts=("transposed", "sliced"))
            for dtype in (torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float64)
        ),
        case((8, 64, 28, 28), (8, 32, 28, 28), dim=1, tags="threads"),
        case((8, 64, 28, 28), (8, 32, 28, 28), dim=1, layouts=("last", "last"), tags="threads"),
    )
    return Suite("concatenate", cases, concatenate_truth, concatenate_check)


# -- copy


def _copy_case(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    to: torch.dtype | None = None,
    layout: str = "contiguous",
    order: tuple[int, ...] | None = None,
    out: str = "contiguous",
    tags: str = "",
) -> Case:
    """order: a permutation of what lies in `layout`."""

    def make(generator: torch.Generator) -> tuple:
        x = _laid_out(_values(shape, dtype, generator), layout)
        return x if order is None else x.permute(order), to, out

    name = f"{'x'.join(map(str, shape)) or 'scalar'}-{_dtype_name(dtype)}" + (f"-to_{_dtype_name(to)}" if to else "")
    name += f"-{layout}" if layout != "contiguous" else ""
    name += f"-order{''.join(map(str, order))}" if order else ""
    name += f"-{out}" if out != "contiguous" else ""
    words = set(tags.split()) | ({"empty"} if 0 in shape else set()) | ({"nd"} if len(shape) != 2 else set())
    words |= {"strided"} if layout not in ("contiguous", "last") or order else set()
    words |= {"bf16"} if torch.bfloat16 in (dtype, to) else set()
    return Case(name, make, frozenset(words))


def copy_truth(x: Tensor, dtype: torch.dtype | None, layout: str) -> Tensor:
    return copy_reference(x, torch.float64)


def copy_check(actual: Tensor, inputs: tuple) -> None:
    x, dtype, layout = inputs
    tolerances.assert_exact(actual, copy_reference(x, dtype))
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert actual.is_contiguous(memory_format=form)


def copy_suite() -> Suite:
    case, bf16 = _copy_case, torch.bfloat16
    floats = (torch.float32, bf16, torch.float16)
    sized = (torch.int8, torch.float16, torch.float32, torch.int64)
    cases = (
        case(0, 5),
        case(),
        case(1, 1, tags="one"),
        case(3, 17, tags="odd"),
        case(3, 17, layout="transposed", tags="odd"),
        case(37, 131, dtype=bf16, layout="transposed", tags="odd"),
        case(2, 3, 5, layout="every_third", tags="odd"),
        *(case(67, 83, dtype=dtype, layout="transposed") for dtype in sized),
        *(case(16, 64, dtype=dtype, order=(1, 0)) for dtype in sized),
        *(case(5, 7, 9, 11, dtype=dtype, order=order) for dtype in sized for order in ((3, 1, 0, 2), (0, 2, 1, 3))),
        *(
            case(7, 40, dtype=dtype, layout=layout)
            for dtype in (torch.float32, torch.int16)
            for layout in (
                "misaligned",
                "sliced",
                "every_second",
                "rows_repeated",
                "columns_repeated",
                "batch_repeated",
            )
        ),
        # Heads that are split off and merged.
        case(2, 9, 3, 20, order=(0, 2, 1, 3)),
        case(2, 9, 3, 20, order=(0, 2, 3, 1), dtype=bf16),
        case(2, 9, 3, 320, order=(0, 2, 1, 3)),
        # Images from one layout to the other.
        case(2, 19, 7, 9, out="channels_last", tags="odd"),
        case(2, 3, 20, 33, out="channels_last", dtype=bf16),
        case(2, 19, 7, 9, layout="last", tags="odd"),
        case(2, 19, 7, 9, layout="last", out="channels_last"),
        case(2, 19, 7, 9, layout="last_sliced", to=bf16),
        case(1, 70, 17, 19, layout="first_sliced", out="channels_last", dtype=bf16, to=torch.float32),
        *(
            case(9, 37, dtype=dtype, to=to, layout=layout)
            for dtype in (*floats, torch.bool)
            for to in (*floats, torch.bool)
            for layout in ("contiguous", "transposed")
            if dtype is not to
        ),
        *(case(9, 37, dtype=torch.int8, to=to, layout=layout) for to in floats for layout in ("sliced", "transposed")),
        *(
            case(9, 37, dtype=dtype, to=torch.float32, layout=layout)
            for dtype in (torch.int32, torch.int64)
            for layout in ("contiguous", "transposed", "every_third")
        ),
        case(131, 1777, tags="threads odd"),
        case(131, 1777, layout="transposed", tags="threads odd"),
        case(4, 64, 40, 41, out="channels_last", tags="threads"),
        case(4, 64, 40, 41, layout="last", tags="threads"),
    )
    return Suite("copy", cases, copy_truth, copy_check)


# -- elementwise


def _elementwise_case(
    what: str,
    program: list[tuple],
    *shapes: tuple[int, ...],
    constants: tuple[float, ...] = (),
    dtype: torch.dtype = torch.float32,
    dtypes: tuple[torch.dtype, ...] = (),
    layouts: tuple[str, ...] = (),
    tags: str = "",
) -> Case:
    """dtype: of the result. dtypes and layouts: of each input; float32 and contiguous where there are fewer."""
    given = [*dtypes, *[torch.float32] * (len(shapes) - len(dtypes))]
    forms = _all_layouts(shapes, layouts)

    def make(generator: torch.Generator) -> tuple:
        tensors = [_values(shape, d, generator) for shape, d in zip(shapes, given, strict=True)]
        tensors = [_laid_out(t, form) for t, form in zip(tensors, forms, strict=True)]
        return tensors, list(elementwise_program(program)), list(constants), dtype

    names = ["x".join(map(str, shape)) or "scalar" for shape in shapes]
    names = [f"{n}_{_dtype_name(d)}" if d is not torch.float32 else n for n, d in zip(names, given, strict=True)]
    names = [f"{n}_{form}" if form != "contiguous" else n for n, form in zip(names, forms, strict=True)]
    words = set(tags.split()) | ({"empty"} if any(0 in shape for shape in shapes) else set())
    words |= {"strided"} if set(layouts) - {"contiguous", "last"} else set()
    words |= {"bf16"} if torch.bfloat16 in (dtype, *given) else set()
    words |= {"nd"} if max(map(len, shapes)) != 2 else set()
    to = f"-to_{_dtype_name(dtype)}" if dtype is not torch.float32 else ""
    return Case("-".join([what, *names]) + to, make, frozenset(words))


def elementwise_truth(inputs: list[Tensor], program: list[int], constants: list[float], dtype: torch.dtype) -> Tensor:
    return elementwise_reference([t.double() for t in inputs], instructions(program), constants)


def elementwise_check(actual: Tensor, inputs: tuple) -> None:
    tensors, program, constants, dtype = inputs
    truth = elementwise_truth(*inputs)
    if dtype is torch.bool:
        return tolerances.assert_exact(actual, truth != 0)
    eager = elementwise_reference([t.float() for t in tensors], instructions(program), constants).to(dtype)
    finite = truth[truth.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    # The programs of the cases do not enlarge what an instruction is off by more than fourfold.
    floor = tolerances.eps(dtype) * largest
    floor += 4 * sum(tolerances.instruction_error(name, largest) for name, *_ in instructions(program))
    tolerances.assert_composite(actual, eager, truth, floor=floor)


# Programs that models have between their layers: operands are inputs, then constants, then results.
_ADD_RELU = [("add", 0, 1), ("relu", 2)]
_SCALE_SHIFT = [("mul", 0, 1), ("add", 3, 2)]
_BIAS_GELU_ADD = [("add", 0, 1), ("gelu", 3), ("add", 4, 2)]
_ROTATE = [("mul", 0, 1), ("mul", 2, 3), ("add", 4, 5)]
_CENTRE = [("sub", 0, 1), ("mul", 3, 2)]
_HARDSWISH = [("add", 0, 1), ("maximum", 4, 2), ("minimum", 5, 3), ("mul", 0, 6), ("div", 7, 3)]
_MASKED = [("where", 0, 1, 2)]
_BETWEEN = [("ge", 0, 1), ("lt", 0, 2), ("logical_and", 3, 4)]
_GATED = [("silu", 0), ("mul", 2, 1)]
_LONG = [
    *(("mul", 0, 1), ("tanh", 2), ("sigmoid", 0), ("mul", 3, 4)),
    *(("exp", 2), ("sigmoid", 6), ("add", 5, 7), ("erf", 8)),
]


def elementwise_suite() -> Suite:
    case, bf16, truth = _elementwise_case, torch.bfloat16, torch.bool
    bf16s = (bf16,) * 4
    images, channels = (2, 19, 7, 9), (19, 1, 1)
    limits = (3.0, 0.0, 6.0)
    cases = (
        case("add_relu", _ADD_RELU, (0, 5), (5,)),
        case("add_relu", _ADD_RELU, (2, 0, 3), (1, 3)),
        case("add_relu", _ADD_RELU, (), ()),
        case("add_relu", _ADD_RELU, (1, 1), (1,), tags="one"),
        case("add_relu", _ADD_RELU, (3, 17), (3, 17), tags="odd"),
        case("scale_shift", _SCALE_SHIFT, (5, 37), (37,), (5, 1), tags="odd"),
        case("bias_gelu_add", _BIAS_GELU_ADD, (3, 131), (131,), (3, 131), dtypes=bf16s[:3], dtype=bf16, tags="odd"),
        case("centre", _CENTRE, (7, 61), (7, 1), (7, 1), tags="odd"),
        case("hardswish", _HARDSWISH, (5, 67), constants=limits, tags="odd"),
        case("between", _BETWEEN, (5, 67), (67,), (), dtype=truth, tags="odd"),
        # Tiles: one and several, whole and not, of rows that are shorter and longer.
        *(case("add_relu", _ADD_RELU, (n,), (n,)) for n in (15, 16, 17, 1023, 1024, 1025, 5000)),
        *(case("scale_shift", _SCALE_SHIFT, (m, n), (n,), (n,)) for m, n in ((1030, 1), (517, 3), (40, 64), (3, 1500))),
        *(case("scale_shift", _SCALE_SHIFT, (m, n), (m, 1), (1, 1)) for m, n in ((517, 3), (40, 64), (3, 1500))),
        case("scale_shift", _SCALE_SHIFT, (3, 1, 5, 1, 7), (2, 1, 6, 1), (1, 1, 1, 1)),
        case("scale_shift", _SCALE_SHIFT, (2, 3, 4, 5, 6, 2), (3, 1, 5, 1, 2), (2, 1, 4, 1, 6, 1)),
        # Images: a bias of each channel in both layouts, layouts that differ.
        *(
            case("scale_shift", _SCALE_SHIFT, images, channels, channels, layouts=(form,))
            for form in ("contiguous", "last")
        ),
        case("add_relu", _ADD_RELU, images, images, layouts=("last", "last")),
        case("add_relu", _ADD_RELU, images, images, layouts=("last", "contiguous")),
        case("add_relu", _ADD_RELU, images, images, layouts=("contiguous", "last"), dtypes=bf16s[:2], dtype=bf16),
        case("add_relu", _ADD_RELU, channels, images, layouts=("contiguous", "last_sliced")),
        *(
            case("rotate", _ROTATE, *[(2, 9, 40)] * 4, layouts=(form, "contiguous", form), dtypes=d)
            for form in ("transposed", "misaligned", "sliced", "every_third", "rows_repeated", "columns_repeated")
            for d in ((), bf16s)
        ),
        case("masked", _MASKED, (4, 1, 33), (2, 4, 5, 33), (), dtypes=(truth,)),
        case("masked", _MASKED, (5, 33), (), (5, 33), dtypes=(truth, bf16, bf16), dtype=bf16, layouts=("transposed",)),
        case("masked", _MASKED, (5, 33), (33,), (5, 1), dtypes=(truth, truth, truth), dtype=truth),
        case("between", _BETWEEN, (2, 5, 33), (33,), (5, 1), dtype=truth, dtypes=(bf16,), layouts=("every_second",)),
        case("not", [("logical_not", 0)], (3, 40), dtype=truth, layouts=("sliced",)),
        case("gated", _GATED, (6, 200), (6, 200), dtypes=bf16s[:2], dtype=bf16, layouts=("sliced", "sliced")),
        case("gated", _GATED, (6, 200), (6, 200), dtypes=(bf16,), dtype=torch.float32),
        case("long", _LONG, (5, 333), (333,)),
        case("scale_shift", _SCALE_SHIFT, (131, 1777), (1777,), (1777,), tags="threads odd"),
        case("bias_gelu_add", _BIAS_GELU_ADD, (128, 768), (768,), (128, 768), tags="threads"),
        case("scale_shift", _SCALE_SHIFT, (4, 70, 33, 31), (70, 1, 1), (70, 1, 1), layouts=("last",), tags="threads"),
        case("add_relu", _ADD_RELU, (4, 70, 33, 31), (4, 70, 33, 31), layouts=("last",), tags="threads"),
    )
    return Suite("elementwise", cases, elementwise_truth, elementwise_check)


# -- conv2d


def _conv2d_case(
    *lead: int,
    c: int,
    hw: tuple[int, int],
    n: int,
    k: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    winograd: int = 0,
    activation: str = "none",
    pool: str = "none",
    pool_sizes: tuple[int, ...] = (),
    residual: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    tags: str = "",
) -> Case:
    def pair(value: int | tuple[int, ...]) -> list[int]:
        return [value, value] if isinstance(value, int) else list(value)

    kernel, options = pair(k), (pair(stride), pair(padding), pair(dilation), groups)

    def make(generator: torch.Generator) -> tuple:
        x = torch.randn(*lead, c, *hw, generator=generator).to(dtype)
        weight = torch.randn(n, c // groups, *kernel, generator=generator)
        weight = (weight / max(1, weight[0].numel() if n else 1) ** 0.5).to(dtype)
        b = torch.randn(n, generator=generator).to(dtype) if bias else None
        r = None
        if residual:
            shape = conv2d_reference(x.double(), weight.double(), None, None, *options).shape
            r = torch.randn(shape, generator=generator).to(dtype)
        if layout == "channels_last":
            x = x.movedim(-3, -1).contiguous().movedim(-1, -3)
        else:
            x = LAYOUTS[layout](x)
        return x, weight, b, r, *options, winograd, activation, pool, list(pool_sizes)

    words = set(tags.split())
    if 0 in (*lead, c, n):
        words.add("empty")
    if layout != "contiguous":
        words.add("strided")
    if dtype is torch.bfloat16:
        words.add("bf16")
    if len(lead) != 1:
        words.add("nd")
    sizes = "x".join(map(str, (*lead, c, *hw, n)))
    name = f"{sizes}-k{'x'.join(map(str, kernel))}"
    for word, value, plain in (
        ("s", stride, 1),
        ("p", padding, 0),
        ("d", dilation, 1),
        ("g", groups, 1),
        ("f", winograd, 0),
    ):
        name += "" if value == plain else f"-{word}{value}".replace(", ", "x").strip("()")
    name += f"-{activation}" if activation != "none" else ""
    name += f"-{pool}" if pool != "none" else ""
    name += "-residual" if residual else ""
    name += "-nobias" if not bias else ""
    name += f"-{layout}" if layout != "contiguous" else ""
    name += "-bf16" if dtype is torch.bfloat16 else ""
    return Case(name, make, frozenset(words))


def _conv2d_cases() -> list[Case]:
    case, bf16, last = _conv2d_case, torch.bfloat16, "channels_last"
    halves, thirds = (2, 2, 2, 2, 0, 0), (3, 2, 2, 1, 1, 1)
    wino = {"padding": 1, "residual": True}
    return [
        case(0, c=3, hw=(5, 5), n=4),
        case(1, c=1, hw=(1, 1), n=1, k=1, tags="one"),
        case(1, c=1, hw=(3, 3), n=1, tags="one"),
        case(c=5, hw=(7, 9), n=6, padding=1, tags="odd"),
        # Around the panel of 32, its half, and the vectors of 4, 8 and 16.
        *(
            case(1, c=c, hw=(5, 7), n=n, k=(1, 2), tags="odd")
            for c, n in ((1, 15), (3, 16), (4, 17), (17, 33), (7, 49))
        ),
        case(2, c=3, hw=(17, 19), n=20, k=7, stride=2, padding=3, activation="relu", tags="odd"),
        case(2, c=3, hw=(17, 19), n=20, k=5, stride=(2, 3), padding=(1, 2), dilation=(2, 1), tags="odd"),
        case(1, c=6, hw=(9, 8), n=10, k=4, padding=(1, 2, 1, 2), residual=True, tags="odd"),
        case(1, c=20, hw=(6, 5), n=48, groups=4, padding=1, activation="relu6", tags="odd"),
        case(1, c=3, hw=(9, 9), n=21, groups=3, padding=2, dilation=2, tags="odd"),
        case(2, c=19, hw=(9, 30), n=19, groups=19, padding=1, activation="hardswish", tags="odd"),
        case(1, c=33, hw=(9, 8), n=33, k=7, groups=33, padding=3, residual=True, layout=last),
        case(1, c=512, hw=(7, 7), n=20, k=1, layout=last),
        case(1, c=512, hw=(7, 7), n=20, k=1, stride=2, layout=last),
        case(1, c=3, hw=(2, 2), n=4, padding=3),
        case(2, c=8, hw=(11, 13), n=40, k=1, activation="silu", residual=True, layout=last, bias=False),
        case(2, c=8, hw=(11, 13), n=40, padding=1, activation="gelu", layout="every_second", bias=False),
        case(2, c=8, hw=(11, 13), n=40, padding=1, layout="batch_repeated"),
        case(2, c=8, hw=(11, 13), n=40, padding=1, layout="sliced"),
        *(
            case(2, c=c, hw=hw, n=n, winograd=f, layout=layout, **wino, tags="odd")
            for f in (2, 4)
            for c, hw, n, layout in (
                (3, (5, 7), 20, "contiguous"),
                (17, (8, 8), 33, last),
                (64, (13, 31), 16, last),
                (5, (1, 1), 65, "contiguous"),
            )
        ),
        case(1, c=20, hw=(12, 9), n=24, winograd=2, activation="tanh", layout=last, dtype=bf16, padding=1),
        case(1, c=20, hw=(12, 9), n=24, winograd=2, padding=(0, 2), pool="max", pool_sizes=halves, activation="relu"),
        case(1, c=20, hw=(33, 9), n=24, winograd=4, padding=1, pool="avg", pool_sizes=thirds, layout=last),
        case(2, c=1, hw=(28, 28), n=6, k=5, padding=2, activation="relu", pool="max", pool_sizes=halves),
        # Columns in the lanes, where there are fewer output channels than lanes.
        case(
            2, c=3, hw=(11, 37), n=7, k=(3, 4), stride=(2, 1), padding=(1, 4, 0, 5), dilation=(1, 2), activation="silu"
        ),
        case(1, c=2, hw=(20, 70), n=5, padding=1, pool="avg", pool_sizes=thirds, tags="threads"),
        case(1, c=3, hw=(40, 40), n=18, k=7, stride=2, padding=3, pool="max", pool_sizes=thirds, layout=last),
        case(1, c=19, hw=(9, 9), n=19, groups=19, pool="avg", pool_sizes=halves, residual=True),
        case(1, c=9, hw=(9, 7), n=35, padding=1, pool="max", pool_sizes=thirds, dtype=bf16),
        case(1, c=9, hw=(9, 7), n=35, stride=2, dtype=bf16, residual=True, layout=last, activation="quick_gelu"),
        case(2, c=64, hw=(28, 28), n=96, padding=1, winograd=2, activation="relu", layout=last, tags="threads"),
        case(2, c=64, hw=(28, 28), n=96, padding=1, winograd=4, pool="max", pool_sizes=halves, tags="threads"),
        case(1, c=96, hw=(14, 14), n=96, padding=1, stride=2, residual=True, tags="threads"),
        case(2, c=96, hw=(28, 28), n=96, groups=96, padding=1, activation="gelu_tanh", layout=last, tags="threads"),
    ]


def conv2d_truth(x, weight, bias, residual, stride, padding, dilation, groups, winograd, *rest) -> Tensor:
    x, weight, bias, residual = (None if t is None else t.double() for t in (x, weight, bias, residual))
    return conv2d_reference(x, weight, bias, residual, stride, padding, dilation, groups, *rest)


def conv2d_check(actual: Tensor, inputs: tuple) -> None:
    x, weight, bias, residual, stride, padding, dilation, groups, winograd, activation, pool, pool_sizes = inputs
    assert actual.dtype == x.dtype
    sizes = (stride, padding, dilation, groups)
    before = conv2d_truth(x, weight, bias, residual, *sizes, 0, "none", "none", [])
    positive = (None if t is None else t.double().abs() for t in (x, weight, bias, residual))
    magnitude = conv2d_reference(*positive, *sizes)
    terms = weight[0].numel() + 2 if weight.shape[0] else 2
    if winograd:
        around = padding if len(padding) == 4 else [padding[0], padding[0], padding[1], padding[1]]
        padded = F.pad(x.double(), (around[2], around[3], around[0], around[1]))
        magnitude = magnitude + tolerances.winograd_magnitude(padded, weight.double(), winograd)
        terms = weight.shape[1] + 2 + tolerances.WINOGRAD_ROUNDINGS
    extra = tolerances.activation_error(activation, before)
    if pool != "none":
        window = (pool_sizes[0:2], pool_sizes[2:4], pool_sizes[4:6])
        magnitude, extra = F.max_pool2d(magnitude, *window), F.max_pool2d(extra, *window)
        terms += 0 if pool == "max" else pool_sizes[0] * pool_sizes[1]
    slope = tolerances.ACTIVATION_SLOPE[activation]
    tolerances.assert_sum(
        actual, conv2d_truth(*inputs), terms=terms, magnitude=slope * magnitude, extra=extra, what=activation
    )


def conv2d_suite() -> Suite:
    return Suite("conv2d", _unique(_conv2d_cases()), conv2d_truth, conv2d_check)


# -- layer_norm, rms_norm


def _norm_case(
    op: str,
    *lead: int,
    row: int | tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    residual: torch.dtype | None = None,
    layout: str = "contiguous",
    residual_layout: str | None = None,
    weight: torch.dtype | None = torch.float32,
    bias: torch.dtype | None = torch.float32,
    offset: float = 0.0,
    scale: float = 1.0,
    eps: float = 1e-5,
    tags: str = "",
) -> Case:
    shape = (row,) if isinstance(row, int) else row
    residual_layout = residual_layout or layout

    def make(generator: torch.Generator) -> tuple:
        def parameter(of: torch.dtype | None) -> Tensor | None:
            # The second half of a longer one: its last stride is 1, but it starts anywhere.
            return None if of is None else torch.randn(2, *shape, generator=generator).to(of)[1]

        def rows(of: torch.dtype, layout: str) -> Tensor:
            return LAYOUTS[layout]((offset + scale * torch.randn(*lead, *shape, generator=generator)).to(of))

        x = rows(dtype, layout)
        added = None if residual is None else rows(residual, residual_layout)
        affine = (parameter(weight), parameter(bias)) if op == "layer_norm" else (parameter(weight),)
        return x, list(shape), *affine, eps, added

    short = {torch.float32: "f32", torch.bfloat16: "bf16", None: "none"}
    name = "x".join(map(str, lead)) + "-" + "x".join(map(str, shape)) + f"-{short[dtype]}"
    name += f"-{layout}" if layout != "contiguous" else ""
    name += f"-add-{short[residual]}" if residual else ""
    name += f"-{residual_layout}" if residual_layout != layout else ""
    name += f"-weight-{short[weight]}" if weight is not torch.float32 else ""
    name += f"-bias-{short[bias]}" if bias is not torch.float32 else ""
    name += f"-offset{offset:g}" if offset else ""
    name += f"-scale{scale:g}" if scale != 1.0 else ""
    words = set(tags.split())
    if 0 in (*lead, *shape):
        words.add("empty")
    if layout != "contiguous" or residual_layout != "contiguous":
        words.add("strided")
    if torch.bfloat16 in (dtype, residual):
        words.add("bf16")
    if len(lead) != 1 or len(shape) != 1:
        words.add("nd")
    return Case(name, make, frozenset(words))


def _norm_cases(op: str) -> list[Case]:
    def case(*lead: int, **options) -> Case:
        return _norm_case(op, *lead, **options)

    f32, bf16 = torch.float32, torch.bfloat16
    # Registers of 4, 8 and 16, four chains of them, blocks of 4096.
    sizes = (2, 3, 5, 15, 16, 17, 31, 63, 64, 65, 67, 127, 129, 384, 769, 4095, 4097, 9001)
    # "heads_inside" needs three dimensions of [..., row].
    strided = [name for name in LAYOUTS if name not in ("contiguous", "heads_inside", "columns_repeated")]
    return [
        case(0, row=8),
        case(3, row=0),
        case(2, 0, 3, row=4, residual=f32),
        case(0, row=8, dtype=bf16, residual=f32),
        case(1, row=1, tags="one"),
        case(7, row=1, tags="one"),
        case(5, row=1, dtype=bf16, residual=bf16, tags="one"),
        case(1, row=300, tags="one"),
        *(case(3, row=n, tags="odd") for n in sizes),
        *(case(3, row=n, dtype=bf16, tags="odd") for n in sizes[::3]),
        *(case(5, row=n, residual=f32, tags="odd") for n in sizes[1::3]),
        case(5, row=67, dtype=bf16, residual=bf16, tags="odd"),
        case(5, row=67, dtype=f32, residual=bf16, tags="odd"),
        case(5, row=67, dtype=bf16, residual=f32, tags="odd"),
        *(case(7, row=37, layout=name) for name in strided),
        *(case(7, row=37, layout=name, residual=f32) for name in ("transposed", "sliced", "rows_repeated")),
        *(case(7, row=37, layout=name, dtype=bf16, residual=f32) for name in ("transposed", "misaligned", "sliced")),
        case(7, row=37, residual=f32, residual_layout="every_third"),
        case(7, row=37, dtype=bf16, layout="every_second", residual=bf16, residual_layout="contiguous"),
        case(2, 3, 4, row=24, layout="heads_inside"),
        case(2, 3, 4, row=24, layout="heads_inside", residual=f32, residual_layout="batch_repeated"),
        case(2, 3, row=(4, 5), layout="heads_inside"),
        case(2, 3, row=(4, 5), layout="transposed", residual=f32, residual_layout="contiguous"),
        case(2, row=(3, 4, 5), tags="odd"),
        case(row=21),
        case(1, 1, 1, 4, row=12),
        *(case(5, row=70, weight=w, bias=b) for w, b in ((None, f32), (f32, None), (None, None), (bf16, bf16))),
        case(5, row=70, dtype=bf16, weight=bf16, bias=bf16),
        # Far from zero: eps of float32 times 1e4 is a thousandth of the deviation.
        case(5, row=769, offset=1e4),
        case(5, row=769, offset=-1e4, residual=f32),
        case(5, row=769, scale=1e4),
        case(5, row=769, scale=1e-4),
        case(300, row=257, residual=f32, tags="threads odd"),
        case(2, 64, row=768, dtype=bf16, residual=bf16, tags="threads"),
        case(2, 64, row=768, residual=f32, layout="transposed", tags="threads"),
    ]


def _unique(cases: list[Case]) -> tuple[Case, ...]:
    return tuple({case.id: case for case in cases}.values())


def _norm_double(inputs: tuple) -> tuple:
    return tuple(i.double() if isinstance(i, Tensor) else i for i in inputs)


def _norm_check(actual: Tensor, inputs: tuple, truth: Tensor, eager: Callable[..., Tensor]) -> None:
    x, shape, *rest, residual = inputs
    total = x if residual is None else x + residual
    assert actual.dtype == total.dtype
    assert actual.is_contiguous()
    # torch refuses bfloat16 parameters beside a float32 input.
    rest = [p.to(total.dtype) if isinstance(p, Tensor) else p for p in rest]
    tolerances.assert_composite(actual, eager(total, shape, *rest), truth)


def layer_norm_truth(*inputs) -> Tensor:
    return layer_norm_reference(*_norm_double(inputs))


def layer_norm_check(actual: Tensor, inputs: tuple) -> None:
    _norm_check(actual, inputs, layer_norm_truth(*inputs), F.layer_norm)


def layer_norm_suite() -> Suite:
    return Suite("layer_norm", _unique(_norm_cases("layer_norm")), layer_norm_truth, layer_norm_check)


def rms_norm_truth(*inputs) -> Tensor:
    return rms_norm_reference(*_norm_double(inputs))


def rms_norm_check(actual: Tensor, inputs: tuple) -> None:
    _norm_check(actual, inputs, rms_norm_truth(*inputs), F.rms_norm)


def rms_norm_suite() -> Suite:
    # Rows, strides and the loops over a row are layer_norm's: half of its cases is enough.
    return Suite("rms_norm", _unique(_norm_cases("rms_norm")[::2]), rms_norm_truth, rms_norm_check)


# -- lstm, gru, rnn_tanh, rnn_relu, int8_lstm, int8_gru

_RNN_GATES = {torch.nn.LSTM: 4, torch.nn.GRU: 3, torch.nn.RNN: 1}


def rnn_module(op: str) -> type[torch.nn.RNNBase]:
    """torch's class of layers that a recurrent op computes."""
    return getattr(torch.nn, op.removeprefix("int8_").split("_")[0].upper())


def _rnn_case(
    name: str,
    op: str,
    *,
    t: int = 3,
    b: int = 2,
    i: int = 5,
    h: int = 7,
    layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    biases: bool = True,
    proj: int = 0,
    states: bool = True,
    lengths: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    tags: str = "",
) -> Case:
    """`lengths`, falling, makes packed input of that many sequences. Weights are torch's own initial ones."""
    module = rnn_module(op)
    options = {"proj_size": proj} if proj else {}
    is_int8 = op.startswith("int8_")

    def make(generator: torch.Generator) -> tuple:
        layer = module(i, h, layers, bias=biases, batch_first=batch_first, bidirectional=bidirectional, **options)
        weights = [((2 * torch.rand(w.shape, generator=generator) - 1) / h**0.5).to(dtype) for w in layer._flat_weights]
        parts, batch, sizes = layers * (2 if bidirectional else 1), b, None
        if lengths is not None:
            batch = len(lengths)
            sizes = torch.tensor([sum(length > step for length in lengths) for step in range(lengths[0])])
            x = torch.randn(int(sizes.sum()), i, generator=generator)
        else:
            x = torch.randn(*((b, t) if batch_first else (t, b)), i, generator=generator)
        widths = (proj or h, h)[: 2 if module is torch.nn.LSTM else 1]
        starts = [torch.randn(parts, batch, w, generator=generator).to(dtype) if states else None for w in widths]
        scales = []
        if is_int8:
            quantized = [lamina.quant.quantize_weight(w) if w.ndim == 2 else (w.float(), None) for w in weights]
            weights, scales = [w for w, _ in quantized], [[scale for _, scale in quantized if scale is not None]]
        how = (biases, layers, bidirectional, batch_first)
        return LAYOUTS[layout](x.to(dtype)), sizes, *starts, weights, *scales, *how

    words = set(tags.split())
    if b == 0:
        words.add("empty")
    if layout != "contiguous":
        words.add("strided")
    if dtype is torch.bfloat16:
        words.add("bf16")
    if lengths is not None:
        words.add("nd")
    return Case(name, make, frozenset(words))


def _rnn_cases(op: str) -> tuple[Case, ...]:
    def case(name: str, **options) -> Case:
        return _rnn_case(name, op, **options)

    cases = [
        case("no_batch", b=0),
        case("ones", t=1, b=1, i=1, h=1, tags="one"),
        case("one_step", t=1, b=1, i=40, h=64, tags="one"),
        case("primes", t=5, b=3, i=13, h=29, layers=2, bidirectional=True, tags="odd"),
        # Units: panels of 16, registers of 4, 8 and 16.
        *(case(f"units_{h}", h=h, tags="odd") for h in (3, 15, 16, 17, 33)),
        # Rows: tiles of 6 and 7 (AVX-512), 3 and 4 (the others), and one more or less.
        *(case(f"batch_{b}", b=b, h=19, tags="odd") for b in (1, 3, 4, 5, 6, 7, 8, 13)),
        case("no_biases", biases=False, bidirectional=True),
        case("no_states", states=False, layers=2, bidirectional=True),
        case("batch_first", batch_first=True, layers=2, bidirectional=True, t=4, b=3),
        case("batch_first_one", batch_first=True, b=1, t=6),
        case("packed", lengths=(6, 4, 4, 1), h=18, layers=2, bidirectional=True, tags="odd"),
        case("packed_equal", lengths=(3, 3)),
        case("bf16", dtype=torch.bfloat16, h=24, t=5),
        case("bf16_packed", dtype=torch.bfloat16, lengths=(4, 2), bidirectional=True),
        *(case(f"layout_{name}", t=4, b=3, h=12, layout=name) for name in ("transposed", "sliced", "every_second")),
        case("layout_batch_repeated", t=4, b=3, layout="batch_repeated", batch_first=True),
        # More rows than one chunk of input gates, and steps worth two threads.
        case("threads", t=26, b=16, i=33, h=80, layers=2, bidirectional=True, tags="threads"),
        case("threads_long", t=90, b=1, i=20, h=160, tags="threads odd"),
        case("threads_packed", lengths=(40, 31, 30, 13, 8, 1), i=24, h=150, bidirectional=True, tags="threads"),
    ]
    if op.endswith("lstm"):
        cases += [
            case("projected", h=20, proj=3, layers=2, bidirectional=True, t=4),
            case("projected_wide", h=150, proj=70, b=5, biases=False, tags="odd"),
            case("projected_packed", h=33, proj=17, lengths=(5, 5, 2), bidirectional=True, batch_first=True),
            case("threads_projected", t=7, b=12, h=200, proj=130, bidirectional=True, layers=2, tags="threads"),
        ]
    return tuple(cases)


def _started(op: str, inputs: tuple) -> list[Tensor]:
    """The initial states, zeros if there are none, in float64."""
    x, _, *states, weights, _, layers, bidirectional, batch_first = inputs
    if states[0] is None:
        batch, units = x.shape[0 if batch_first else 1], weights[0].shape[0] // _RNN_GATES[rnn_module(op)]
        states = [x.new_zeros(layers * (2 if bidirectional else 1), batch, units) for _ in states]
    return [s.double() for s in states]


def _rnn_truth(op: str, reference, inputs: tuple) -> tuple[Tensor, ...]:
    x, sizes, *_, weights, _, layers, bidirectional, batch_first = inputs
    doubles = [w.double() for w in weights]
    return reference(x.double(), sizes, *_started(op, inputs), doubles, layers, bidirectional, batch_first)


def _rnn_check(op: str, truth: tuple[Tensor, ...], actual: tuple[Tensor, ...], inputs: tuple) -> None:
    x, sizes, *states, weights, biases, layers, bidirectional, batch_first = inputs
    if states[0] is None:
        states = [torch.zeros_like(t, dtype=x.dtype) for t in truth[1:]]
    start = tuple(states) if len(states) > 1 else states[0]
    options = (biases, layers, 0.0, False, bidirectional)
    eager = getattr(torch, op)
    if sizes is None:
        yardsticks = eager(x, start, weights, *options, batch_first)
    else:
        yardsticks = eager(x, sizes, start, weights, *options)
    for name, ours, theirs, right in zip(("output", "h_n", "c_n"), actual, yardsticks, truth, strict=False):
        assert ours.dtype == x.dtype
        # Each of the four gates of a step may be off by its bound; what an earlier step was off by fades.
        floor = tolerances.eps(x.dtype) * _largest(right) + 4 * tolerances.GATE_ERROR
        tolerances.assert_composite(ours, theirs, right, floor=floor, what=name)


def _int8_rnn_truth(op: str, reference, inputs: tuple) -> tuple[Tensor, ...]:
    x, sizes, *states, weights, scales, biases, layers, bidirectional, batch_first = inputs
    starts = _started(op, (x, sizes, *states, weights, biases, layers, bidirectional, batch_first))
    return reference(x.double(), sizes, *starts, weights, scales, layers, bidirectional, batch_first)


def _int8_rnn_check(truth: tuple[Tensor, ...], actual: tuple[Tensor, ...], inputs: tuple) -> None:
    x, _, *states, _, scales, _, _, _, _ = inputs
    # A state that lies at a tie may round to the next code: a gate then moves by a weight times a step of the codes.
    largest = max([1.0, *(_largest(s) for s in states if s is not None)])
    flip = 2 * max(_largest(scale) for scale in scales) * largest
    for name, ours, right in zip(("output", "h_n", "c_n"), actual, truth, strict=False):
        assert ours.dtype == x.dtype
        floor = tolerances.eps(x.dtype) * _largest(right) + 4 * tolerances.GATE_ERROR + flip
        tolerances.assert_composite(ours, right.to(x.dtype), right, floor=floor, what=name)


def int8_lstm_truth(*inputs) -> tuple[Tensor, ...]:
    return _int8_rnn_truth("int8_lstm", int8_lstm_reference, inputs)


def int8_lstm_check(actual: tuple[Tensor, ...], inputs: tuple) -> None:
    _int8_rnn_check(int8_lstm_truth(*inputs), actual, inputs)


def int8_lstm_suite() -> Suite:
    return Suite("int8_lstm", _rnn_cases("int8_lstm"), int8_lstm_truth, int8_lstm_check)


def int8_gru_truth(*inputs) -> tuple[Tensor, ...]:
    return _int8_rnn_truth("int8_gru", int8_gru_reference, inputs)


def int8_gru_check(actual: tuple[Tensor, ...], inputs: tuple) -> None:
    _int8_rnn_check(int8_gru_truth(*inputs), actual, inputs)


def int8_gru_suite() -> Suite:
    return Suite("int8_gru", _rnn_cases("int8_gru"), int8_gru_truth, int8_gru_check)


def lstm_truth(*inputs) -> tuple[Tensor, ...]:
    return _rnn_truth("lstm", lstm_reference, inputs)


def lstm_check(actual: tuple[Tensor, ...], inputs: tuple) -> None:
    _rnn_check("lstm", lstm_truth(*inputs), actual, inputs)


def lstm_suite() -> Suite:
    return Suite("lstm", _rnn_cases("lstm"), lstm_truth, lstm_check)


def gru_truth(*inputs) -> tuple[Tensor, ...]:
    return _rnn_truth("gru", gru_reference, inputs)


def gru_check(actual: tuple[Tensor, ...], inputs: tuple) -> None:
    _rnn_check("gru", gru_truth(*inputs), actual, inputs)


def gru_suite() -> Suite:
    return Suite("gru", _rnn_cases("gru"), gru_truth, gru_check)


# The others would try again what the lstm's try.
_PLAIN_RNN_CASES = """no_batch ones primes units_17 batch_7 batch_13 no_states batch_first packed bf16 bf16_packed
    layout_sliced threads threads_packed"""


def _plain_rnn_cases(op: str) -> tuple[Case, ...]:
    return tuple(case for case in _rnn_cases(op) if case.id in _PLAIN_RNN_CASES.split())


def rnn_tanh_truth(*inputs) -> tuple[Tensor, ...]:
    return _rnn_truth("rnn_tanh", rnn_tanh_reference, inputs)


def rnn_tanh_check(actual: tuple[Tensor, ...], inputs: tuple) -> None:
    _rnn_check("rnn_tanh", rnn_tanh_truth(*inputs), actual, inputs)


def rnn_tanh_suite() -> Suite:
    return Suite("rnn_tanh", _plain_rnn_cases("rnn_tanh"), rnn_tanh_truth, rnn_tanh_check)


def rnn_relu_truth(*inputs) -> tuple[Tensor, ...]:
    return _rnn_truth("rnn_relu", rnn_relu_reference, inputs)


def rnn_relu_check(actual: tuple[Tensor, ...], inputs: tuple) -> None:
    _rnn_check("rnn_relu", rnn_relu_truth(*inputs), actual, inputs)


def rnn_relu_suite() -> Suite:
    return Suite("rnn_relu", _plain_rnn_cases("rnn_relu"), rnn_relu_truth, rnn_relu_check)


# -- token_panels


def _token_panels_case(*lead: int, k: int, dtype=torch.float32, layout="contiguous", tags: str = "") -> Case:
    rows = _quantize_rows_case(*lead, k=k, dtype=dtype, layout=layout, tags=tags)
    words = rows.tags - {"nd"} | ({"nd"} if len(lead) != 2 else set())
    return Case(rows.id, lambda generator: rows.make(generator)[:1], words)


def token_panels_check(actual: Tensor, inputs: tuple) -> None:
    """Nothing is computed, so nothing may differ."""
    tolerances.assert_exact(actual, token_panels_reference(*inputs).to(torch.float32))


def token_panels_suite() -> Suite:
    case, bf16 = _token_panels_case, torch.bfloat16
    cases = (
        case(2, 0, k=8),
        case(0, 5, k=8),
        case(2, 5, k=0),
        case(1, 1, k=1, tags="one"),
        case(5, k=17, tags="odd"),
        case(2, 3, 33, k=5, tags="odd"),
        case(2, 2, 40, k=24, dtype=bf16),
        # Tokens: registers of 4, 8 and 16, panels of 32. Features: registers of 4, 8 and 16.
        *(case(2, length, k=20, tags="odd") for length in (1, 3, 5, 9, 15, 17, 31, 32, 33, 63, 65)),
        *(case(2, 37, k=k, tags="odd") for k in (1, 3, 5, 7, 9, 15, 16, 17, 31, 33)),
        *(case(2, 37, k=k, dtype=bf16, tags="odd") for k in (1, 7, 17)),
        *(case(2, 37, k=19, layout=name) for name in LAYOUTS if name not in ("contiguous", "heads_inside")),
        *(case(2, 37, k=19, dtype=bf16, layout=name) for name in ("transposed", "misaligned", "every_third")),
        case(3, 130, k=515, tags="threads odd"),
    )
    return Suite("token_panels", cases, token_panels_reference, token_panels_check)


# -- weight_only_linear


def _packed_weight(weight: Tensor, group: int) -> tuple:
    """The op's arguments that hold the weight: (data, scale, compensation)."""
    if group:
        return lamina.ops.pack_int4_weight(weight, group_size=group).data, None, None
    return tuple(lamina.ops.pack_int8_weight(weight))


def _weight_only_linear_case(
    *lead: int,
    k: int,
    n: int,
    group: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    bias: torch.dtype | None = torch.float32,
    bias_step: int = 1,
    activation: str = "none",
    tags: str = "",
) -> Case:
    like = _int8_linear_case(
        *lead, k=k, n=n, dtype=dtype, layout=layout, bias=bias, bias_step=bias_step, activation=activation, tags=tags
    )

    def make(generator: torch.Generator) -> tuple:
        x, *_, b, _ = like.make(generator)
        weight = torch.randn(n, k, generator=generator) / max(k, 1) ** 0.25
        return x, *_packed_weight(weight, group), b, n, group, activation

    return Case(f"{f'int4g{group}' if group else 'int8'}-{like.id}", make, like.tags)


def _weight_only_linear_cases() -> list[Case]:
    case = _weight_only_linear_case
    bf16 = torch.bfloat16
    cases = []
    for group in (0, 32):
        cases += [
            case(0, k=8, n=8, group=group),
            case(3, k=0, n=5, group=group),
            case(3, k=8, n=0, group=group),
            case(1, k=1, n=1, group=group, tags="one"),
            case(k=17, n=19, group=group, tags="odd"),
            case(2, 3, 5, k=24, n=10, group=group, dtype=bf16),
            # Rows: tiles of 2, 6 and 8, and one more or less; 64 whose sums are held at once.
            *(case(m, k=40, n=24, group=group, tags="odd") for m in (2, 3, 5, 7, 9, 65)),
            # Channels: registers of 4, 8 and 16, panels of 64.
            *(case(5, k=20, n=n, group=group, tags="odd") for n in (15, 16, 49, 65, 129)),
            # Inputs: groups of 4, blocks of 16 and 32, pieces of 64.
            *(case(5, k=k, n=21, group=group, tags="odd") for k in (2, 3, 16, 31, 33, 64, 65)),
            *(case(3, k=k, n=21, group=group, dtype=bf16, tags="odd") for k in (15, 33)),
            *(case(7, k=37, n=41, group=group, layout=name) for name in ("transposed", "sliced", "rows_repeated")),
            case(7, k=37, n=41, group=group, dtype=bf16, layout="every_third"),
            case(5, k=33, n=70, group=group, activation="silu", dtype=bf16, bias=bf16),
            case(5, k=33, n=70, group=group, bias=None, activation="gelu"),
            case(5, k=33, n=70, group=group, bias=bf16, bias_step=3, activation="relu"),
            # Large enough for several threads, by panels and by rows.
            case(3, k=515, n=900, group=group, tags="threads odd"),
            case(600, k=130, n=63, group=group, tags="threads odd"),
        ]
    # Groups of several blocks, and a last one that is shorter by blocks and by inputs.
    cases += [case(m, k=k, n=37, group=group, tags="odd") for group, m, k in ((64, 1, 31), (96, 5, 300), (128, 2, 193))]
    return cases


def _weight_only_weight(data: Tensor, scale: Tensor | None, out_features: int, in_features: int, group: int) -> Tensor:
    if group == 0:
        packed = lamina.ops.PackedInt8Weight(data, scale, data)
        return dequantize(lamina.ops.unpack_int8_weight(packed, in_features), scale)
    packed = lamina.ops.PackedInt4Weight(data, out_features, group)
    return dequantize(*lamina.ops.unpack_int4_weight(packed, in_features), group)


def weight_only_linear_truth(x, data, scale, compensation, bias, out_features, group_size, activation) -> Tensor:
    weight = _weight_only_weight(data, scale, out_features, x.shape[-1], group_size)
    return weight_only_linear_reference(x, weight, bias, activation)


def weight_only_linear_check(actual: Tensor, inputs: tuple) -> None:
    x, data, scale, _, bias, out_features, group_size, activation = inputs
    assert actual.dtype == x.dtype
    weight = _weight_only_weight(data, scale, out_features, x.shape[-1], group_size)
    linear = weight_only_linear_reference(x, weight, bias)
    rows = x.double().abs()
    magnitude = rows @ weight.abs().T + (0.0 if bias is None else 2 * bias.double().abs())
    # With VNNI x is fixed point below its row's largest: see FIXED_POINT_ERROR.
    largest = rows.amax(dim=-1, keepdim=True) if x.shape[-1] else rows.new_zeros(*x.shape[:-1], 1)
    fixed_point = tolerances.FIXED_POINT_ERROR * largest * weight.abs().sum(dim=1)
    slope = tolerances.ACTIVATION_SLOPE[activation]
    extra = slope * fixed_point + tolerances.activation_error(activation, linear)
    tolerances.assert_sum(
        actual,
        weight_only_linear_truth(*inputs),
        # The products, two scales and the bias.
        terms=x.shape[-1] + 3,
        magnitude=slope * magnitude,
        extra=extra,
        what=activation,
    )


def weight_only_linear_suite() -> Suite:
    return Suite(
        "weight_only_linear", tuple(_weight_only_linear_cases()), weight_only_linear_truth, weight_only_linear_check
    )


# -- weight_only_linear_backward


def _weight_only_linear_backward_case(*lead: int, k: int, n: int, group: int, **rest) -> Case:
    like = _int8_linear_backward_case(*lead, k=k, n=n, **rest)

    def make(generator: torch.Generator) -> tuple:
        grad, *_ = like.make(generator)
        weight = torch.randn(n, k, generator=generator) / max(n, 1) ** 0.5
        return grad, *_packed_weight(weight, group)[:2], k, group

    return Case(f"{f'int4g{group}' if group else 'int8'}-{like.id}", make, like.tags)


def weight_only_linear_backward_truth(grad, data, scale, in_features, group_size) -> Tensor:
    return grad.double() @ _weight_only_weight(data, scale, grad.shape[-1], in_features, group_size)


def weight_only_linear_backward_check(actual: Tensor, inputs: tuple) -> None:
    grad, data, scale, in_features, group_size = inputs
    weight = _weight_only_weight(data, scale, grad.shape[-1], in_features, group_size)
    magnitude = grad.double().abs() @ weight.abs()
    # The dequantized weight is rounded to the dtype of grad before the product.
    rounding = tolerances.eps(grad.dtype) * magnitude
    tolerances.assert_sum(
        actual,
        weight_only_linear_backward_truth(*inputs),
        terms=grad.shape[-1],
        magnitude=magnitude,
        extra=rounding,
    )


def weight_only_linear_backward_suite() -> Suite:
    case = _weight_only_linear_backward_case
    cases = []
    for group in (0, 64):
        cases += [
            case(0, k=8, n=8, group=group),
            case(2, 3, k=0, n=4, group=group),
            case(1, k=1, n=1, group=group, tags="one"),
            case(k=17, n=19, group=group, tags="odd"),
            case(5, k=77, n=67, group=group, tags="odd"),
            case(2, 3, k=24, n=10, group=group),
            case(7, k=37, n=41, group=group, dtype=torch.bfloat16),
            case(7, k=37, n=41, group=group, layout="sliced"),
            case(131, k=197, n=257, group=group, tags="threads odd"),
        ]
    return Suite(
        "weight_only_linear_backward",
        tuple(cases),
        weight_only_linear_backward_truth,
        weight_only_linear_backward_check,
        own_kernel=False,
    )


# -- linear


def _linear_case(*lead: int, k: int, n: int, residual: torch.dtype | None = None, layout="contiguous", **rest) -> Case:
    like = _int8_linear_case(*lead, k=k, n=n, layout=layout, residual=residual, **rest)

    def make(generator: torch.Generator) -> tuple:
        x, _, _, _, b, activation, *more = like.make(generator)
        weight = torch.randn(n, k, generator=generator) / max(k, 1) ** 0.25
        arguments = x, lamina.ops.pack_linear_weight(weight).data, b, n, activation
        return (*arguments, more[0]) if residual else arguments

    return Case(like.id, make, like.tags)


def _linear_cases() -> list[Case]:
    case = _linear_case
    f32, bf16 = torch.float32, torch.bfloat16
    activations = [name for name in tolerances.ACTIVATION_SLOPE if name != "none"]
    return [
        case(0, k=8, n=8),
        case(3, k=0, n=5),
        case(3, k=0, n=5, residual=f32, activation="relu"),
        case(3, k=8, n=0),
        case(2, 0, 3, k=4, n=4),
        case(1, k=1, n=1, tags="one"),
        case(1, k=300, n=1, tags="one"),
        case(7, k=1, n=1, bias=None, tags="one"),
        case(k=17, n=19, tags="odd"),
        case(k=17, n=19, residual=f32),
        case(2, 3, 5, k=24, n=10, dtype=bf16),
        case(2, 5, k=20, n=9, layout="transposed"),
        case(2, 3, 4, k=6, n=33, layout="heads_inside"),
        # Rows: two panels at once up to 3 (AVX-512), tiles of 6 and 8, 3, 4 and 6 (AVX2), and one more or less.
        *(case(m, k=20, n=150, tags="odd") for m in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13)),
        *(case(m, k=20, n=n, tags="odd") for m in (6, 7, 8, 9, 17) for n in (10, 20, 40)),
        # Channels: registers of 4, 8 and 16, panels of 64 and pairs of them.
        *(
            case(m, k=20, n=n, tags="odd")
            for m in (1, 5)
            for n in (3, 15, 16, 17, 31, 49, 63, 64, 65, 127, 128, 129, 193)
        ),
        *(case(m, k=20, n=128, bias=None, tags="odd") for m in (1, 5)),
        # Inputs: sums of any length, squares of 16 of a copy.
        *(case(5, k=k, n=21, tags="odd") for k in (2, 3, 15, 16, 17, 31, 33, 129)),
        *(case(5, k=k, n=21, dtype=bf16, tags="odd") for k in (1, 15, 17, 65)),
        *(case(m, k=37, n=80, layout=name) for m in (1, 35) for name in ("misaligned", "sliced", "every_third")),
        *(case(35, k=37, n=41, layout=name) for name in ("transposed", "rows_repeated", "columns_repeated")),
        *(case(7, k=37, n=41, dtype=bf16, layout=name) for name in ("transposed", "sliced", "every_second")),
        *(case(5, k=33, n=70, activation=a) for a in activations),
        *(case(1, k=33, n=130, activation=a, dtype=bf16, bias=bf16) for a in activations),
        case(5, k=33, n=70, bias=bf16, bias_step=3),
        *(case(m, k=33, n=n, residual=f32) for m in (1, 7) for n in (70, 128)),
        case(7, k=33, n=70, residual=bf16, activation="relu"),
        case(7, k=33, n=70, residual=f32, dtype=bf16, activation="gelu"),
        case(2, 3, k=24, n=10, residual=f32, bias=None),
        *(case(7, k=33, n=70, residual=f32, layout=name) for name in ("transposed", "misaligned", "sliced")),
        # Large enough for several threads, by panels, by rows and by both.
        case(1, k=1025, n=900, tags="threads odd"),
        case(600, k=130, n=63, tags="threads odd"),
        case(131, k=257, n=197, residual=f32, activation="silu", tags="threads"),
        case(128, k=260, n=64, activation="gelu", dtype=bf16, tags="threads"),
    ]


def _linear_weight(data: Tensor, out_features: int) -> Tensor:
    return lamina.ops.unpack_linear_weight(lamina.ops.PackedLinearWeight(data, out_features))


def linear_truth(x, data, bias, out_features, activation, residual=None) -> Tensor:
    return linear_reference(x, _linear_weight(data, out_features), bias, activation, residual)


def linear_check(actual: Tensor, inputs: tuple) -> None:
    x, data, bias, out_features, activation, *rest = inputs
    assert actual.dtype == x.dtype
    weight = _linear_weight(data, out_features).double()
    linear = linear_reference(x, weight, bias, "none", *rest)
    magnitude = x.double().abs() @ weight.abs().T
    for added in (bias, *rest):
        if added is not None:
            magnitude = magnitude + added.double().abs()
    slope = tolerances.ACTIVATION_SLOPE[activation]
    tolerances.assert_sum(
        actual,
        linear_truth(*inputs),
        # The products, bias and residual.
        terms=x.shape[-1] + 2,
        magnitude=slope * magnitude,
        extra=tolerances.activation_error(activation, linear),
        what=activation,
    )


def linear_suite() -> Suite:
    return Suite("linear", tuple(_linear_cases()), linear_truth, linear_check)


# -- linear_backward


def _linear_backward_case(*lead: int, k: int, n: int, **rest) -> Case:
    like = _int8_linear_backward_case(*lead, k=k, n=n, **rest)

    def make(generator: torch.Generator) -> tuple:
        grad, *_ = like.make(generator)
        weight = torch.randn(n, k, generator=generator) / max(n, 1) ** 0.5
        return grad, lamina.ops.pack_linear_weight(weight).data

    return Case(like.id, make, like.tags)


def linear_backward_truth(grad, data) -> Tensor:
    return grad.double() @ _linear_weight(data, grad.shape[-1]).double()


def linear_backward_check(actual: Tensor, inputs: tuple) -> None:
    grad, data = inputs
    magnitude = grad.double().abs() @ _linear_weight(data, grad.shape[-1]).double().abs()
    # The weight is rounded to the dtype of grad before the product.
    rounding = tolerances.eps(grad.dtype) * magnitude
    tolerances.assert_sum(
        actual, linear_backward_truth(*inputs), terms=grad.shape[-1], magnitude=magnitude, extra=rounding
    )


def linear_backward_suite() -> Suite:
    case = _linear_backward_case
    cases = (
        case(0, k=8, n=8),
        case(2, 3, k=0, n=4),
        case(1, k=1, n=1, tags="one"),
        case(k=17, n=19, tags="odd"),
        case(5, k=77, n=67, tags="odd"),
        case(2, 3, k=24, n=10),
        case(7, k=37, n=41, dtype=torch.bfloat16),
        case(7, k=37, n=41, layout="sliced"),
        case(131, k=197, n=257, tags="threads odd"),
    )
    return Suite("linear_backward", cases, linear_backward_truth, linear_backward_check, own_kernel=False)


# -- sparse_int8_linear


def zero_blocks(weight: Tensor, pattern: str, density: float, generator: torch.Generator) -> Tensor:
    """The weight [N, K] with all but about `density` of its blocks (output channels x inputs) set to zero."""
    rows, columns = (int(size) for size in pattern.split("x"))
    n, k = weight.shape
    keep = torch.rand(-(-n // rows), -(-k // columns), generator=generator) < density
    return weight * keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:n, :k]


def _sparse_int8_linear_case(*lead: int, k: int, n: int, pattern: str, density: float = 0.3, **rest) -> Case:
    like = _int8_linear_case(*lead, k=k, n=n, **rest)

    def make(generator: torch.Generator) -> tuple:
        x, data, scale, compensation, *others = like.make(generator)
        codes = zero_blocks(_int8_codes(x, data, scale, compensation), pattern, density, generator)
        return x, *lamina.ops.pack_sparse_int8_weight(codes, scale, pattern=pattern), *others

    share = "" if density == 0.3 else f"-{density:.0%}"
    return Case(f"{pattern}-{like.id}{share}", make, like.tags)


def _sparse_int8_dense(inputs: tuple) -> tuple:
    """The arguments of int8_linear with the same weight."""
    x, data, scale, compensation, *others = inputs
    packed = lamina.ops.PackedSparseInt8Weight(data, scale, compensation)
    codes = lamina.ops.unpack_sparse_int8_weight(packed, x.shape[-1])
    return x, *lamina.ops.pack_int8_weight(codes, scale), *others


def sparse_int8_linear_truth(*inputs) -> Tensor:
    return int8_linear_truth(*_sparse_int8_dense(inputs))


def sparse_int8_linear_check(actual: Tensor, inputs: tuple) -> None:
    int8_linear_check(actual, _sparse_int8_dense(inputs))


def sparse_int8_linear_suite() -> Suite:
    case = _sparse_int8_linear_case
    f32, bf16 = torch.float32, torch.bfloat16
    cases = []
    for pattern in ("1x4", "2x4", "4x4"):
        cases += [
            case(0, k=8, n=8, pattern=pattern),
            case(3, k=0, n=5, pattern=pattern),
            case(3, k=8, n=0, pattern=pattern),
            case(1, k=1, n=1, pattern=pattern, density=1.0, tags="one"),
            # Few rows, and panels of 16 and 32 tokens, with one more or less.
            *(case(m, k=67, n=21, pattern=pattern, tags="odd") for m in (1, 2, 3, 4, 5, 16, 17, 33)),
            # Units of 16 channels and blocks; more inputs than a span has.
            *(case(5, k=1541, n=n, pattern=pattern, density=0.1, tags="odd") for n in (3, 17, 150)),
            case(2, k=1541, n=37, pattern=pattern, density=0.1, tags="odd"),
            case(7, k=33, n=70, pattern=pattern, density=0.0),
            case(7, k=33, n=70, pattern=pattern, density=1.0),
            case(2, 3, k=24, n=10, pattern=pattern, layout="transposed", bias=None),
            case(7, k=33, n=70, pattern=pattern, dtype=bf16, residual=f32, activation="gelu", layout="sliced"),
            case(7, k=33, n=70, pattern=pattern, x_scale="codes", out=torch.int8, activation="relu"),
            case(300, k=515, n=200, pattern=pattern, tags="threads odd"),
            case(3, k=2053, n=900, pattern=pattern, tags="threads odd"),
            case(40, k=515, n=900, pattern=pattern, activation="silu", residual=bf16, tags="threads odd"),
        ]
    return Suite("sparse_int8_linear", tuple(cases), sparse_int8_linear_truth, sparse_int8_linear_check)


# -- sparse_int8_linear_backward


def _sparse_int8_linear_backward_case(*lead: int, k: int, n: int, pattern: str, **rest) -> Case:
    like = _int8_linear_backward_case(*lead, k=k, n=n, **rest)

    def make(generator: torch.Generator) -> tuple:
        grad, *_ = like.make(generator)
        weight = zero_blocks(torch.randn(n, k, generator=generator) / max(n, 1) ** 0.5, pattern, 0.3, generator)
        packed = lamina.ops.pack_sparse_int8_weight(weight, pattern=pattern)
        return grad, packed.data, packed.scale, k

    return Case(f"{pattern}-{like.id}", make, like.tags)


def _sparse_int8_backward_dense(inputs: tuple) -> tuple:
    grad, data, scale, in_features = inputs
    packed = lamina.ops.PackedSparseInt8Weight(data, scale, data)
    codes = lamina.ops.unpack_sparse_int8_weight(packed, in_features)
    return grad, lamina.ops.pack_int8_weight(codes, scale).data, scale, in_features


def sparse_int8_linear_backward_truth(*inputs) -> Tensor:
    return int8_linear_backward_truth(*_sparse_int8_backward_dense(inputs))


def sparse_int8_linear_backward_check(actual: Tensor, inputs: tuple) -> None:
    int8_linear_backward_check(actual, _sparse_int8_backward_dense(inputs))


def sparse_int8_linear_backward_suite() -> Suite:
    case = _sparse_int8_linear_backward_case
    cases = (
        case(0, k=8, n=8, pattern="4x4"),
        case(2, 3, k=0, n=4, pattern="1x4"),
        case(1, k=1, n=1, pattern="2x4", tags="one"),
        case(k=17, n=19, pattern="4x4", tags="odd"),
        case(7, k=37, n=41, pattern="1x4", dtype=torch.bfloat16),
        case(7, k=37, n=41, pattern="2x4", layout="sliced"),
        case(131, k=197, n=257, pattern="4x4", tags="threads odd"),
    )
    return Suite(
        "sparse_int8_linear_backward",
        cases,
        sparse_int8_linear_backward_truth,
        sparse_int8_linear_backward_check,
        own_kernel=False,
    )


# -- sparse_linear


def _sparse_weight(n: int, k: int, pattern: str, density: float, generator: torch.Generator) -> Tensor:
    """Pruned at random in blocks of the pattern, so that some channels and inputs may have nothing left."""
    rows = 1 if pattern == "unstructured" else int(pattern[0])
    kept = torch.rand(-(-n // rows), k, generator=generator) < density
    weight = torch.randn(n, k, generator=generator) / max(k * density, 1) ** 0.5
    return weight * kept.repeat_interleave(rows, 0)[:n]


def _sparse_linear_case(
    *lead: int,
    k: int,
    n: int,
    pattern: str = "unstructured",
    density: float = 0.3,
    dtype: torch.dtype = torch.float32,
    values: torch.dtype = torch.float32,
    **rest,
) -> Case:
    like = _int8_linear_case(*lead, k=k, n=n, dtype=dtype, **rest)

    def make(generator: torch.Generator) -> tuple:
        x, *_, b, activation = like.make(generator)
        weight = _sparse_weight(n, k, pattern, density, generator)
        return x, lamina.ops.pack_sparse_weight(weight.to(values), pattern).data, b, n, activation

    name = f"{pattern}-{like.id}" + (f"-d{density:g}" if density != 0.3 else "")
    return Case(f"{name}-of_bf16" if values is torch.bfloat16 else name, make, like.tags)


def _sparse_linear_cases() -> list[Case]:
    case = _sparse_linear_case
    bf16 = torch.bfloat16
    cases = [
        case(0, k=8, n=8),
        case(3, k=0, n=5, pattern="4x1"),
        case(3, k=8, n=0),
        case(1, k=1, n=1, pattern="4x1", density=1, tags="one"),
        case(k=17, n=19, tags="odd"),
        case(2, 3, 5, k=24, n=10, pattern="2x1", dtype=bf16, values=bf16),
        case(5, k=20, n=9, density=0),
        case(5, k=20, n=9, density=1),
        # Channels: registers of 4, 8 and 16, slabs of 64.
        *(case(5, k=20, n=n, tags="odd") for n in (15, 17, 65)),
    ]
    for pattern in ("unstructured", "2x1", "4x1"):
        cases += [
            # Rows: those of the path for few, and panels of every width, one and several.
            *(case(m, k=40, n=38, pattern=pattern, tags="odd") for m in (1, 2, 3, 4, 5, 9, 17, 33, 63, 65)),
            # Inputs: registers, and ranges of 128, 512 and 2048.
            *(case(m, k=k, n=21, pattern=pattern, tags="odd") for m, k in ((1, 129), (7, 15), (7, 129), (3, 2049))),
            case(7, k=37, n=41, pattern=pattern, dtype=bf16, values=bf16, tags="odd"),
            case(2, k=137, n=41, pattern=pattern, values=bf16, tags="odd"),
            case(19, k=137, n=41, pattern=pattern, dtype=bf16, activation="gelu", bias=bf16),
            case(7, k=150, n=41, pattern=pattern, layout="transposed"),
            case(2, k=37, n=41, pattern=pattern, layout="every_third", bias_step=2),
            # Large enough for several threads, by panels and by slabs.
            case(200, k=130, n=190, pattern=pattern, tags="threads odd"),
            case(1, k=700, n=900, pattern=pattern, bias=None, tags="threads odd"),
        ]
    activations = [name for name in tolerances.ACTIVATION_SLOPE if name != "none"]
    cases += [case(5, k=33, n=70, pattern="2x1", activation=a) for a in activations]
    cases += [case(1, k=33, n=70, pattern="4x1", activation=a, dtype=bf16) for a in activations[:2]]
    return cases


def _sparse_linear_weight(data: Tensor, out_features: int) -> Tensor:
    return lamina.ops.unpack_sparse_weight(lamina.ops.PackedSparseWeight(data, out_features))


def sparse_linear_truth(x, data, bias, out_features, activation) -> Tensor:
    return sparse_linear_reference(x, _sparse_linear_weight(data, out_features), bias, activation)


def sparse_linear_check(actual: Tensor, inputs: tuple) -> None:
    x, data, bias, out_features, activation = inputs
    assert actual.dtype == x.dtype
    weight = _sparse_linear_weight(data, out_features).double()
    linear = sparse_linear_reference(x, weight, bias)
    magnitude = x.double().abs() @ weight.abs().T + (0.0 if bias is None else bias.double().abs())
    slope = tolerances.ACTIVATION_SLOPE[activation]
    tolerances.assert_sum(
        actual,
        sparse_linear_truth(*inputs),
        # The products of the channel that has most of them, and the bias.
        terms=_most_nonzeros(weight) + 1,
        magnitude=slope * magnitude,
        extra=tolerances.activation_error(activation, linear),
        what=activation,
    )


def _most_nonzeros(weight: Tensor) -> int:
    return int((weight != 0).sum(1).max()) if weight.numel() else 0


def sparse_linear_suite() -> Suite:
    return Suite("sparse_linear", tuple(_sparse_linear_cases()), sparse_linear_truth, sparse_linear_check)


# -- sparse_linear_backward


def _sparse_linear_backward_case(
    *lead: int, k: int, n: int, pattern: str = "unstructured", values: torch.dtype = torch.float32, **rest
) -> Case:
    like = _int8_linear_backward_case(*lead, k=k, n=n, **rest)

    def make(generator: torch.Generator) -> tuple:
        grad, *_ = like.make(generator)
        weight = _sparse_weight(n, k, pattern, 0.3, generator).to(values)
        return grad, lamina.ops.pack_sparse_weight(weight, pattern).data, k

    return Case(f"{pattern}-{like.id}" + ("-of_bf16" if values is torch.bfloat16 else ""), make, like.tags)


def sparse_linear_backward_truth(grad, data, in_features) -> Tensor:
    return grad.double() @ _sparse_linear_weight(data, grad.shape[-1]).double()


def sparse_linear_backward_check(actual: Tensor, inputs: tuple) -> None:
    grad, data, _ = inputs
    weight = _sparse_linear_weight(data, grad.shape[-1]).double()
    tolerances.assert_sum(
        actual,
        sparse_linear_backward_truth(*inputs),
        terms=_most_nonzeros(weight.T),
        magnitude=grad.double().abs() @ weight.abs(),
    )


def sparse_linear_backward_suite() -> Suite:
    case = _sparse_linear_backward_case
    cases = [case(0, k=8, n=8), case(2, 3, k=0, n=4), case(3, k=5, n=0), case(1, k=1, n=1, tags="one")]
    for pattern in ("unstructured", "2x1", "4x1"):
        cases += [
            case(k=17, n=19, pattern=pattern, tags="odd"),
            case(5, k=137, n=67, pattern=pattern, tags="odd"),
            case(2, 3, k=24, n=10, pattern=pattern, dtype=torch.bfloat16, values=torch.bfloat16),
            case(7, k=37, n=41, pattern=pattern, layout="sliced"),
            case(67, k=37, n=130, pattern=pattern, layout="transposed", values=torch.bfloat16),
            case(131, k=197, n=257, pattern=pattern, tags="threads odd"),
        ]
    return Suite(
        "sparse_linear_backward",
        tuple(cases),
        sparse_linear_backward_truth,
        sparse_linear_backward_check,
        own_kernel=False,
    )


# -- sparse_conv2d


def _sparse_conv2d_case(
    conv: Conv,
    pattern: str = "unstructured",
    dtype: torch.dtype = torch.float32,
    layout: str = "last",
    bias: bool = True,
    activation: str = "none",
    tags: str = "",
) -> Case:
    def make(generator: torch.Generator) -> tuple:
        x = torch.randn(conv.images, conv.c, conv.h, conv.w, generator=generator).to(dtype)
        rows = _sparse_weight(conv.n, conv.c * conv.kernel[0] * conv.kernel[1], pattern, 0.3, generator)
        b = torch.randn(conv.n, generator=generator) if bias else None
        packed = lamina.ops.pack_sparse_weight(rows.to(dtype), pattern)
        geometry = [*conv.kernel, *conv.stride, *conv.dilation, *conv.padding]
        return IMAGE_LAYOUTS[layout](x), packed.data, b, conv.n, geometry, activation

    name = f"{pattern}-{conv.name}-{layout}" + ("" if bias else "-nobias")
    name += ("-bf16" if dtype is torch.bfloat16 else "") + (f"-{activation}" if activation != "none" else "")
    words = set(tags.split()) | ({"strided"} if layout not in ("last", "first") else set())
    words |= {"bf16"} if dtype is torch.bfloat16 else set()
    return Case(name, make, frozenset(words | ({"empty"} if 0 in conv.out_shape() else set())))


def _sparse_conv2d_image() -> Case:
    """One image without a dimension for images."""
    batch = _sparse_conv2d_case(Conv(1, 5, 7, 9, 6, (3, 3), padding=(1, 1, 1, 1)), "2x1")

    def make(generator: torch.Generator) -> tuple:
        x, *rest = batch.make(generator)
        return x[0], *rest

    return Case(f"image-{batch.id}", make, frozenset({"nd"}))


def _sparse_conv2d_weight(x: Tensor, data: Tensor, out_channels: int, geometry: list[int]) -> Tensor:
    return lamina.ops.unpack_sparse_conv_weight(lamina.ops.PackedSparseWeight(data, out_channels), geometry[:2])


def sparse_conv2d_truth(x, data, bias, out_channels, geometry, activation) -> Tensor:
    weight = _sparse_conv2d_weight(x, data, out_channels, geometry)
    return sparse_conv2d_reference(x, weight, bias, geometry[2:4], geometry[6:], geometry[4:6], activation)


def sparse_conv2d_check(actual: Tensor, inputs: tuple) -> None:
    x, data, bias, out_channels, geometry, activation = inputs
    assert actual.dtype == x.dtype
    weight = _sparse_conv2d_weight(x, data, out_channels, geometry)
    sizes = geometry[2:4], geometry[6:], geometry[4:6]
    linear = sparse_conv2d_reference(x, weight, bias, *sizes)
    magnitude = sparse_conv2d_reference(x.abs(), weight.abs(), None if bias is None else bias.abs(), *sizes)
    slope = tolerances.ACTIVATION_SLOPE[activation]
    tolerances.assert_sum(
        actual,
        sparse_conv2d_truth(*inputs),
        terms=_most_nonzeros(weight.flatten(1)) + 1,
        magnitude=slope * magnitude,
        extra=tolerances.activation_error(activation, linear),
        what=activation,
    )


def sparse_conv2d_suite() -> Suite:
    case, bf16 = _sparse_conv2d_case, torch.bfloat16
    same = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
    cases = (
        case(Conv(0, 4, 5, 5, 6, (3, 3))),
        case(Conv(1, 1, 1, 1, 1), tags="one"),
        # One tap, and taps whose channels do not come out even with ranges of inputs.
        case(Conv(2, 37, 5, 7, 21), tags="odd"),
        case(Conv(1, 37, 5, 7, 21, **same), tags="odd"),
        case(Conv(2, 130, 5, 3, 70, **same), "4x1", tags="odd"),
        case(Conv(1, 3, 17, 19, 11, (7, 5), (2, 3), (3, 2, 1, 4), (2, 1)), "2x1", tags="odd"),
        case(Conv(2, 19, 6, 7, 13, **same), "4x1", bf16, activation="gelu", tags="odd"),
        case(Conv(2, 9, 6, 7, 13, **same), bias=False, layout="first", activation="relu"),
        case(Conv(2, 9, 6, 7, 13, **same), layout="last_sliced"),
        case(Conv(2, 9, 6, 7, 13, **same), layout="pixels_apart"),
        case(Conv(2, 9, 6, 7, 13, (1, 1), (2, 2)), layout="every_second"),
        case(Conv(2, 40, 19, 17, 70, **same), "4x1", tags="threads odd"),
        _sparse_conv2d_image(),
    )
    return Suite("sparse_conv2d", cases, sparse_conv2d_truth, sparse_conv2d_check)


# -- softmax, reduce, group_norm, embedding


def _plain_tags(shape: tuple[int, ...], dtype: torch.dtype, layout: str, tags: str) -> frozenset[str]:
    words = set(tags.split())
    words |= {"empty"} if 0 in shape else set()
    words |= {"strided"} if layout not in ("contiguous", "first", "last") else set()
    words |= {"bf16"} if dtype is torch.bfloat16 else set()
    return frozenset(words | ({"nd"} if len(shape) != 2 else set()))


def _softmax_case(
    *shape: int,
    dim: int = -1,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    to: torch.dtype | None = None,
    scale: float = 3.0,
    tags: str = "",
) -> Case:
    def make(generator: torch.Generator) -> tuple:
        return LAYOUTS[layout]((scale * torch.randn(shape, generator=generator)).to(dtype)), dim, to

    name = f"{'x'.join(map(str, shape))}-dim{dim}-{_short(dtype)}"
    name += f"-{layout}" if layout != "contiguous" else ""
    name += (f"-to_{_short(to)}" if to else "") + (f"-scale{scale:g}" if scale != 3.0 else "")
    return Case(name, make, _plain_tags(shape, dtype, layout, tags))


def softmax_truth(x, dim, dtype) -> Tensor:
    return torch.softmax(x.double(), dim) if x.numel() == 0 else softmax_reference(x.double(), dim)


def softmax_check(actual: Tensor, inputs: tuple) -> None:
    x, dim, dtype = inputs
    assert actual.dtype == dtype or (dtype is None and actual.dtype == x.dtype)
    assert actual.is_contiguous()
    eager = torch.softmax(x.float(), dim).to(actual.dtype)
    tolerances.assert_composite(actual, eager, softmax_truth(*inputs))


def softmax_suite() -> Suite:
    case, bf16 = _softmax_case, torch.bfloat16
    cases = (
        case(0, 5),
        case(5, 0),
        case(2, 0, 3, dim=0),
        case(1, 1, tags="one"),
        case(dim=0),
        case(7, 1, dim=1, tags="one"),
        # Registers of 4, 8 and 16, two chains of them, blocks of 2048.
        *(case(3, n, tags="odd") for n in (2, 3, 7, 15, 16, 17, 31, 33, 64, 67, 128, 2047, 2049, 9001)),
        *(case(4, n, dtype=bf16, tags="odd") for n in (3, 17, 67, 2049)),
        case(3, 67, scale=30.0),
        case(3, 67, scale=1e30),
        case(300, 40, scale=1e-3),
        case(3, 67, to=bf16),
        case(3, 67, dtype=bf16, to=torch.float32),
        # Columns: of images, of tokens, fewer and more than a register has lanes, and of 16 more.
        *(case(3, 5, n, dim=1, tags="odd") for n in (1, 2, 7, 15, 17, 33)),
        *(case(n, 19, dim=0) for n in (2, 15, 16, 17, 65)),
        case(2, 21, 5, 7, dim=-3),
        case(2, 21, 5, 7, dim=-3, dtype=bf16),
        case(2, 21, 5, 7, dim=1, layout="transposed", to=bf16),
        case(2, 3, 17, 12, dim=-1, layout="heads_inside"),
        *(case(9, 23, layout=name) for name in ("transposed", "misaligned", "sliced", "every_second")),
        *(case(9, 23, dim=0, layout=name) for name in ("transposed", "sliced", "every_third", "rows_repeated")),
        *(case(9, 23, layout=name, dtype=bf16) for name in ("transposed", "columns_repeated")),
        case(2, 4, 33, 129, tags="threads odd"),
        case(400, 130, dim=0, tags="threads"),
        case(400, 130, layout="every_second", dtype=bf16, tags="threads"),
    )
    return Suite("softmax", cases, softmax_truth, softmax_check)


def _reduce_case(
    *shape: int,
    dims: tuple[int, ...] = (-1,),
    how: str = "mean",
    keepdim: bool = False,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    tags: str = "",
) -> Case:
    def make(generator: torch.Generator) -> tuple:
        # Beside zero, so that the signal of a mean does not vanish.
        x = (0.5 + torch.randn(shape, generator=generator)).to(dtype)
        return (LAYOUTS | IMAGE_LAYOUTS)[layout](x), list(dims), keepdim, how

    name = f"{how}-{'x'.join(map(str, shape))}-dims{'_'.join(map(str, dims))}-{_short(dtype)}"
    name += "-keepdim" * keepdim + (f"-{layout}" if layout != "contiguous" else "")
    return Case(name, make, _plain_tags(shape, dtype, layout, tags))


def reduce_truth(x, dims, keepdim, how) -> Tensor:
    return reduce_reference(x.double(), dims, keepdim, how)


def reduce_check(actual: Tensor, inputs: tuple) -> None:
    x, dims, keepdim, how = inputs
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()
    truth = reduce_truth(*inputs)
    if how in ("max", "min"):
        return tolerances.assert_exact(actual, truth.to(x.dtype))
    tolerances.assert_composite(actual, REDUCTIONS[how](x, dims, keepdim), truth, what=how)


def reduce_suite() -> Suite:
    case, bf16 = _reduce_case, torch.bfloat16
    images = {"dims": (2, 3)}
    cases = (
        case(0, 5),
        case(5, 0, how="sum"),
        case(3, 0, 4, dims=(0, 2), how="sum", keepdim=True),
        case(0, 5, how="max"),
        case(dims=()),
        case(1, 1, tags="one"),
        case(7, 1, how="max", tags="one"),
        case(1, 5, 1, dims=(0, 2), tags="one"),
        # Registers, four rows together, pieces of 512, 256 and 128 elements, four of them together.
        *(case(5, n, tags="odd") for n in (2, 7, 16, 17, 49, 127, 129, 513, 2049, 9001)),
        *(case(n, 67, how="sum", tags="odd") for n in (1, 3, 4, 15, 17, 33)),
        *(case(3, n, how="sum") for n in (2500, 4096)),
        *(case(5, 67, how=how, keepdim=True, dtype=dtype) for how in ("max", "min") for dtype in (torch.float32, bf16)),
        *(case(5, n, dtype=bf16, tags="odd") for n in (3, 67, 600)),
        case(3, 4, 5, 6, dims=(), tags="odd"),
        case(3, 4, 5, 6, dims=(1, 2)),
        case(3, 4, 5, 6, dims=(0, -1), how="sum"),
        case(3, 4, 5, 6, dims=(0, 2), how="min"),
        case(3, 4, 5, 6, dims=(3, 1, 0), keepdim=True),
        # Tokens: columns fewer and more than a register has lanes; rows as many as chains, and one more or less.
        *(case(3, n, 37, dims=(1,), tags="odd") for n in (2, 15, 16, 17, 129, 600)),
        *(case(3, 19, n, dims=(1,)) for n in (1, 5, 16, 64, 65, 130)),
        *(case(3, 19, 37, dims=(1,), how=how) for how in ("sum", "max", "min")),
        case(3, 19, 37, dims=(1,), dtype=bf16),
        case(19, 37, dims=(0,), how="max", dtype=bf16),
        # Images in all formats.
        *(case(2, 21, 7, 7, **images, layout=name) for name in IMAGE_LAYOUTS),
        *(case(2, 21, 7, 7, **images, layout=name, how="max", keepdim=True) for name in ("last", "first_sliced")),
        *(case(2, 21, 9, 8, **images, layout=name, dtype=bf16) for name in ("last", "pixels_apart")),
        *(case(2, 5, 9, 8, dims=(0, 2, 3), layout=name) for name in ("last", "first", "turned")),
        case(2, 5, 9, 8, dims=(1, 2, 3), layout="last"),
        *(case(9, 23, layout=name) for name in ("transposed", "misaligned", "sliced", "every_second", "rows_repeated")),
        *(case(9, 23, dims=(0,), layout=name, how="sum") for name in ("transposed", "sliced", "every_third")),
        case(9, 23, dims=(0, 1), layout="transposed", dtype=bf16),
        case(4, 100, 7, 37, **images, tags="threads odd"),
        case(4, 130, 12, 13, **images, layout="last", tags="threads"),
        case(3, 300, 100, dims=(1,), how="sum", dtype=bf16, tags="threads"),
        case(300, 301, dims=(), tags="threads"),
    )
    return Suite("reduce", cases, reduce_truth, reduce_check)


def _group_norm_case(
    *shape: int,
    groups: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "first",
    weight: torch.dtype | None = torch.float32,
    bias: torch.dtype | None = torch.float32,
    activation: str = "none",
    offset: float = 0.0,
    tags: str = "",
) -> Case:
    def make(generator: torch.Generator) -> tuple:
        def parameter(of: torch.dtype | None) -> Tensor | None:
            # The last stride is two.
            return None if of is None else torch.randn(shape[1], 2, generator=generator).to(of)[:, 0]

        x = (offset + torch.randn(shape, generator=generator)).to(dtype)
        return IMAGE_LAYOUTS[layout](x), groups, parameter(weight), parameter(bias), 1e-5, activation

    name = f"{'x'.join(map(str, shape))}-groups{groups}-{_short(dtype)}"
    name += f"-{layout}" if layout != "first" else ""
    name += f"-weight_{weight and _short(weight)}" if weight is not torch.float32 else ""
    name += f"-bias_{bias and _short(bias)}" if bias is not torch.float32 else ""
    name += (f"-{activation}" if activation != "none" else "") + (f"-offset{offset:g}" if offset else "")
    tags = _plain_tags(shape, dtype, layout, tags) - {"nd"}
    return Case(name, make, tags | ({"nd"} if len(shape) != 4 else set()))


def group_norm_truth(x, groups, weight, bias, eps, activation) -> Tensor:
    if x.numel() == 0:
        return x.double()
    double = [t if t is None else t.double() for t in (weight, bias)]
    return group_norm_reference(x.double(), groups, *double, eps, activation)


def group_norm_check(actual: Tensor, inputs: tuple) -> None:
    x, groups, weight, bias, eps, activation = inputs
    assert actual.dtype == x.dtype
    truth = group_norm_truth(*inputs)
    if x.numel() == 0:
        return tolerances.assert_exact(actual, truth.to(x.dtype))
    # torch refuses bfloat16 parameters beside a float32 input, and takes any for contiguous.
    floats = [t if t is None else t.float().contiguous() for t in (weight, bias)]
    eager = lamina.reference.int8_linear.ACTIVATIONS[activation](
        torch.native_group_norm(x.float().contiguous(), *floats, *x.shape[:2], x[0, 0].numel(), groups, eps)[0]
    )
    floor = (
        tolerances.eps(x.dtype) * truth.abs().max().item() + tolerances.activation_error(activation, truth).max().item()
    )
    tolerances.assert_composite(actual, eager.to(x.dtype), truth, floor=floor)


def group_norm_suite() -> Suite:
    case, bf16 = _group_norm_case, torch.bfloat16
    cases = (
        case(0, 4, 3, 3, groups=2),
        case(2, 4, 0, 3, groups=2, layout="last"),
        case(1, 1, 1, 1, groups=1, tags="one"),
        case(3, 8, 1, 1, groups=2, layout="last", tags="one"),
        case(5, 12, 1, groups=3, tags="one"),
        case(2, 6, 37, groups=3, tags="odd"),
        case(2, 6, 3, 4, 5, groups=2, tags="odd"),
        # Channels of a group within a register, across registers, and all of them.
        *(case(2, 24, 5, 7, groups=g, tags="odd") for g in (1, 2, 3, 8, 24)),
        *(case(2, 24, 5, 7, groups=g, layout="last", tags="odd") for g in (1, 2, 3, 8, 24)),
        case(2, 37, 9, 8, groups=37, layout="last", dtype=bf16),
        case(2, 37, 9, 8, groups=1, dtype=bf16),
        # Pieces of 512, 256 and 128 pixels, four rows together.
        *(case(1, 10, 23, 29, groups=2, layout=name, tags="odd") for name in ("first", "last")),
        case(1, 3, 61, 67, groups=3, activation="silu"),
        *(case(2, 12, 5, 6, groups=4, layout=name) for name in IMAGE_LAYOUTS if name not in ("first", "last")),
        case(2, 12, 5, 6, groups=4, layout="turned", dtype=bf16),
        *(case(2, 12, 5, 6, groups=4, layout=n, activation=a) for n in ("first", "last") for a in ("relu", "gelu")),
        case(2, 12, 5, 6, groups=4, weight=None),
        case(2, 12, 5, 6, groups=4, bias=None, layout="last"),
        case(2, 12, 5, 6, groups=4, weight=None, bias=None),
        case(2, 12, 5, 6, groups=4, weight=bf16, bias=bf16, dtype=bf16),
        *(case(2, 12, 15, 16, groups=4, offset=1e3, layout=name) for name in ("first", "last")),
        case(3, 32, 19, 17, groups=8, tags="threads odd"),
        case(3, 36, 19, 17, groups=9, layout="last", dtype=bf16, activation="silu", tags="threads"),
        case(2, 32, 24, 25, groups=4, layout="every_second", tags="threads"),
    )
    return Suite("group_norm", cases, group_norm_truth, group_norm_check)


def _embedding_case(
    *shape: int,
    v: int = 50,
    d: int,
    dtype: torch.dtype = torch.float32,
    index: torch.dtype = torch.int64,
    layout: str = "contiguous",
    table: str = "contiguous",
    tags: str = "",
) -> Case:
    def make(generator: torch.Generator) -> tuple:
        indices = torch.randint(0, v, shape, generator=generator, dtype=index)
        weight = 20 * torch.randn(v, d, generator=generator)
        rows = {"transposed": lambda t: t.T.contiguous().T, "every_second": lambda t: t.repeat(1, 2)[:, ::2]}
        weight = rows.get(table, LAYOUTS.get(table))(weight.to(dtype))
        apart = {
            "transposed": lambda t: t.mT.contiguous().mT,
            "every_second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        }
        return apart.get(layout, lambda t: t)(indices), weight

    name = f"{'x'.join(map(str, shape))}-of-{v}x{d}-{str(dtype).removeprefix('torch.')}"
    name += "-int32" * (index is torch.int32)
    name += (f"-{layout}" if layout != "contiguous" else "") + (f"-table_{table}" if table != "contiguous" else "")
    words = _plain_tags((*shape, d), dtype, "sliced" if (layout, table) != ("contiguous",) * 2 else layout, tags)
    return Case(name, make, words)


def embedding_truth(indices, weight) -> Tensor:
    return embedding_reference(indices, weight).double()


def embedding_check(actual: Tensor, inputs: tuple) -> None:
    assert actual.is_contiguous()
    tolerances.assert_exact(actual, embedding_reference(*inputs))


def embedding_suite() -> Suite:
    case, bf16 = _embedding_case, torch.bfloat16
    cases = (
        case(0, d=8),
        case(3, d=0),
        case(2, 0, d=5, index=torch.int32),
        case(1, v=1, d=1, tags="one"),
        case(d=7, tags="one"),
        # Registers of 16, 32 and 64 bytes, four of them, and what is left.
        *(case(5, d=d, tags="odd") for d in (1, 3, 4, 15, 16, 17, 33, 64, 65, 100, 384)),
        *(case(5, d=d, dtype=bf16, tags="odd") for d in (1, 7, 31, 65, 129)),
        *(case(2, 7, d=19, dtype=t) for t in (torch.int8, torch.float64, torch.int64, torch.float16, torch.bool)),
        case(3, 4, 5, d=33, index=torch.int32, tags="odd"),
        *(case(3, 4, 6, d=33, layout=name) for name in ("transposed", "every_second")),
        case(4, 6, d=33, layout="transposed", index=torch.int32, dtype=bf16),
        *(case(2, 9, d=33, table=name) for name in ("transposed", "every_second", "sliced", "misaligned")),
        case(2, 9, d=33, table="transposed", dtype=bf16, index=torch.int32),
        case(16, 33, v=700, d=129, tags="threads odd"),
        case(16, 64, v=700, d=384, dtype=bf16, index=torch.int32, layout="transposed", tags="threads"),
        case(16, 64, v=300, d=96, table="transposed", tags="threads"),
    )
    return Suite("embedding", cases, embedding_truth, embedding_check)


SUITES = {name.removesuffix("_suite"): make() for name, make in list(globals().items()) if name.endswith("_suite")}

PAIRS = [(suite, case) for suite in SUITES.values() for case in suite.cases]
PAIR_IDS = [f"{suite.op}-{case.id}" for suite, case in PAIRS]
