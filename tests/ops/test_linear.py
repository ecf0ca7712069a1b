"""linear: what holds beside "close to the reference", and every way to call it wrongly."""

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_exact, assert_lossy
from torch.nn import functional as F

import lamina
from lamina import _C
from lamina.ops import PackedLinearWeight, linear, pack_linear_weight, unpack_linear_weight
from lamina.ops.int8_linear import ACTIVATIONS
from lamina.reference.int8_linear import ACTIVATIONS as PLAIN

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


# -- packing


@settings(deadline=None, derandomize=True, max_examples=60)
@given(n=st.integers(0, 140), k=st.integers(0, 80), seed=st.integers(0, 2**31))
def test_pack_and_unpack_are_inverse(n, k, seed):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    packed = pack_linear_weight(weight)
    assert packed.out_features == n
    assert_exact(unpack_linear_weight(packed), weight)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 4), (17, 5), (64, 8), (65, 7), (150, 30), (128, 64)])
def test_packed_layout(n, k, isa, generator):
    """Panels of 64 channels, [k][channels], the same bits whatever packed them."""
    weight = torch.randn(n, k, generator=generator)
    with lamina.force_isa(isa):
        packed = pack_linear_weight(weight)
    padded = F.pad(weight, (0, 0, 0, -n % 16))
    assert packed.data.shape == padded.shape
    assert_exact(packed.data.flatten(), torch.cat([panel.T.flatten() for panel in padded.split(64)]))


def test_packing_takes_any_strides(generator):
    weight = torch.randn(70, 33, generator=generator)
    plain = pack_linear_weight(weight).data
    for layout in ("transposed", "misaligned", "sliced", "every_second"):
        assert_exact(pack_linear_weight(cases.LAYOUTS[layout](weight)).data, plain, layout)
    torch.set_num_threads(1)
    assert_exact(pack_linear_weight(weight).data, plain, "one thread")


def test_packed_weight_owns_its_memory(generator):
    weight = torch.nn.Parameter(torch.randn(16, 7, generator=generator))
    packed, x = pack_linear_weight(weight), torch.randn(3, 7, generator=generator)
    before = linear(x, packed)
    with torch.no_grad():
        weight.zero_()
    assert_exact(linear(x, packed), before)


# -- arithmetic


@DTYPES
@pytest.mark.parametrize("m", [1, 70])
def test_equals_the_plain_layer(m, dtype, isa, generator):
    x, weight = torch.randn(m, 300, generator=generator).to(dtype), torch.randn(90, 300, generator=generator)
    bias, residual = torch.randn(90, generator=generator), torch.randn(m, 90, generator=generator)
    with lamina.force_isa(isa):
        y = linear(x, pack_linear_weight(weight), bias, activation="relu", residual=residual)
    truth = F.relu(F.linear(x.double(), weight.double(), bias.double()) + residual.double())
    assert_lossy(y, truth, min_sqnr_db=125 if dtype is torch.float32 else 50)


@DTYPES
def test_an_identity_gives_the_input_back(dtype, isa, generator):
    x = torch.randn(9, 100, generator=generator).to(dtype)
    with lamina.force_isa(isa):
        assert_exact(linear(x, pack_linear_weight(torch.eye(100))), x)


@DTYPES
@pytest.mark.parametrize("k", [1, 64, 333])
def test_rows_do_not_depend_on_each_other(k, dtype, isa, generator):
    """Any number of rows gives each row the same bits: the result must not depend on who shares the batch."""
    x = torch.randn(70, k, generator=generator).to(dtype)
    packed, bias = pack_linear_weight(torch.randn(203, k, generator=generator)), torch.randn(203, generator=generator)
    with lamina.force_isa(isa):
        whole = linear(x, packed, bias, activation="silu")
        for m in (*range(1, 18), 63, 64, 65):
            assert_exact(linear(x[:m], packed, bias, activation="silu"), whole[:m], f"{m} rows")
        assert_exact(linear(x[57:58], packed, bias, activation="silu"), whole[57:58], "one row")


