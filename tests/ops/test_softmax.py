"""softmax: rows that are hard on the arithmetic, dimensions of all kinds, gradients, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_composite, assert_exact

from lamina import _C
from lamina.ops import softmax
from lamina.reference.softmax import softmax as reference


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


# -- rows that are hard on the arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_softmax_of_infinities_and_nan_is_torchs(isa, dim, dtype):
    x = torch.randn(9, 35)
    x[0], x[1, 3], x[2, 34], x[3, 5], x[4, 0] = -math.inf, -math.inf, math.inf, math.nan, -math.inf
    x[5, 1:] = -math.inf
    x[6, 20], x[6, 21] = math.nan, math.inf
    x = (x if dim == 1 else x.T.contiguous()).to(dtype)
    out, expected = softmax(x, dim), torch.softmax(x, dim)
    assert_exact(out.isnan(), expected.isnan())
    assert_exact(out == 0, expected == 0)
    assert_composite(out, expected, reference(x.double(), dim))


@pytest.mark.parametrize("value", [0.0, -3.3, 1e30, -3e38])
def test_softmax_of_a_constant_row_is_even(isa, value):
    out = softmax(torch.full((3, 67), value))
    assert_exact(out, torch.full((3, 67), 1 / 67))


def test_softmax_of_distant_elements_keeps_their_digits(isa):
    """Small probabilities are as good as large ones: the distance from the largest is not rounded before the power."""
    x = -torch.linspace(0, 80, 161)
    truth = reference(x.double())
    error = (softmax(x).double() / truth - 1).abs()
    assert error.max() < 4e-7


def test_softmax_sums_to_one(isa):
    x = 5 * torch.randn(11, 30000)
    assert (softmax(x).double().sum(-1) - 1).abs().max() < 2e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    dim=st.integers(-4, 3),
    scale=st.sampled_from([1e-3, 1.0, 40.0]),
    swap=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_softmax_along_any_dimension(shape, dim, scale, swap, seed):
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x.transpose(0, -1) if swap else x
    dim = dim % x.ndim
    assert_composite(softmax(x, dim), torch.softmax(x, dim), reference(x.double(), dim))


def test_softmax_in_place():
    """The compiled function may write its output over its input."""
    for dim in (0, 1):
        x = torch.randn(40, 33)
        expected = softmax(x, dim)
        _C.softmax(x, dim, x)
        assert_exact(x, expected)


def test_softmax_writes_any_strides():
    x = torch.randn(7, 20)
    for dim in (0, 1):
        for out in (torch.empty(20, 7).T, torch.full((7, 40), 5.0)[:, ::2], torch.full((9, 30), 5.0)[1:8, 4:24]):
            _C.softmax(x, dim, out)
            assert_exact(out.contiguous(), softmax(x, dim))


# -- the op in PyTorch's machinery


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_softmax_has_torchs_gradient(dtype):
    def gradient(function):
        x = torch.linspace(-2, 2, 60).reshape(3, 20).requires_grad_()
        weight = torch.arange(60.0).reshape(3, 20)
        (function(x, 1, dtype=dtype) * weight).sum().backward()
        return x.grad

    actual, expected = gradient(softmax), gradient(torch.softmax)
    assert actual.dtype == torch.float32
    assert_composite(
        actual,
        expected,
        gradient(lambda x, dim, dtype: reference(x.double(), dim)).double(),
        floor=0.2 if dtype is torch.bfloat16 else None,
    )


def test_softmax_leaves_the_rest_to_torch():
    x = torch.randn(4, 6)
    for dtype in (torch.float64, torch.float16):
        assert_exact(softmax(x.to(dtype)), torch.softmax(x.to(dtype), -1))
    assert_exact(softmax(x, dtype=torch.float64), torch.softmax(x, -1, dtype=torch.float64))
    assert softmax(x.to("meta")).shape == (4, 6)


def test_softmax_compiles():
    x = torch.randn(2, 9, 12)
    compiled = torch.compile(lambda x: softmax(x, 1) + 1, fullgraph=True, backend="aot_eager")
    assert_exact(compiled(x), softmax(x, 1) + 1)


# -- bad input


def test_softmax_refuses_in_one_sentence():
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"softmax: dim is 2, but must be in \[-2, 1\] for float32\[4, 6\]"):
        softmax(x, 2)
    with pytest.raises(ValueError, match="softmax: x is int32, but must be float32 or bfloat16"):
        torch.ops.lamina.softmax(x.int(), 0)
    with pytest.raises(ValueError, match="softmax: out is float64, but must be float32 or bfloat16"):
        torch.ops.lamina.softmax(x, 0, torch.float64)
    with pytest.raises(ValueError, match=r"softmax: out is float32\[4, 5\], but must have the shape of x"):
        _C.softmax(x, 0, torch.empty(4, 5))
