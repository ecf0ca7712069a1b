"""int8_pool2d: torch's windows, exact codes, and what bad input gets."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_exact

import lamina
from lamina import _C
from lamina.ops import int8_adaptive_avg_pool2d, int8_avg_pool2d, int8_max_pool2d, int8_pool2d


def codes_of(*shape: int, generator: torch.Generator) -> torch.Tensor:
    codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    return codes.contiguous(memory_format=torch.channels_last)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_windows_are_torchs(data):
    """Any kernel, stride, padding and mode: the same codes as torch's pooling of the same values, on every ISA."""
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = codes_of(2, draw(st.integers(1, 70)), *(draw(st.integers(3, 12)) for _ in range(2)), generator=generator)
    kernel, stride = (tuple(draw(st.integers(1, 3)) for _ in range(2)) for _ in range(2))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    ceil, include = draw(st.booleans()), draw(st.booleans())
    most = F.max_pool2d(x.double(), kernel, stride, padding, 1, ceil).to(torch.int8)
    mean = F.avg_pool2d(x.double(), kernel, stride, padding, ceil, include)
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            assert_exact(int8_max_pool2d(x, kernel, stride, padding, ceil_mode=ceil), most)
            codes = int8_avg_pool2d(x, kernel, stride, padding, ceil, include)
        # A mean in the middle of two codes may be either's after its factor was rounded.
        assert ((codes - mean).abs() <= 0.5 + 1e-4).all()


def test_adaptive_windows_are_torchs(generator):
    x = codes_of(2, 33, 7, 10, generator=generator)
    for size in (1, (2, 3), (7, 10), (9, 4)):
        mean = F.adaptive_avg_pool2d(x.double(), size)
        assert ((int8_adaptive_avg_pool2d(x, size) - mean).abs() <= 0.5 + 1e-4).all()
        values = int8_adaptive_avg_pool2d(x, size, x_scale=torch.tensor(0.5))
        assert_exact(values.contiguous(), (mean * 0.5).float().contiguous()) if size == (7, 10) else None
        assert (values - mean * 0.5).abs().max() < 1e-4


@pytest.mark.parametrize("scales", [{}, {"x_scale": 0.3}, {"x_scale": 0.3, "out_scale": 0.2}])
def test_means_are_bit_equal_on_every_isa(scales, generator):
    x = codes_of(2, 133, 9, 9, generator=generator)
    scales = {name: torch.tensor(value) for name, value in scales.items()}
    found = []
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            found.append(int8_avg_pool2d(x, 3, 2, 1, **scales))
    for isa, y in zip(_C.available_isas(), found, strict=True):
        assert_exact(y, found[0], isa)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "lp"}, "kind 'lp' is unknown; use max, avg or adaptive_avg"),
        ({"x": torch.ones(1, 2, 4, 4)}, "x is float32, but must be int8"),
        ({"x": torch.ones(4, 4).to(torch.int8)}, r"x has shape \[4, 4\], but must be"),
        ({"kernel_size": 0}, r"kernel is \[0, 0\], but must be positive"),
        ({"kernel_size": 5}, "the padded input has 4 pixels, but the kernel covers 5"),
        ({"stride": -1}, r"stride is \[-1, -1\], but must be positive"),
        ({"padding": 2}, "padding is 2, but must be at most half of the kernel, 3"),
        ({"kind": "max", "x_scale": torch.tensor(1.0), "out_scale": torch.tensor(1.0)}, "the largest codes keep their"),
        ({"out_scale": torch.tensor(1.0)}, "out_scale goes with x_scale"),
        ({"x_scale": torch.tensor(-1.0)}, "x_scale is -1, but must be finite"),
        ({"out_dtype": torch.float32}, "out_dtype torch.float32 goes with a float mean"),
        ({"divisor_override": 0}, "divisor_override is 0, but must not be"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_refuses_in_one_sentence(arguments, message):
    given = {"x": torch.ones(1, 2, 4, 4).to(torch.int8), "kind": "avg", "kernel_size": 3, **arguments}
    with pytest.raises(ValueError, match=f"int8_pool2d: {message}") as error:
        int8_pool2d(**given)
    assert "\n" not in str(error.value)
