"""quantize_rows: what holds beside "equal to the reference", and every way to call it wrongly."""

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_exact

import lamina
from lamina import _C
from lamina.ops import int8_linear, pack_int8_weight, quantize_rows
from lamina.reference.quantize_rows import quantize_rows as reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    lead=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    k=st.integers(0, 90),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "transposed", "misaligned", "sliced", "every_second", "columns_repeated"]),
    scale=st.sampled_from([None, 1e-3, 0.0625, 0.3, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_strides(lead, k, dtype, layout, scale, seed):
    if layout == "transposed" and not lead:
        layout = "every_second"
    inputs = cases._quantize_rows_case(*lead, k=k, dtype=dtype, layout=layout, scale=scale).inputs(seed)
    codes, scales = quantize_rows(*inputs)
    assert codes.is_contiguous()
    assert scales.is_contiguous()
    cases.quantize_rows_check((codes, scales), inputs)


@DTYPES
def test_codes_are_the_nearest(dtype, isa, generator):
    x = torch.randn(40, 77, generator=generator).to(dtype)
    with lamina.force_isa(isa):
        codes, scales = quantize_rows(x)
    assert codes.abs().amax(1).eq(127).all()
    error = (codes.double() * scales.double()[:, None] - x.double()).abs()
    # Half a step, and the roundings of the scale and of its inverse at codes up to 127.
    assert (error <= scales.double()[:, None] * (0.5 + 127 * 4 * torch.finfo(torch.float32).eps)).all()


@DTYPES
@pytest.mark.parametrize("scale", [None, 0.25])
def test_every_isa_gives_the_same_bits(dtype, scale, generator):
    """Ties, values that are clamped, infinities, rows of nothing: all that could round differently."""
    x = 20 * torch.randn(30, 97, generator=generator)
    x[:10] = (torch.randint(-127, 127, (10, 97), generator=generator) + 0.5) / 4  # ties
    x[:10, 0] = 127 / 4
    x[10], x[11, 5], x[12, 6], x[13, 7], x[14, 8] = 0.0, float("nan"), float("inf"), -float("inf"), 3e38
    x[15] *= 1e-38
    x = x.to(dtype)
    scale = None if scale is None else torch.tensor(scale)
    truth = reference(x, scale)
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            for ours, expected in zip(quantize_rows(x, scale), truth, strict=True):
                assert_exact(ours, expected, isa)


def test_rounding_is_half_to_even(isa):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    expected = [[127, 0, 2, 2, 4, 0, -2, -2, 126, -126]]
    with lamina.force_isa(isa):
        assert quantize_rows(x)[0].tolist() == expected
        assert quantize_rows(x / 4, torch.tensor(0.25))[0].tolist() == expected


def test_a_static_scale_clamps(isa):
    x = torch.tensor([[126.4, 127.4, 128.0, 1e4, 1e30, 3e38, -127.6, -128.0, -1e30]])
    with lamina.force_isa(isa):
        codes, scales = quantize_rows(x, torch.tensor(1.0))
    assert codes.tolist() == [[126, 127, 127, 127, 127, 127, -127, -127, -127]]
    assert scales.tolist() == [1.0]


@DTYPES
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_has_codes_of_zero_and_no_scale(bad, scale, dtype, isa, generator):
    x = torch.randn(9, 37, generator=generator).to(dtype)
    scale = None if scale is None else torch.tensor(scale)
    with lamina.force_isa(isa):
        clean_codes, clean_scales = quantize_rows(x, scale)
        for place in (0, 5, 36):
            spoiled = x.clone()
            spoiled[4, place] = bad
            codes, scales = quantize_rows(spoiled, scale)
            assert scales[4].isnan()
            assert not codes[4].any()
            clean_codes[4], clean_scales[4] = codes[4], scales[4]
            assert_exact(codes, clean_codes)
            assert_exact(scales, clean_scales)


def test_shared_codes_give_what_int8_linear_gives(isa, generator):
    """Quantizing once for several layers changes nothing."""
    x = torch.randn(2, 9, 50, generator=generator)
    with lamina.force_isa(isa):
        codes, scales = quantize_rows(x)
        for n in (1, 30, 70):
            packed = pack_int8_weight(torch.randn(n, 50, generator=generator))
            bias = torch.randn(n, generator=generator)
            assert_exact(int8_linear(codes, packed, bias, x_scale=scales), int8_linear(x, packed, bias))


# -- what bad input gets


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8, torch.int64, torch.bool], ids=str)
def test_refuses_other_dtypes(dtype):
    with pytest.raises(ValueError, match=r"quantize_rows: x is .*, but must be float32 or bfloat16"):
        quantize_rows(torch.ones(2, 5).to(dtype))


def test_refuses_a_scalar():
    with pytest.raises(ValueError, match="quantize_rows: x is a scalar, but must have at least one dimension"):
        quantize_rows(torch.tensor(1.0))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-37, float("inf"), float("nan")])
def test_refuses_a_scale_that_is_not_positive(scale):
    with pytest.raises(ValueError, match=r"quantize_rows: scale is .*, but must be finite and at least 1e-36"):
        quantize_rows(torch.ones(2, 5), torch.tensor(scale))


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(1), torch.ones(2, 1)])
def test_refuses_a_scale_per_row(scale):
    with pytest.raises(ValueError, match=r"quantize_rows: scale has shape \[.*\], but must be \[\]"):
        quantize_rows(torch.ones(2, 5), scale)


def test_refuses_a_scale_of_another_dtype():
    with pytest.raises(ValueError, match="quantize_rows: scale is float64, but must be float32"):
        quantize_rows(torch.ones(2, 5), torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (torch.empty(2, 6, dtype=torch.int8), torch.empty(2), r"codes has shape \[2, 6\], but must be \[2, 5\]"),
        (torch.empty(2, 5, dtype=torch.uint8), torch.empty(2), "codes is uint8, but must be int8"),
        (torch.empty(5, 2, dtype=torch.int8).T, torch.empty(2), "the rows of codes must be contiguous"),
        (torch.empty(2, 5, dtype=torch.int8), torch.empty(3), r"scales has shape \[3\], but must be \[2\]"),
        (torch.empty(2, 5, dtype=torch.int8), torch.empty(4)[::2], "scales must be contiguous"),
    ],
)
def test_refuses_a_wrong_output(codes, scales, message):
    with pytest.raises(ValueError, match=f"quantize_rows: {message}"):
        _C.quantize_rows(torch.ones(2, 5), None, codes, scales)