def test_channels_do_not_depend_on_each_other(isa, generator):
    weight, bias = torch.randn(195, 50, generator=generator), torch.randn(195, generator=generator)
    for m in (1, 7):
        x = torch.randn(m, 50, generator=generator)
        with lamina.force_isa(isa):
            whole = linear(x, pack_linear_weight(weight), bias)
            for n in (1, 15, 16, 17, 48, 64, 65, 128, 130):
                assert_exact(linear(x, pack_linear_weight(weight[:n]), bias[:n]), whole[:, :n], f"{n} channels")


def test_bfloat16_is_float32_rounded_once(isa, generator):
    x = torch.randn(13, 70, generator=generator).bfloat16()
    packed, bias = pack_linear_weight(torch.randn(37, 70, generator=generator)), torch.randn(37, generator=generator)
    residual = torch.randn(13, 37, generator=generator).bfloat16()
    with lamina.force_isa(isa):
        for activation in ACTIVATIONS:
            wide = linear(x.float(), packed, bias, activation=activation, residual=residual.float())
            assert_exact(linear(x, packed, bias, activation=activation, residual=residual), wide.bfloat16(), activation)


def test_copied_rows_in_parts_give_the_same_bits(generator):
    """More strided rows than are copied at once."""
    k = 512
    rows = (8 << 20) // (4 * k) + 9
    x, packed = torch.randn(rows, k, generator=generator), pack_linear_weight(torch.randn(17, k, generator=generator))
    residual = torch.randn(rows, 17, generator=generator)
    whole = linear(x, packed, residual=residual)
    assert_exact(linear(x.T.contiguous().T, packed, residual=residual), whole)


@DTYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_stays_alone(bad, dtype, isa, generator):
    packed = pack_linear_weight(torch.randn(70, 37, generator=generator))
    for m in (3, 9):
        x = torch.randn(m, 37, generator=generator).to(dtype)
        with lamina.force_isa(isa):
            clean = linear(x, packed)
            for place in (0, 5, 36):
                spoiled = x.clone()
                spoiled[1, place] = bad
                y = linear(spoiled, packed)
                assert not y[1].isfinite().any()
                assert_exact(y[[0, *range(2, m)]], clean[[0, *range(2, m)]])


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    lead=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    k=st.integers(0, 40),
    n=st.integers(0, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "misaligned", "sliced", "every_second", "columns_repeated"]),
    bias=st.sampled_from([None, torch.float32, torch.bfloat16]),
    residual=st.sampled_from([None, torch.float32, torch.bfloat16]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_strides(lead, k, n, dtype, layout, bias, residual, activation, seed):
    if layout == "columns_repeated" and 0 in (k, n):
        layout = "contiguous"
    options = {"dtype": dtype, "layout": layout, "bias": bias, "residual": residual, "activation": activation}
    inputs = cases._linear_case(*lead, k=k, n=n, **options).inputs(seed)
    y = torch.ops.lamina.linear(*inputs)
    assert y.shape == (*lead, n)
    assert y.is_contiguous()
    if y.numel() and k:
        cases.linear_check(y, inputs)


# -- gradients


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradient_is_that_of_the_plain_layer(activation, generator):
    x = torch.randn(5, 3, 40, generator=generator, requires_grad=True)
    bias = torch.randn(21, generator=generator, requires_grad=True)
    residual = torch.randn(5, 3, 21, generator=generator, requires_grad=True)
    weight, out = torch.randn(21, 40, generator=generator), torch.randn(5, 3, 21, generator=generator)
    linear(x, pack_linear_weight(weight), bias, activation=activation, residual=residual).backward(out)
    ours = x.grad, bias.grad, residual.grad
    doubles = [t.detach().double().requires_grad_() for t in (x, bias, residual)]
    PLAIN[activation](F.linear(doubles[0], weight.double(), doubles[1]) + doubles[2]).backward(out.double())
    for mine, double in zip(ours, doubles, strict=True):
        assert_lossy(mine, double.grad, min_sqnr_db=100)


def test_gradient_only_where_asked(generator):
    x, packed = torch.randn(3, 40, generator=generator), pack_linear_weight(torch.randn(21, 40, generator=generator))
    bias = torch.zeros(21, dtype=torch.bfloat16, requires_grad=True)
    linear(x, packed, bias).sum().backward()
    assert_exact(bias.grad, torch.full((21,), 3.0, dtype=torch.bfloat16))
    assert not linear(x, packed).requires_grad


# -- refusals


def one_sentence(error) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert ": " in text


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4), r"weight has shape \[4\], but must be \[N, K\]"),
        (torch.ones(4, 3, dtype=torch.bfloat16), "weight is bfloat16, but must be float32"),
        (torch.ones(4, 3, dtype=torch.float64), "weight is float64, but must be float32"),
        (torch.ones(4, 3, device="meta"), "weight is on meta, but lamina's linear layers run on the CPU"),
    ],
)
def test_refuses_to_pack(weight, message):
    with pytest.raises(ValueError, match=message) as error:
        pack_linear_weight(weight)
    one_sentence(error)


