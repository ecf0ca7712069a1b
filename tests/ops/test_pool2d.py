"""pool2d: torch's windows in both layouts, NaN, one dimension, and what bad input gets."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_exact, assert_sum

import lamina
from lamina import _C
from lamina.ops import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    avg_pool1d,
    avg_pool2d,
    max_pool1d,
    max_pool2d,
    pool2d,
)


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_windows_are_torchs(data):
    """Any kernel, stride, padding and mode, in both layouts, on every ISA."""
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    sizes = [draw(st.integers(3, 12)), draw(st.integers(3, 40))]
    x = torch.randn(2, draw(st.integers(1, 70)), *sizes, generator=generator)
    kernel, stride = (tuple(draw(st.integers(1, 3)) for _ in range(2)) for _ in range(2))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    ceil, include = draw(st.booleans()), draw(st.booleans())
    most = F.max_pool2d(x, kernel, stride, padding, 1, ceil)
    arguments = kernel, stride, padding, ceil, include
    truth, magnitude = F.avg_pool2d(x.double(), *arguments), F.avg_pool2d(x.double().abs(), *arguments)
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            for image in (x, last(x)):
                assert_exact(max_pool2d(image, kernel, stride, padding, ceil_mode=ceil), most, isa)
                mean = avg_pool2d(image, *arguments)
                assert_sum(mean, truth, terms=math.prod(kernel) + 1, magnitude=magnitude, what=isa)
            assert_exact(mean, avg_pool2d(x, *arguments), isa)


def test_adaptive_windows_are_torchs(generator):
    x = torch.randn(2, 33, 7, 10, generator=generator)
    for size in (1, (2, 3), (7, 10), (9, 4)):
        truth, magnitude = (F.adaptive_avg_pool2d(t.double(), size) for t in (x, x.abs()))
        for image in (x, last(x)):
            assert_sum(adaptive_avg_pool2d(image, size), truth, terms=71, magnitude=magnitude)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_windows(isa, kind, value, generator):
    x = torch.randn(2, 37, 9, 21, generator=generator)
    x[1, 5, 4, 10] = value
    expected = F.max_pool2d(x, 3, 2, 1) if kind == "max" else F.avg_pool2d(x, 3, 2, 1)
    with lamina.force_isa(isa):
        for image in (x, last(x), last(x)[:, :36], x.mT.contiguous().mT):
            actual = pool2d(image, kind, 3, 2, 1)
            wanted = expected[:, : image.shape[1]]
            assert_exact(actual.isfinite(), wanted.isfinite())
            assert_exact(actual.isnan(), wanted.isnan())


def test_windows_of_padding_only_hold_minus_infinity():
    """As torch has it: taps far apart may all miss a small image."""
    x = torch.ones(1, 1, 1, 1)
    assert_exact(max_pool2d(x, 2, 1, 1, 2), F.max_pool2d(x, 2, 1, 1, 2))


def test_one_dimension_is_torchs(generator):
    x = torch.randn(2, 5, 40, generator=generator)
    for t in (x, x[0], x.mT.contiguous().mT):
        assert_exact(max_pool1d(t, 3, 2, 1), F.max_pool1d(t, 3, 2, 1))
        assert_sum(avg_pool1d(t, 4, 2, 1), F.avg_pool1d(t.double(), 4, 2, 1), terms=5, magnitude=5.0)
        assert_sum(adaptive_avg_pool1d(t, 7), F.adaptive_avg_pool1d(t.double(), 7), terms=8, magnitude=5.0)


def test_result_has_the_layout_of_x(generator):
    x = torch.randn(2, 5, 8, 8, generator=generator)
    assert max_pool2d(x, 2).is_contiguous()
    assert max_pool2d(last(x), 2).is_contiguous(memory_format=torch.channels_last)
    assert max_pool2d(x[0], 2).shape == (5, 4, 4)


def test_compiled_function_crosses_layouts(generator):
    x = torch.randn(2, 37, 9, 21, generator=generator)
    expected = F.max_pool2d(x, 3, 2, 1)
    for image in (x, last(x)):
        for out in (torch.empty_like(expected), last(torch.empty_like(expected))):
            _C.pool2d(image, "max", [3, 3], [2, 2], [1, 1], [1, 1], True, 0, out)
            assert_exact(out, expected)


def test_gradients_and_other_dtypes_are_torchs(generator):
    x = torch.randn(1, 2, 4, 4, generator=generator, requires_grad=True)
    avg_pool2d(x, 2).sum().backward()
    assert_exact(x.grad, torch.full_like(x, 0.25))
    y = x.detach().double()
    assert_exact(max_pool2d(y, 2), F.max_pool2d(y, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "lp"}, "kind 'lp' is unknown; use max, avg or adaptive_avg"),
        ({"x": torch.ones(4, 4)}, r"x has shape \[4, 4\], but must be"),
        ({"kernel_size": 0}, r"kernel is \[0, 0\], but must be positive"),
        ({"kernel_size": 5}, "the padded input has 4 pixels, but the kernel covers 5"),
        ({"stride": -1}, r"stride is \[-1, -1\], but must be positive"),
        ({"padding": 2}, "padding is 2, but must be at most half of the kernel, 3"),
        ({"kernel_size": 2, "dilation": 2}, "dilation is 2, but goes with the largest values only"),
        ({"divisor_override": 0}, "divisor_override is 0, but must not be"),
        ({"kind": "adaptive_avg", "kernel_size": -1}, r"the output's size is \[-1, -1\], but must not be negative"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_refuses_in_one_sentence(arguments, message):
    given = {"x": torch.ones(1, 2, 4, 4), "kind": "avg", "kernel_size": 3, **arguments}
    with pytest.raises(ValueError, match=f"pool2d: {message}") as error:
        pool2d(**given)
    assert "\n" not in str(error.value)


def test_compiled_function_refuses_more_windows_than_there_is_room_for():
    with pytest.raises(
        ValueError, match="pool2d: out has 9 windows in dimension 2, but the last one would begin behind"
    ):
        _C.pool2d(torch.ones(1, 1, 8, 8), "max", [1, 1], [1, 1], [0, 0], [1, 1], True, 0, torch.empty(1, 1, 9, 8))
