"""int8_linear: what holds beside "close to the reference", and every way to call it wrongly."""

import mmap
import re

import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import (
    INT8_LAYER_SQNR_DB,
    activation_error,
    assert_activation,
    assert_exact,
    assert_lossy,
    assert_sum,
)
from torch.nn import functional as F

import lamina
from lamina import _C
from lamina.ops import PackedInt8Weight, int8_linear, pack_int8_weight, unpack_int8_weight
from lamina.ops.int8_linear import ACTIVATIONS as FUSED
from lamina.quant import dequantize_weight, quantize_weight
from lamina.reference.int8_linear import int8_linear as reference
from lamina.reference.int8_linear import requantize

ACTIVATIONS = list(FUSED)
GATED = ["gelu", "gelu_tanh", "quick_gelu", "silu"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LARGEST_K = (2**31 - 1) // (127 * 127)


def codes_of(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)


def identity(k: int) -> PackedInt8Weight:
    """A weight that gives the quantized inputs back."""
    return pack_int8_weight(torch.eye(k, dtype=torch.int8), torch.ones(k))


# -- packing


@settings(deadline=None, derandomize=True, max_examples=60)
@given(n=st.integers(0, 140), k=st.integers(0, 80), seed=st.integers(0, 2**31))
def test_pack_and_unpack_are_inverse(n, k, seed):
    codes = codes_of(n, k, torch.Generator().manual_seed(seed))
    packed = pack_int8_weight(codes, torch.ones(n))
    assert_exact(unpack_int8_weight(packed, k), codes)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 4), (17, 5), (64, 8), (65, 7), (150, 30), (128, 64)])
