"""reduce: sums that are hard on the arithmetic, order, NaN, every set of dimensions, bad input."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_composite, assert_exact

from lamina import _C
from lamina.ops import reduce
from lamina.reference.reduce import REDUCTIONS
from lamina.reference.reduce import reduce as reference

KINDS = list(REDUCTIONS)


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


@pytest.mark.parametrize("how", KINDS)
def test_reduce_over_every_set_of_dimensions(isa, how):
    x = 1 + torch.rand(3, 4, 5, 6)
    for count in range(5):
        for dims in itertools.combinations(range(4), count):
            for keepdim in (False, True):
                actual = reduce(x, dims, how, keepdim)
                assert_composite(actual, REDUCTIONS[how](x, dims, keepdim), reference(x.double(), dims, keepdim, how))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reduce_keeps_nan_and_infinity(isa, dim, how, dtype):
    x = torch.randn(6, 41)
    x[0, 3], x[1, 40], x[2, 7], x[3, 8], x[3, 20] = math.nan, math.inf, -math.inf, math.inf, -math.inf
    x[4, 39], x[4, 40], x[5, 0], x[5, 1] = math.inf, math.nan, math.nan, -math.inf
    x = (x if dim == 1 else x.T.contiguous()).to(dtype)
    expected = REDUCTIONS[how](x, dim)
    actual = reduce(x, dim, how)
    assert_exact(actual.isnan(), expected.isnan())
    assert_composite(actual, expected, reference(x.double(), [dim], how=how))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_reduce_of_infinities_is_infinite(isa, sign):
    """The error that a sum keeps must not turn an infinity into NaN, in any piece of a row."""
    x = torch.ones(2, 5000)
    x[:, ::700] = sign * math.inf
    for how in ("sum", "mean"):
        assert_exact(reduce(x, 1, how), torch.full((2,), sign * math.inf))
        assert_exact(reduce(x.T.contiguous(), 0, how), torch.full((2,), sign * math.inf))
    assert_exact(reduce(torch.full((3, 9), -math.inf), 1, "max"), torch.full((3,), -math.inf))
    assert_exact(reduce(torch.full((3, 9), math.inf), 1, "min"), torch.full((3,), math.inf))


@pytest.mark.parametrize("how", ["max", "min"])
def test_reduce_gives_positive_zero(isa, how):
    x = torch.zeros(4, 37)
    x[1], x[2, ::2], x[3, 1::2] = -0.0, -0.0, -0.0
    for layout in (x, x.T.contiguous().T):
        assert not reduce(layout, 1, how).signbit().any()


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 12345])
def test_reduce_of_a_million_is_as_good_as_of_hundreds(isa, size):
    x = torch.rand(size)
    truth = x.double().sum()
    assert (reduce(x, 0, "sum").double() - truth).abs() < 1e-7 * truth


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 18), min_size=1, max_size=4),
    chosen=st.lists(st.integers(0, 3), max_size=4),
    order=st.permutations(range(4)),
    how=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_reduce_of_any_layout_is_the_same_bits(shape, chosen, order, how, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    dims = sorted({dim % x.ndim for dim in chosen})
    order = [dim for dim in order if dim < x.ndim]
    lying = x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.ndim)])
    assert_exact(reduce(lying, dims, how), reduce(x, dims, how))


def test_reduce_writes_any_strides():
    x = torch.randn(3, 7, 20)
    for dim, shape in ((1, (3, 20)), (2, (3, 7)), (0, (7, 20))):
        for out in (torch.empty(shape[::-1]).T, torch.full((shape[0], 2 * shape[1]), 5.0)[:, ::2]):
            _C.reduce(x, [dim], False, "mean", out)
            assert_exact(out.contiguous(), reduce(x, dim))


def test_reduce_of_one_more_dimension_than_nothing():
    x = torch.tensor(3.0)
    assert_exact(reduce(x), x)
    assert_exact(reduce(x, -1, "max"), x)
    assert reduce(torch.ones(3, 0)).isnan()
    assert_exact(reduce(torch.ones(2, 0), 1, "sum"), torch.zeros(2))


def test_reduce_leaves_the_rest_to_torch():
    x = torch.randn(4, 6)
    for how in KINDS:
        for dtype in (torch.float64, torch.float16):
            assert_exact(reduce(x.to(dtype), 1, how), REDUCTIONS[how](x.to(dtype), [1]))
        leaf = x.clone().requires_grad_()
        reduce(leaf, (0, 1), how, True).backward()
        assert leaf.grad.abs().sum() > 0
    assert reduce(x.to("meta"), 1).shape == (4,)


def test_reduce_compiles():
    x = torch.randn(2, 9, 12)
    compiled = torch.compile(lambda x: reduce(x, 1, "max", True) + 1, fullgraph=True, backend="aot_eager")
    assert_exact(compiled(x), reduce(x, 1, "max", True) + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2,), r"reduce: dim is 2, but must be in \[-2, 1\] for float32\[4, 6\]"),
        (((0, -2),), r"reduce: dim 0 of float32\[4, 6\] is given twice"),
        ((0, "median"), "reduce: how 'median' is unknown; use sum, mean, max or min"),
    ],
)
def test_reduce_refuses_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        reduce(torch.randn(4, 6), *arguments)


def test_reduce_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match=r"reduce: there is no max of nothing, but x is float32\[2, 0\]"):
        reduce(torch.ones(2, 0), 1, "max")
    with pytest.raises(ValueError, match="reduce: x is int64, but must be float32 or bfloat16"):
        torch.ops.lamina.reduce(torch.ones(2, dtype=torch.int64), [0], False, "sum")
    with pytest.raises(ValueError, match=r"reduce: out is float32\[3\], but must be float32\[2\]"):
        _C.reduce(torch.ones(2, 3), [1], False, "sum", torch.empty(3))
    with pytest.raises(ValueError, match="reduce: how 'all' is unknown"):
        reduce(torch.ones(2).double(), 0, "all")
