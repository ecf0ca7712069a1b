"""Observers: the scale is the one the values ask for, however they are cut into chunks."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.quant import MinMaxObserver, MSEObserver, Observer, PercentileObserver
from lamina.quant.observers import make_observer

KINDS = {"minmax": MinMaxObserver, "percentile": PercentileObserver, "mse": MSEObserver}

DATA = {
    "normal": lambda g: torch.randn(20_000, generator=g),
    "outliers": lambda g: torch.cat((torch.randn(20_000, generator=g), torch.tensor([300.0, -500.0, 80.0]))),
    "relu": lambda g: torch.randn(20_000, generator=g).relu() * 1e-3,
    "laplace": lambda g: torch.rand(20_000, generator=g).log() * torch.randn(20_000, generator=g).sign(),
    "uniform": lambda g: torch.rand(20_000, generator=g) * 2e4 - 1e4,
    "coin": lambda g: (torch.rand(1000, generator=g) > 0.5).float() * 3,
}


def observed(kind: str, x: torch.Tensor, chunk: int | None = None, **arguments) -> Observer:
    observer = make_observer(kind, **arguments)
    for part in x.split(chunk or len(x)):
        observer.update(part)
    return observer


def squared_error(x: torch.Tensor, scale: float) -> float:
    x = x.double()
    return (torch.round(x / scale).clamp(-127, 127) * scale - x).square().sum().item()


@pytest.mark.parametrize("name", DATA)
def test_minmax_clips_nothing(name, generator):
    x = DATA[name](generator)
    assert observed("minmax", x).scale() == x.abs().max().item() / 127


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("name", DATA)
def test_percentile_is_the_percentile(name, percentile, generator):
    x = DATA[name](generator)
    if name in ("relu", "coin") and percentile == 50.0:
        percentile = 60.0  # half of them are zeros, and zeros have no range
    clip = observed("percentile", x, percentile=percentile).scale() * 127
    # One bin is 2^-8 wide, and a rank between two values may be settled for either.
    ordered = x.abs().double().sort().values
    rank = percentile / 100 * len(x)
    low, high = ordered[max(math.floor(rank) - 2, 0)], ordered[min(math.ceil(rank) + 1, len(x) - 1)]
    assert low * (1 - 2**-8) <= clip <= high * (1 + 2**-8)


def test_percentile_of_mostly_zeros_has_no_range():
    observer = observed("percentile", torch.tensor([0.0] * 99 + [1.0]), percentile=90.0)
    with pytest.raises(ValueError, match="only zeros were observed"):
        observer.scale()


@pytest.mark.parametrize("name", DATA)
def test_mse_is_the_least_squared_error(name, generator):
    x = DATA[name](generator)
    largest = x.abs().max().item()
    least = min(squared_error(x, largest * 1.02**-step / 127) for step in range(120))
    error = squared_error(x, observed("mse", x).scale())
    # Two points stand for all values of a bin; where no value is lost, by the rounding of the sums.
    assert error <= 1.02 * least + 1e-12 * x.double().square().sum().item()


def test_mse_clips_outliers_and_minmax_does_not(generator):
    # So many small values that a few large ones are not worth the coarse steps.
    x = torch.cat((torch.randn(1_000_000, generator=generator), torch.full((2,), 60.0)))
    assert observed("mse", x).scale() < observed("minmax", x).scale() / 2


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 60), max_size=5),
)
def test_chunks_do_not_matter(kind, values, cuts):
    x = torch.tensor(values, dtype=torch.float32)
    whole, parts = make_observer(kind), make_observer(kind)
    whole.update(x)
    bounds = sorted({0, len(x), *(min(c, len(x)) for c in cuts)})
    for low, high in reversed(list(itertools.pairwise(bounds))):
        parts.update(x[low:high])
    try:
        expected = whole.scale()
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)):
            parts.scale()
        return
    assert parts.scale() == pytest.approx(expected, rel=2**-6 if kind == "mse" else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_range_may_grow_by_many_orders(kind, generator):
    """Small values first, then large ones: the histogram moves up, and memory does not grow."""
    x = torch.randn(1000, generator=generator)
    growing, sorted_down = make_observer(kind), make_observer(kind)
    parts = [x * 10.0**power for power in range(-20, 21, 4)]
    for part in parts:
        growing.update(part)
    for part in reversed(parts):
        sorted_down.update(part)
    assert growing.scale() == pytest.approx(sorted_down.scale(), rel=1e-9)
    kept = [value for value in vars(growing).values() if isinstance(value, torch.Tensor)]
    assert sum(t.nbytes for t in kept) < 200_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_dtypes_and_strides(kind, dtype, generator):
    x = torch.randn(64, 96, generator=generator).to(dtype)
    observer = make_observer(kind)
    observer.update(x.t()[::2, 1::3])
    expected = observed(kind, x.t()[::2, 1::3].float().flatten())
    assert observer.scale() == pytest.approx(expected.scale(), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", ["first", "last"])
def test_refuses_nan_and_infinity(kind, bad, when):
    parts = [torch.ones(5), torch.tensor([1.0, bad, 2.0])]
    observer = make_observer(kind)
    for part in parts if when == "last" else reversed(parts):
        observer.update(part)
    with pytest.raises(ValueError, match="NaN or infinity was observed, so there is no range"):
        observer.scale()


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_no_data_and_zeros(kind):
    observer = make_observer(kind)
    with pytest.raises(ValueError, match="no values were observed"):
        observer.scale()
    observer.update(torch.empty(0, 8))
    with pytest.raises(ValueError, match="no values were observed"):
        observer.scale()
    observer.update(torch.zeros(3, 8))
    with pytest.raises(ValueError, match="only zeros were observed"):
        observer.scale()
    observer.update(torch.full((2,), 1e-38))
    with pytest.raises(ValueError, match="only zeros were observed"):
        observer.scale()


def test_unknown_observers_and_percentiles():
    with pytest.raises(ValueError, match="observer 'max' is unknown; use one of minmax, percentile, mse"):
        make_observer("max")
    for percentile in (0.0, -1.0, 100.5, math.nan):
        with pytest.raises(ValueError, match="must be above 0 and at most 100"):
            PercentileObserver(percentile)