@pytest.mark.parametrize("k", [0, 1, 39, 41, 64])
def test_refuses_other_numbers_of_features(k):
    packed = pack_linear_weight(torch.ones(20, 40))
    with pytest.raises(ValueError, match=f"linear: x has {k} features, but packed_weight was packed for 40") as error:
        linear(torch.ones(2, k), packed)
    one_sentence(error)


@pytest.mark.parametrize(
    ("x", "bias", "activation", "residual", "message"),
    [
        (torch.ones(2, 40, dtype=torch.float64), None, None, None, "x is float64, but must be float32 or bfloat16"),
        (torch.ones(2, 40, dtype=torch.int8), None, None, None, "x is int8, but must be"),
        (torch.tensor(1.0), None, None, None, "x is a scalar"),
        (torch.ones(2, 40), torch.ones(19), None, None, r"bias has shape \[19\], but must be \[20\]"),
        (torch.ones(2, 40), torch.ones(20, dtype=torch.float64), None, None, "bias is float64, but must be"),
        (torch.ones(2, 40), None, "softsign", None, "activation 'softsign' is unknown; use none, relu, relu6, gelu"),
        (
            torch.ones(2, 40),
            None,
            None,
            torch.ones(20),
            r"residual has shape \[20\], but must be \[2, 20\] like the output",
        ),
        (torch.ones(2, 40), None, None, torch.ones(2, 20, dtype=torch.int8), "residual is int8, but must be"),
    ],
)
def test_refuses_wrong_input(x, bias, activation, residual, message):
    with pytest.raises(ValueError, match=f"^linear: {message}") as error:
        linear(x, pack_linear_weight(torch.ones(20, 40)), bias, activation=activation, residual=residual)
    one_sentence(error)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ((torch.ones(32, 40), 33), r"packed_weight.data has shape \[32, 40\], but must be \[48, 40\]"),
        ((torch.ones(48, 40), 20), r"packed_weight.data has shape \[48, 40\], but must be \[32, 40\]"),
        ((torch.ones(32 * 40), 20), r"packed_weight.data has shape \[1280\], but must be \[32, 40\]"),
        ((torch.ones(32, 40).bfloat16(), 20), r"packed_weight.data is bfloat16, but must be float32"),
        ((torch.ones(40, 32).T, 20), r"packed_weight.data must be contiguous"),
    ],
)
def test_refuses_foreign_packed_weights(packed, message):
    with pytest.raises(ValueError, match=f"linear: {message}") as error:
        linear(torch.ones(2, 40), PackedLinearWeight(*packed))
    one_sentence(error)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(3, 20), r"out has shape \[3, 20\], but must be \[2, \*\]"),
        (torch.empty(2, 20, dtype=torch.bfloat16), "out is bfloat16, but must be float32"),
        (torch.empty(20, 2).T, "the rows of out must be contiguous"),
    ],
)
def test_refuses_a_wrong_output(out, message):
    with pytest.raises(ValueError, match=f"linear: {message}"):
        _C.linear(torch.ones(2, 40), torch.ones(32, 40), None, "none", None, out)