def test_packed_layout(n, k, isa, generator):
    """Panels of 64 channels, [k / 4][channels][4], the same bytes whatever packed them; their number tells k."""
    codes = codes_of(n, k, generator)
    with lamina.force_isa(isa):
        packed = pack_int8_weight(codes, torch.rand(n, generator=generator))
    n_padded, k_padded = -(-n // 16) * 16, -(-k // 4) * 4
    padded = torch.zeros(n_padded, k_padded, dtype=torch.int8)
    padded[:n, :k] = codes
    panels = [panel.reshape(len(panel), -1, 4).transpose(0, 1).flatten() for panel in padded.split(64)]
    assert_exact(packed.data, torch.cat([*panels, torch.zeros(k_padded - k, dtype=torch.int8)]))
    # What the offset of 128, which unsigned codes carry, adds to each sum.
    assert_exact(packed.compensation, (128 * padded.long().sum(1)).int())


def test_packing_takes_any_strides(generator):
    weight = torch.randn(70, 33, generator=generator)
    plain = pack_int8_weight(weight)
    for layout in ("transposed", "misaligned", "sliced", "every_second"):
        for ours, expected in zip(pack_int8_weight(cases.LAYOUTS[layout](weight)), plain, strict=True):
            assert_exact(ours, expected, layout)


def test_packed_weight_owns_its_memory(generator):
    codes, scale = codes_of(5, 7, generator), torch.ones(5)
    packed = pack_int8_weight(codes, scale)
    x = torch.randn(3, 7, generator=generator)
    before = int8_linear(x, packed)
    codes.zero_()
    scale.zero_()
    assert_exact(int8_linear(x, packed), before)


@pytest.mark.parametrize(("n", "k"), [(768, 768), (3072, 768), (768, 3072), (30522, 768)])
def test_packed_bytes_are_a_quarter_of_float32(n, k):
    packed = pack_int8_weight(torch.zeros(n, k, dtype=torch.int8), torch.ones(n))
    assert packed.data.numel() == _C.int8_linear_packed_size(n, k)
    assert sum(t.nbytes for t in packed) <= 0.27 * 4 * n * k


# -- quantization of weights


@DTYPES
def test_quantized_weight_is_the_nearest(dtype, generator):
    weight = torch.randn(40, 50, generator=generator).to(dtype)
    codes, scale = quantize_weight(weight)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert codes.abs().amax(1).eq(127).all()
    error = (dequantize_weight(codes, scale).double() - weight.double()).abs()
    # Half a step, and the roundings of the scale and of its inverse at codes up to 127.
    assert (error <= scale.double()[:, None] * (0.5 + 127 * 4 * torch.finfo(torch.float32).eps)).all()


def test_a_channel_of_zeros_means_zero():
    weight = torch.tensor([[0.0, 0.0], [1.0, -2.0], [1e-38, 0.0]])
    codes, scale = quantize_weight(weight)
    assert codes.tolist() == [[0, 0], [64, -127], [0, 0]]
    assert scale.isfinite().all()
    bias = torch.tensor([0.25, 0.5, -3.0])
    y = int8_linear(torch.full((2, 2), 5.0), pack_int8_weight(weight), bias)
    assert y[:, 0].tolist() == [0.25, 0.25]
    assert y[:, 2].tolist() == [-3.0, -3.0]


def test_extreme_weights_keep_their_precision(generator):
    weight = torch.randn(6, 32, generator=generator) * torch.tensor([1e-30, 1e-20, 1.0, 1e20, 1e37, 1e-35])[:, None]
    codes, scale = quantize_weight(weight)
    for channel in range(6):
        restored = dequantize_weight(codes, scale)[channel].double() / scale[channel].double()
        assert_lossy(restored, weight[channel].double() / scale[channel].double(), min_sqnr_db=INT8_LAYER_SQNR_DB)


# -- arithmetic


@DTYPES
def test_close_to_the_float_layer(dtype, isa, generator):
    """What 8 bits cost a layer with normal weights and inputs."""
    x, weight = torch.randn(64, 768, generator=generator), torch.randn(96, 768, generator=generator)
    with lamina.force_isa(isa):
        y = int8_linear(x.to(dtype), pack_int8_weight(weight))
    assert_lossy(y, x.double() @ weight.double().T, min_sqnr_db=INT8_LAYER_SQNR_DB)


@pytest.mark.parametrize("exponent", [-60, -1, 1, 20, 60])
def test_scaling_by_a_power_of_two_is_exact(exponent, isa, generator):
    x, weight = torch.randn(9, 37, generator=generator), torch.randn(21, 37, generator=generator)
    factor = 2.0**exponent
    with lamina.force_isa(isa):
        y = int8_linear(x, pack_int8_weight(weight))
        assert_exact(int8_linear(x * factor, pack_int8_weight(weight)), y * factor, "of x")
        assert_exact(int8_linear(x, pack_int8_weight(weight * factor)), y * factor, "of the weight")
        assert_exact(int8_linear(-x, pack_int8_weight(weight)), -y, "sign")


@DTYPES
@pytest.mark.parametrize("k", [1, 5, 64, 333])
def test_rows_do_not_depend_on_each_other(k, dtype, isa, generator):
    """Any number of rows gives each row the same bits: the result must not depend on who shares the batch."""
    x = torch.randn(130, k, generator=generator).to(dtype)
    packed = pack_int8_weight(torch.randn(67, k, generator=generator))
    with lamina.force_isa(isa):
        whole = int8_linear(x, packed, activation="silu")
        for m in (*range(1, 21), 127, 128, 129, 130):
            assert_exact(int8_linear(x[:m], packed, activation="silu"), whole[:m], f"{m} rows")
        assert_exact(int8_linear(x[77:78], packed, activation="silu"), whole[77:78], "one row")


def test_channels_do_not_depend_on_each_other(isa, generator):
    x, weight = torch.randn(7, 50, generator=generator), torch.randn(131, 50, generator=generator)
    with lamina.force_isa(isa):
        whole = int8_linear(x, pack_int8_weight(weight))
        for n in (1, 15, 16, 17, 63, 64, 65, 130):
            assert_exact(int8_linear(x, pack_int8_weight(weight[:n])), whole[:, :n], f"{n} channels")


def test_bfloat16_is_float32_rounded_once(isa, generator):
    x = torch.randn(13, 70, generator=generator).bfloat16()
    packed = pack_int8_weight(torch.randn(37, 70, generator=generator))
    bias = torch.randn(37, generator=generator)
    with lamina.force_isa(isa):
        for activation in ACTIVATIONS:
            wide = int8_linear(x.float(), packed, bias, activation=activation)
            assert_exact(int8_linear(x, packed, bias, activation=activation), wide.bfloat16(), activation)


def test_bfloat16_bias_is_its_float32_value(generator):
    x, packed = torch.randn(5, 9, generator=generator), pack_int8_weight(torch.randn(33, 9, generator=generator))
    bias = torch.randn(33, generator=generator).bfloat16()
    assert_exact(int8_linear(x, packed, bias), int8_linear(x, packed, bias.float()))


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    lead=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    k=st.integers(0, 40),
    n=st.integers(0, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "transposed", "misaligned", "sliced", "every_second", "columns_repeated"]),
    bias=st.sampled_from([None, torch.float32, torch.bfloat16]),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_strides(lead, k, n, dtype, layout, bias, activation, seed):
    if layout == "transposed" and not lead:
        layout = "every_second"
    case = cases._int8_linear_case(*lead, k=k, n=n, dtype=dtype, layout=layout, bias=bias, activation=activation)
    x, *rest = case.inputs(seed)
    data, scale, compensation, b, _ = rest
    packed = PackedInt8Weight(data, scale, compensation)
    y = int8_linear(x, packed, b, activation=activation)
    assert y.shape == (*lead, n)
    assert y.is_contiguous()
    plain = int8_linear(x.contiguous().reshape(int(np.prod(lead)), k), packed, b, activation=activation)
    assert_exact(y.reshape(plain.shape), plain)
    # The sum's tolerance is in terms of each element, so it needs no minimum signal here.
    linear = reference(x, unpack_int8_weight(packed, k), scale, b)
    magnitude = linear.abs() + (0.0 if b is None else 2 * b.double().abs())
    error = (y.double() - reference(x, unpack_int8_weight(packed, k), scale, b, activation)).abs()
    eps32, out = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    tolerance = 1.13 * magnitude * (2 * eps32 + out) + activation_error(activation, linear) + torch.finfo(dtype).tiny
    assert (error <= tolerance).all()


