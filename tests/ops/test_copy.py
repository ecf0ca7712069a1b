"""copy: the same values from any strides to any others, in every dtype, and what bad input gets."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_exact

import lamina
from lamina import _C
from lamina.ops import copy

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
DTYPES = (*FLOATS, torch.float64, torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def targets(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What a dtype is converted to."""
    if dtype in (torch.float32, torch.bool):
        return (*FLOATS, torch.bool, *INTEGERS)
    if dtype in FLOATS:
        return (*FLOATS, torch.bool)
    if dtype is torch.int8:
        return (torch.int8, *FLOATS, torch.bool)
    return (torch.float32, torch.bool, *INTEGERS) if dtype in INTEGERS else (dtype,)


def strided(shape: list[int], dtype: torch.dtype, draw, fill) -> torch.Tensor:
    """A tensor whose dimensions lie in any order, with or without room between elements and rows."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    whole = fill([shape[d] * step for d, step in zip(order, steps, strict=True)]).to(dtype)
    view = whole[tuple(slice(None, None, step) for step in steps)]
    return view.permute([order.index(d) for d in range(len(order))])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_strides_on_both_sides(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = draw(
        st.lists(st.sampled_from([1, 2, 3, 8, 9, 16, 17, 33, 70]), max_size=5).filter(lambda s: math.prod(s) < 3e4)
    )
    dtype = draw(st.sampled_from(DTYPES))
    to = draw(st.sampled_from(targets(dtype)))
    x = strided(shape, dtype, draw, lambda sizes: (40 * torch.randn(sizes, generator=generator)).abs())
    out = strided(shape, to, draw, torch.zeros)
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            _C.copy(x, out.zero_())
        assert_exact(out, x.to(to), isa)


def test_writes_nothing_beside_the_output(generator):
    for dtype in (torch.float32, torch.int16):
        whole = torch.full((40, 50), 7, dtype=dtype)
        x = torch.randint(-5, 5, (33, 37), generator=generator).to(dtype)
        for source in (x, x.T.contiguous().T):
            _C.copy(source, whole[3:36, 5:42])
            assert_exact(whole[3:36, 5:42], x)
            assert int((whole == 7).sum()) == whole.numel() - x.numel() + int((x == 7).sum())
            whole.fill_(7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bits_are_kept(isa, dtype):
    """Of signaling NaNs and of subnormal numbers as well."""
    size = dtype.itemsize
    codes = torch.arange(0, 65536, 7, dtype=torch.int32)
    codes = (codes.to(torch.int16) if size == 2 else codes * 65521)[: 96 * 96].view(96, 96)
    x = codes.view(dtype)
    with lamina.force_isa(isa):
        for source in (x, x.T, x[:, ::3]):
            assert_exact(copy(source).view(codes.dtype), source.contiguous().view(codes.dtype))


def test_conversions_round_as_torch_does(isa):
    x = torch.tensor(
        [0.0, -0.0, math.nan, math.inf, -math.inf, 65520.0, 65519.0, 1e-8, 6e-8, 1e-40, 1.00390625, 3.4e38, 2.0]
    )
    with lamina.force_isa(isa):
        for dtype in (torch.float16, torch.bfloat16, torch.bool):
            assert_exact(copy(x, dtype=dtype), x.to(dtype))
            assert_exact(copy(x.repeat(20, 1).T, dtype=dtype), x.repeat(20, 1).T.to(dtype))
        large = torch.tensor([2**24 + 1, 2**53 + 1, -(2**62) - 1, 7])
        assert_exact(copy(large, dtype=torch.float32), large.float())


def test_integers_lose_nothing_that_fits(isa):
    """What a float32 would round, zeros that are none when they are cut off, and halves on their way to zero."""
    large = torch.tensor([2**40 + 1, -(2**62) - 1, 2**31 - 1, -(2**31), 2**32, 0, 1, -1, 2**24 + 1])
    fractions = torch.tensor([0.5, -0.5, 1.5, -1.5, 2.9999998, -0.0, 2.0**30, -(2.0**30), 1e-40])
    with lamina.force_isa(isa):
        for source in (large, large.repeat(20, 1).T):
            for dtype in (torch.bool, torch.int32, torch.int64):
                assert_exact(copy(source, dtype=dtype), source.to(dtype))
            assert_exact(copy(source.int(), dtype=torch.int64), source.int().long())
        for source in (fractions, fractions.repeat(20, 1).T):
            for dtype in INTEGERS:
                assert_exact(copy(source, dtype=dtype), source.to(dtype))


def test_layouts(generator):
    x = torch.randn(2, 5, 7, 6, generator=generator)
    last = copy(x, layout="channels_last")
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_exact(copy(last), x)
    assert copy(last).is_contiguous()
    assert copy(x).data_ptr() != x.data_ptr()


def test_gradients_are_torchs(generator):
    x = torch.randn(3, 5, generator=generator, requires_grad=True)
    copy(x.T, dtype=torch.bfloat16).sum().backward()
    assert_exact(x.grad, torch.ones(3, 5))
    assert copy(x.to("meta").T).shape == (5, 3)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.ones(3), {"layout": "nhwc"}, "layout 'nhwc' is unknown; use contiguous or channels_last"),
        (torch.ones(3), {"layout": "channels_last"}, "x has 1 dimensions, but must have 4 for channels_last"),
        (torch.ones(3), {"dtype": torch.int8}, "x is float32 and out int8; conversions go between float32, int32,"),
        (torch.ones(3, dtype=torch.complex64), {}, "x is of an unsupported dtype; use"),
        (torch.ones([1] * 17), {}, "x has 17 dimensions, but at most 16 are taken"),
    ],
)
def test_refuses_in_one_sentence(x, options, message):
    with pytest.raises(ValueError, match=f"copy: {message}") as error:
        copy(x, **options)
    assert "\n" not in str(error.value)


def test_compiled_function_refuses_in_one_sentence():
    with pytest.raises(ValueError, match=r"copy: out is float32\[4\], but must have the shape of x, float32\[3\]"):
        _C.copy(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="copy: out is expanded; use memory of its own for each element"):
        _C.copy(torch.ones(3), torch.ones(1).expand(3))