def untouched_memory(elements: int) -> torch.Tensor:
    """bfloat16 that takes no memory until it is written; MAP_NORESERVE has a name only from Python 3.13 on."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.bfloat16)


def test_strides_beyond_two_billion_elements():
    """Rows 2^31 + 8 elements apart; the memory between them is never touched, so it costs nothing."""
    row = 2**31 + 8
    x = untouched_memory(row + 24).as_strided((2, 24), (row, 1))
    x.copy_(torch.randn(2, 24))
    packed = pack_int8_weight(torch.randn(5, 24))
    assert_exact(int8_linear(x, packed), int8_linear(x.clone(), packed))


def test_columns_beyond_two_billion_elements():
    column = 2**27 + 1
    x = untouched_memory(16 * column + 3).as_strided((3, 17), (1, column))
    x.copy_(torch.randn(3, 17))
    packed = pack_int8_weight(torch.randn(5, 17))
    assert_exact(int8_linear(x, packed), int8_linear(x.clone(), packed))


# -- values at the edge


@DTYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_stays_alone(bad, dtype, isa, generator):
    x = torch.randn(9, 37, generator=generator).to(dtype)
    packed = pack_int8_weight(torch.randn(70, 37, generator=generator))
    others = [i for i in range(9) if i != 4]
    with lamina.force_isa(isa):
        clean = int8_linear(x, packed)
        for place in (0, 5, 36):
            spoiled = x.clone()
            spoiled[4, place] = bad
            y = int8_linear(spoiled, packed)
            assert y[4].isnan().all(), f"the row that holds {bad} gives {y[4, :3].tolist()}"
            assert_exact(y[others], clean[others])


@DTYPES
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, 1e-45])
def test_a_row_of_nothing_gives_the_bias(value, dtype, isa, generator):
    """Below 1e-36 the inverse of a scale would overflow; such a row counts as zero."""
    bias = torch.randn(70, generator=generator).to(dtype)
    packed = pack_int8_weight(torch.randn(70, 5, generator=generator))
    with lamina.force_isa(isa):
        y = int8_linear(torch.full((3, 5), value, dtype=dtype), packed, bias)
    assert_exact(y, bias.expand(3, 70))


@pytest.mark.parametrize("size", [1e-35, 1e-30, 1e30, 1e36, 3e38])
def test_tiny_and_huge_rows_keep_their_precision(size, isa, generator):
    x = torch.rand(4, 33, generator=generator) * size
    weight = torch.rand(20, 33, generator=generator) / 40  # positive and small: no sum overflows or cancels
    with lamina.force_isa(isa):
        y = int8_linear(x, pack_int8_weight(weight))
    truth = reference(x, *quantize_weight(weight))
    assert y.isfinite().all()
    assert ((y.double() - truth).abs() <= 4 * torch.finfo(torch.float32).eps * truth.abs()).all()


def test_mixed_row_sizes_do_not_leak(isa, generator):
    x = torch.randn(6, 40, generator=generator) * torch.tensor([1e30, 1e-30, 1.0, 0.0, 1e10, 1e-10])[:, None]
    packed = pack_int8_weight(torch.randn(9, 40, generator=generator))
    with lamina.force_isa(isa):
        whole = int8_linear(x, packed)
        for row in range(6):
            assert_exact(int8_linear(x[row : row + 1], packed), whole[row : row + 1])


@pytest.mark.parametrize("sign", [1, -1])
def test_one_large_value_takes_the_whole_range(sign, isa):
    x = torch.zeros(2, 30)
    x[0, 3], x[1, 29] = sign * 1000.0, sign * 1e-3
    with lamina.force_isa(isa):
        y = int8_linear(x, identity(30))
    assert_sum(y, x.double(), terms=2, magnitude=x.double().abs())


# -- activations


def activation_grid() -> torch.Tensor:
    """Dense in [-1000, 1000], denser where the functions bend, and down to the smallest numbers."""
    small = torch.logspace(-44, 0, 500)
    return torch.cat(
        [
            torch.linspace(-1000, 1000, 60001),
            torch.linspace(-12, 12, 60001),
            torch.linspace(-4.76, -4.74, 2001),
            torch.linspace(4.74, 4.76, 2001),
            torch.linspace(-90, -80, 4001),
            small,
            -small,
            torch.tensor([0.0, -0.0]),
        ]
    )


def activate(values: torch.Tensor, activation: str) -> torch.Tensor:
    """The fused activation of exactly these numbers: they come in as the bias of a row of zeros."""
    packed = pack_int8_weight(torch.ones(len(values), 1, dtype=torch.int8), torch.ones(len(values)))
    return int8_linear(torch.zeros(1, 1, dtype=values.dtype), packed, values, activation=activation)[0]


def exact_activation(values: torch.Tensor, activation: str) -> torch.Tensor:
    return reference(
        torch.zeros(1, 1), torch.zeros(len(values), 1, dtype=torch.int8), torch.ones(len(values)), values, activation
    )[0]


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_within_its_documented_error(activation, dtype, isa):
    values = activation_grid().to(dtype)
    with lamina.force_isa(isa):
        actual = activate(values, activation)
    assert_activation(actual, values.double(), exact_activation(values, activation), activation)


@pytest.mark.parametrize("activation", GATED)
def test_activation_is_within_the_three_millionths_of_the_docstring(activation, isa):
    """Where the rounding of float32 itself is smaller than that."""
    values = torch.linspace(-20, 12, 100001)
    with lamina.force_isa(isa):
        error = (activate(values, activation).double() - exact_activation(values, activation)).abs()
    assert error.max() <= 3e-6
    assert "within 3e-6" in int8_linear.__doc__


@pytest.mark.parametrize("activation", GATED)
def test_activation_is_exact_relative_to_small_values_and_beyond_its_table(activation, isa):
    small, large = torch.logspace(-30, -3, 1000), torch.logspace(1.3, 38, 1000)
    values = torch.cat([small, -small, torch.zeros(1)])
    with lamina.force_isa(isa):
        near = activate(values, activation).double()
        assert_exact(activate(large, activation), large)
        assert_exact(activate(-large, activation), torch.zeros(1000))
    assert ((near - exact_activation(values, activation)).abs() <= 1e-6 * values.double().abs()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_nan_and_infinity(activation, isa):
    nan, inf = float("nan"), float("inf")
    with lamina.force_isa(isa):
        at_nan, at_inf, at_minus = activate(torch.tensor([nan, inf, -inf]), activation).tolist()
    assert at_nan != at_nan
    assert at_inf == {"tanh": 1, "relu6": 6}.get(activation, inf)
    if activation == "tanh":
        assert at_minus == -1
    else:
        # 0 is the limit, where x times the gate would be NaN.
        assert at_minus == (-inf if activation == "none" else 0)


def test_activation_none_is_the_default(generator):
    x, packed = torch.randn(3, 4, generator=generator), pack_int8_weight(torch.randn(5, 4, generator=generator))
    assert_exact(int8_linear(x, packed), int8_linear(x, packed, activation="none"))
    assert_exact(int8_linear(x, packed).relu(), int8_linear(x, packed, activation="relu"))


# -- the straight-through gradient


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lead", [(7,), (2, 3), ()], ids=str)
def test_gradient_is_that_of_the_dequantized_layer(lead, activation, dtype, generator):
    """As if nothing had been rounded: the gradient of act(x W^T + b) at the value that int8 gave."""
    k, n = 20, 33
    x = torch.randn(*lead, k, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(n, generator=generator).to(dtype).requires_grad_()
    packed = pack_int8_weight(torch.randn(n, k, generator=generator) / k**0.5)
    grad = torch.randn(*lead, n, generator=generator).to(dtype)
    int8_linear(x, packed, bias, activation=activation).backward(grad)

    before = int8_linear(x.detach(), packed, bias.detach()).double().requires_grad_()
    exact_activation_of(before, activation).backward(grad.double())
    weight = dequantize_weight(unpack_int8_weight(packed, k), packed.scale).double()
    # torch's derivative of the activation is a sum of terms up to 1, at a value that is itself rounded once.
    out = torch.finfo(dtype).eps
    slack = out * (4 + before.detach().abs()) * grad.double().abs()
    # The weight is rounded to x's dtype, then comes the sum.
    terms = before.grad.abs() @ weight.abs()
    assert_sum(x.grad, before.grad @ weight, terms=n, magnitude=terms, extra=slack @ weight.abs() + out * terms)
    rows = before.grad.reshape(-1, n)
    extra = slack.reshape(-1, n).sum(0)
    assert_sum(bias.grad, rows.sum(0), terms=len(rows), magnitude=rows.abs().sum(0), extra=extra)


def exact_activation_of(value: torch.Tensor, activation: str) -> torch.Tensor:
    functions = {"none": lambda v: v * 1, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    functions["gelu_tanh"] = lambda v: F.gelu(v, approximate="tanh")
    functions["quick_gelu"] = lambda v: v * torch.sigmoid(1.702 * v)
    functions |= {"tanh": torch.tanh, "relu6": F.relu6, "hardswish": F.hardswish}
    return functions[activation](value)


def test_gradient_does_not_change_the_result(generator):
    x, packed = torch.randn(5, 9, generator=generator), pack_int8_weight(torch.randn(33, 9, generator=generator))
    plain = int8_linear(x, packed)
    y = int8_linear(x.requires_grad_(), packed)
    assert y.requires_grad
    assert_exact(y.detach(), plain)
    with torch.no_grad():
        assert not int8_linear(x, packed).requires_grad


def test_gradient_only_where_asked(generator):
    bias = torch.randn(33, generator=generator, requires_grad=True)
    x, packed = torch.randn(5, 9, generator=generator), pack_int8_weight(torch.randn(33, 9, generator=generator))
    int8_linear(x, packed, bias).sum().backward()
    assert_exact(bias.grad, torch.full((33,), 5.0))
    assert x.grad is None


# -- what bad input gets


@pytest.fixture
def packed():
    return pack_int8_weight(torch.randn(6, 5))


def one_sentence(error: pytest.ExceptionInfo) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 200


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str
)
def test_refuses_other_dtypes(dtype, packed):
    with pytest.raises(
        (ValueError, TypeError), match=r"int8_linear: x is .*, but must be float32 or bfloat16"
    ) as error:
        int8_linear(torch.ones(2, 5).to(dtype), packed)
    one_sentence(error)


def test_refuses_a_lazy_conjugate(packed):
    with pytest.raises((ValueError, TypeError), match=r"int8_linear: x is .*, but must be float32 or bfloat16"):
        int8_linear(torch.ones(2, 5, dtype=torch.complex64).conj(), packed)


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (2, 7), (2, 8), (2, 9), (2, 1), (2, 0), (4,), (8,), (2, 3, 8)])
def test_refuses_other_numbers_of_features(shape, packed):
    """Also 6, 7 and 8, which fill the padding of 5 to a multiple of 4."""
    with pytest.raises(ValueError, match=f"int8_linear: x has {shape[-1]} features") as error:
        int8_linear(torch.ones(shape), packed)
    one_sentence(error)


def test_refuses_a_scalar(packed):
    with pytest.raises(ValueError, match=r"int8_linear: x .*dimension") as error:
        int8_linear(torch.tensor(1.0), packed)
    one_sentence(error)


@pytest.mark.parametrize("shape", [(5,), (7,), (1,), (6, 1), (1, 6), ()])
def test_refuses_a_bias_of_another_shape(shape, packed):
    with pytest.raises(ValueError, match=r"int8_linear: bias has shape \[.*\], but must be \[6\]") as error:
        int8_linear(torch.ones(2, 5), packed, torch.ones(shape))
    one_sentence(error)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float64, "float64"), (torch.float16, "float16"), (torch.int32, "int32")]
)
def test_refuses_a_bias_of_another_dtype(dtype, name, packed):
    with pytest.raises(ValueError, match=f"int8_linear: bias is {name}, but must be float32 or bfloat16"):
        int8_linear(torch.ones(2, 5), packed, torch.ones(6, dtype=dtype))


@pytest.mark.parametrize("activation", ["tanhh", "ReLU", "gelu_erf", " "])
def test_refuses_an_unknown_activation(activation, packed):
    with pytest.raises(
        ValueError, match=f"int8_linear: activation '{activation}' is unknown; use none, relu, relu6, gelu"
    ) as error:
        int8_linear(torch.ones(2, 5), packed, activation=activation)
    one_sentence(error)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scale", torch.ones(6, dtype=torch.float64), "packed_weight.scale is float64, but must be float32"),
        ("scale", torch.ones(6, 1), r"packed_weight.scale has shape \[6, 1\]"),
        ("scale", torch.ones(12)[::2], "packed_weight.scale must be contiguous"),
        ("data", torch.zeros(128, dtype=torch.uint8), "packed_weight.data is uint8, but must be int8"),
        (
            "data",
            torch.zeros(127, dtype=torch.int8),
            r"packed_weight.data has 127 bytes, but a weight \[6, 5\] takes 131",
        ),
        ("data", torch.zeros(16, 8, dtype=torch.int8), r"packed_weight.data has shape \[16, 8\]"),
        ("data", torch.zeros(256, dtype=torch.int8)[::2], "packed_weight.data must be contiguous"),
        ("compensation", torch.zeros(17), "packed_weight.compensation is float32, but must be int32"),
        ("compensation", torch.zeros(6, dtype=torch.int32), r"packed_weight.compensation has shape \[6\]"),
        ("compensation", torch.zeros(8, 2, dtype=torch.int32), r"packed_weight.compensation has shape \[8, 2\]"),
    ],
)
def test_refuses_a_damaged_packed_weight(field, value, message, packed):
    with pytest.raises(ValueError, match=f"int8_linear: .*{message}") as error:
        int8_linear(torch.ones(2, 5), packed._replace(**{field: value}))
    one_sentence(error)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (1, 1, 1, 1)])
def test_packing_refuses_other_ranks(shape):
    with pytest.raises(ValueError, match=r"pack_int8_weight: weight has shape \[.*\], but must be \[N, K\]"):
        pack_int8_weight(torch.ones(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_packing_refuses_weights_that_are_not_finite(bad):
    weight = torch.ones(5, 7)
    weight[3, 2] = bad
    with pytest.raises(ValueError, match="output channel 3 has a NaN or infinite weight") as error:
        pack_int8_weight(weight)
    one_sentence(error)


def test_packing_wants_a_scale_exactly_for_codes():
    with pytest.raises(ValueError, match="an int8 weight needs its scale"):
        pack_int8_weight(torch.ones(2, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match="scale goes with an int8 weight, but the weight is floating point"):
        pack_int8_weight(torch.ones(2, 3), torch.ones(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_packing_refuses_bad_scales(bad):
    scale = torch.ones(4)
    scale[2] = bad
    with pytest.raises(ValueError, match=r"int8_linear_pack: scale\[2\] is .*, but must be finite and not negative"):
        pack_int8_weight(torch.ones(4, 3, dtype=torch.int8), scale)


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), (1, 4), ()])
def test_packing_refuses_scales_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"int8_linear_pack: scale has shape \[.*\], but must be \[4\]"):
        pack_int8_weight(torch.ones(4, 3, dtype=torch.int8), torch.ones(shape))


def test_packing_refuses_minus_128():
    """It has no positive counterpart, and the AVX2 kernel moves signs between operands."""
    weight = torch.zeros(4, 3, dtype=torch.int8)
    weight[2, 1] = -128
    with pytest.raises(ValueError, match=re.escape("weight[2, 1] is -128, but codes must lie in [-127, 127]")):
        pack_int8_weight(weight, torch.ones(4))


@pytest.mark.parametrize(("dtype", "name"), [(torch.int32, "int32"), (torch.uint8, "uint8"), (torch.bool, "bool")])
def test_packing_refuses_other_integers(dtype, name):
    with pytest.raises(ValueError, match=f"int8_linear_pack: weight is {name}, but must be int8"):
        pack_int8_weight(torch.ones(4, 3).to(dtype), torch.ones(4))


def test_packing_refuses_more_inputs_than_int32_can_sum():
    with pytest.raises(
        ValueError, match=f"in_features is {LARGEST_K + 1}, but int32 sums are exact only up to {LARGEST_K}"
    ):
        pack_int8_weight(torch.zeros(1, LARGEST_K + 1, dtype=torch.int8), torch.ones(1))
    pack_int8_weight(torch.zeros(1, LARGEST_K, dtype=torch.int8), torch.ones(1))


def test_unpacking_refuses_another_size(packed):
    with pytest.raises(ValueError, match="int8_linear_unpack: data has shape"):
        unpack_int8_weight(packed, 9)


def test_the_bias_of_a_training_layer_is_taken():
    packed = pack_int8_weight(torch.nn.Parameter(torch.randn(6, 5)))
    bias = torch.nn.Parameter(torch.randn(6))
    with torch.no_grad():
        assert_exact(int8_linear(torch.ones(1, 5), packed, bias), int8_linear(torch.ones(1, 5), packed, bias.detach()))


# -- the ends of the epilogue


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_residual_is_added_before_the_activation(activation, residual_dtype, isa, generator):
    """After bias, each rounded once: the order is part of the contract."""
    x, packed = torch.randn(13, 50, generator=generator), pack_int8_weight(torch.randn(70, 50, generator=generator))
    bias = torch.randn(70, generator=generator)
    residual = torch.randn(13, 70, generator=generator).to(residual_dtype)
    with lamina.force_isa(isa):
        expected = int8_linear(x, packed, bias) + residual.float()
        expected = expected.relu() if activation == "relu" else expected
        assert_exact(int8_linear(x, packed, bias, residual=residual, activation=activation), expected)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 13])
def test_codes_and_floats_are_bit_equal_on_every_isa(m, activation, generator):
    """No fused multiply-add before the activation, so nothing rounds differently."""
    x, packed = torch.randn(m, 333, generator=generator), pack_int8_weight(torch.randn(300, 333, generator=generator))
    bias, residual = torch.randn(300, generator=generator), torch.randn(m, 300, generator=generator)
    arguments = {"activation": activation, "residual": residual}
    codes, floats = [], []
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            codes.append(int8_linear(x, packed, bias, out_scale=torch.tensor(0.31), **arguments))
            floats.append(int8_linear(x, packed, bias, **arguments))
    for isa, ours, wide in zip(_C.available_isas(), codes, floats, strict=True):
        assert_exact(ours, codes[0], isa)
        assert_exact(wide, floats[0], isa)


def test_an_int8_output_is_the_rounded_float_output(isa, generator):
    x, packed = torch.randn(13, 50, generator=generator), pack_int8_weight(torch.randn(70, 50, generator=generator))
    scale = torch.tensor(0.125)
    with lamina.force_isa(isa):
        for activation in ACTIVATIONS:
            y = int8_linear(x, packed, activation=activation)
            assert_exact(int8_linear(x, packed, activation=activation, out_scale=scale), requantize(y, scale))
    assert int8_linear(x, packed).abs().max() / 0.125 > 127, "nothing was clamped"


def test_the_next_layer_takes_codes_as_they_are(isa, generator):
    """Two layers without a float tensor between them: the same as quantizing it with that static scale."""
    x = torch.randn(13, 50, generator=generator)
    first, second = (pack_int8_weight(torch.randn(n, k, generator=generator)) for n, k in ((70, 50), (20, 70)))
    scale = torch.tensor(0.25)
    with lamina.force_isa(isa):
        codes = int8_linear(x, first, activation="relu", out_scale=scale)
        expected = int8_linear(int8_linear(x, first, activation="relu"), second, x_scale=scale)
        assert_exact(int8_linear(codes, second, x_scale=scale), expected)


@DTYPES
def test_a_bad_row_is_nan_with_a_static_scale_too(dtype, isa, generator):
    x = torch.randn(9, 37, generator=generator).to(dtype)
    x[4, 5], x[7, 36] = float("nan"), float("inf")
    packed = pack_int8_weight(torch.randn(70, 37, generator=generator))
    with lamina.force_isa(isa):
        y = int8_linear(x, packed, x_scale=torch.tensor(0.05))
    assert y[[4, 7]].isnan().all()
    assert y[[0, 1, 2, 3, 5, 6, 8]].isfinite().all()


def test_codes_of_minus_128_are_taken_as_they_are(isa):
    """Somebody else's quantizer may give them."""
    x = torch.full((5, 300), -128, dtype=torch.int8)
    packed = pack_int8_weight(torch.full((70, 300), -127, dtype=torch.int8), torch.ones(70))
    with lamina.force_isa(isa):
        y = int8_linear(x, packed, x_scale=torch.tensor(1.0))
    assert_exact(y, torch.full((5, 70), 128.0 * 127 * 300))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@DTYPES
def test_out_dtype_rounds_once(dtype, out_dtype, isa, generator):
    x, packed = torch.randn(13, 50, generator=generator).to(dtype), pack_int8_weight(torch.randn(70, 50))
    with lamina.force_isa(isa):
        wide = int8_linear(x.float(), packed, activation="gelu")
        assert_exact(int8_linear(x, packed, activation="gelu", out_dtype=out_dtype), wide.to(out_dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_with_residual_and_static_scale(activation, generator):
    """x, bias and residual see what is before the activation; rounding and clamping count as the identity."""
    x = torch.randn(2, 3, 20, generator=generator).requires_grad_()
    bias = torch.randn(33, generator=generator).requires_grad_()
    residual = torch.randn(2, 3, 33, generator=generator).bfloat16().requires_grad_()
    packed = pack_int8_weight(torch.randn(33, 20, generator=generator))
    scale, grad = torch.tensor(0.02), torch.randn(2, 3, 33, generator=generator)
    y = int8_linear(x, packed, bias, activation=activation, residual=residual, x_scale=scale)
    y.backward(grad)
    before = int8_linear(x.detach(), packed, bias.detach(), residual=residual.detach(), x_scale=scale).requires_grad_()
    plain = FUSED[activation](grad, before.detach())
    assert_exact(residual.grad, plain.bfloat16())
    assert_exact(bias.grad, plain.flatten(0, -2).sum(0))
    weight = dequantize_weight(unpack_int8_weight(packed, 20), packed.scale)
    assert_exact(x.grad, plain @ weight)


def test_an_int8_output_has_no_gradient(generator):
    x = torch.randn(3, 20, generator=generator).requires_grad_()
    y = int8_linear(x, pack_int8_weight(torch.randn(5, 20)), out_scale=torch.tensor(0.1))
    assert not y.requires_grad


def test_residual_and_output_may_be_slices(packed):
    x, whole = torch.randn(4, 5), torch.randn(4, 20)
    out = torch.full((4, 20), 7.0)
    _C.int8_linear(x, *packed, None, "none", whole[:, 2:8], None, None, out[:, 3:9])
    assert_exact(out[:, 3:9].contiguous(), int8_linear(x, packed, residual=whole[:, 2:8].clone()))
    out[:, 3:9] = 7.0
    assert (out == 7.0).all()


# -- what bad input gets there


@pytest.mark.parametrize("shape", [(2, 5), (3, 6), (6,), (1, 2, 6), (2, 1), ()])
def test_refuses_a_residual_of_another_shape(shape, packed):
    with pytest.raises(ValueError, match=r"int8_linear: residual has shape \[.*\], but must be \[2, 6\]") as error:
        int8_linear(torch.ones(2, 5), packed, residual=torch.ones(shape))
    one_sentence(error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8, torch.int32], ids=str)
def test_refuses_a_residual_of_another_dtype(dtype, packed):
    with pytest.raises(ValueError, match=r"int8_linear: residual is .*, but must be float32 or bfloat16") as error:
        int8_linear(torch.ones(2, 5), packed, residual=torch.ones(2, 6).to(dtype))
    one_sentence(error)


@pytest.mark.parametrize("name", ["x_scale", "out_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-37, float("inf"), float("nan")])
def test_refuses_scales_that_are_not_positive(name, value, packed):
    match = f"int8_linear: {name} is .*, but must be finite and at least 1e-36"
    with pytest.raises(ValueError, match=match) as error:
        int8_linear(torch.ones(2, 5), packed, **{name: torch.tensor(value)})
    one_sentence(error)
    with pytest.raises(ValueError, match=match if name == "x_scale" else "x is int8, but x_scale"):
        int8_linear(torch.ones(2, 5, dtype=torch.int8), packed, **{name: torch.tensor(value)})


@pytest.mark.parametrize("name", ["x_scale", "out_scale"])
def test_refuses_scales_of_another_dtype(name, packed):
    with pytest.raises(ValueError, match=f"int8_linear: {name} is float64, but must be float32"):
        int8_linear(torch.ones(2, 5), packed, **{name: torch.tensor(0.5, dtype=torch.float64)})


def test_refuses_scales_of_another_shape(packed):
    codes = torch.ones(2, 5, dtype=torch.int8)
    for shape in ((1,), (3,), (2, 1)):
        with pytest.raises(ValueError, match=r"int8_linear: x_scale has shape \[.*\], but must be \[\] or"):
            int8_linear(codes, packed, x_scale=torch.ones(shape))
    with pytest.raises(ValueError, match=r"int8_linear: x_scale has shape \[2\], but must be \[\]"):
        int8_linear(torch.ones(2, 5), packed, x_scale=torch.ones(2))
    with pytest.raises(ValueError, match=r"int8_linear: out_scale has shape \[2\], but must be \[\]"):
        int8_linear(torch.ones(2, 5), packed, out_scale=torch.ones(2))


def test_refuses_codes_without_their_scale(packed):
    with pytest.raises(
        ValueError, match="int8_linear: x is int8, but x_scale, which says what its codes mean"
    ) as error:
        int8_linear(torch.ones(2, 5, dtype=torch.int8), packed)
    one_sentence(error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8, torch.int32], ids=str)
def test_refuses_other_output_dtypes(dtype, packed):
    with pytest.raises(ValueError, match=r"int8_linear: out is .*, but must be float32 or bfloat16"):
        int8_linear(torch.ones(2, 5), packed, out_dtype=dtype)
    with pytest.raises(ValueError, match=r"int8_linear: out_dtype .* goes with a float output, but out_scale asks"):
        int8_linear(torch.ones(2, 5), packed, out_dtype=dtype, out_scale=torch.tensor(0.1))


def test_refuses_more_codes_than_int32_can_sum():
    most = (2**31 - 1) // (128 * 127)
    packed = pack_int8_weight(torch.zeros(1, most + 1, dtype=torch.int8), torch.ones(1))
    with pytest.raises(ValueError, match=f"int32 sums of int8 codes are exact only up to {most}"):
        int8_linear(torch.zeros(1, most + 1, dtype=torch.int8), packed, x_scale=torch.tensor(1.0))


# -- the compiled function, called directly


def direct(x, packed, out, bias=None, activation="none"):
    _C.int8_linear(x, *packed, bias, activation, None, None, None, out)


def test_numpy_arrays_come_in_through_plain_dlpack(generator):
    x, codes = torch.randn(7, 10, generator=generator), codes_of(20, 10, generator)
    scale, bias = torch.rand(20, generator=generator), torch.randn(20, generator=generator)
    data = np.empty(_C.int8_linear_packed_size(20, 10), np.int8)
    compensation = np.empty_like(pack_int8_weight(codes, scale).compensation.numpy())
    _C.int8_linear_pack(codes.numpy(), scale.numpy(), data, compensation)
    out = np.empty((7, 20), np.float32)
    _C.int8_linear(x.numpy(), data, scale.numpy(), compensation, bias.numpy(), "relu", None, None, None, out)
    expected = int8_linear(x, pack_int8_weight(codes, scale), bias, activation="relu")
    assert_exact(torch.from_numpy(out), expected)
    # Arrays may be strided too.
    wide = np.asfortranarray(x.numpy())
    _C.int8_linear(wide, data, scale.numpy(), compensation, bias.numpy(), "relu", None, None, None, out)
    assert_exact(torch.from_numpy(out), expected)


def test_output_may_be_a_slice(packed):
    """Rows any distance apart; what lies between them is not written."""
    x = torch.randn(4, 5)
    whole = torch.full((4, 20), 7.0)
    direct(x, packed, whole[:, 3:9])
    assert_exact(whole[:, 3:9].contiguous(), int8_linear(x, packed))
    whole[:, 3:9] = 7.0
    assert (whole == 7.0).all()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(2, 7), r"out has shape \[2, 7\], but must be \[2, 6\]"),
        (torch.empty(3, 6), r"out has shape \[3, 6\], but must be \[2, 6\]"),
        (torch.empty(12), r"out has shape \[12\]"),
        (torch.empty(2, 6, dtype=torch.float64), "out is float64, but must be float32 or bfloat16"),
        (torch.empty(2, 6, dtype=torch.int8), "out is int8, but must be float32 or bfloat16"),
        (torch.empty(6, 2).T, "the rows of out must be contiguous"),
    ],
)
def test_refuses_a_wrong_output(out, message, packed):
    before = out.clone()
    with pytest.raises(ValueError, match=f"int8_linear: {message}"):
        direct(torch.ones(2, 5), packed, out)
    assert_exact(out, before)


@pytest.mark.parametrize("thing", [[1.0], 3, "x", None, object()])
def test_refuses_what_is_no_tensor(thing, packed):
    with pytest.raises(TypeError) as error:
        direct(thing, packed, torch.empty(2, 6))
    assert re.search(r"expected a torch.Tensor, got|incompatible function arguments", str(error.value))


def test_refuses_tensors_without_memory(packed):
    """A FakeTensor comes through DLPack with a null pointer: following it would end the process."""
    mode = torch._subclasses.FakeTensorMode()
    fake = mode.from_tensor(torch.ones(2, 5))
    with pytest.raises(TypeError, match="fake or meta tensor"):
        direct(fake, packed, torch.empty(2, 6))
    with pytest.raises((TypeError, ValueError, BufferError, RuntimeError)):
        direct(torch.ones(2, 5, device="meta"), packed, torch.empty(2, 6))
    with pytest.raises((TypeError, ValueError, BufferError, RuntimeError)):
        direct(torch.ones(2, 5).to_sparse(), packed, torch.empty(2, 6))


def test_packing_a_meta_weight_is_refused_in_words():
    with pytest.raises((TypeError, ValueError), match="meta") as error:
        pack_int8_weight(torch.ones(4, 3, device="meta"))
    one_sentence(error)


def test_empty_fake_tensors_are_harmless(packed):
    mode = torch._subclasses.FakeTensorMode()
    direct(mode.from_tensor(torch.ones(0, 5)), packed, torch.empty(0, 6))
