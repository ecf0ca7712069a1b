"""concatenate: tensors of any strides and dtypes, the layout of images, and what bad input gets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_exact

from lamina import _C
from lamina.ops import concatenate


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_is_torchs(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.bool]))
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        sizes = list(shape)
        sizes[dim] = draw(st.integers(0, 20))
        order = draw(st.permutations(range(len(shape))))
        t = (9 * torch.randn([sizes[d] for d in order], generator=generator)).to(dtype)
        tensors.append(t.permute([order.index(d) for d in range(len(order))]))
    expected = torch.cat(tensors, dim)
    assert_exact(concatenate(tensors, dim), expected)
    out = torch.zeros(expected.shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
    _C.concatenate(tensors, dim, out)
    assert_exact(out, expected)


def test_keeps_the_layout_of_images(generator):
    x = torch.randn(2, 5, 7, 6, generator=generator)
    last = x.contiguous(memory_format=torch.channels_last)
    assert concatenate([last, last], 1).is_contiguous(memory_format=torch.channels_last)
    assert concatenate([x, last], 1).is_contiguous()


def test_gradients_are_torchs(generator):
    x = torch.randn(3, 5, generator=generator, requires_grad=True)
    concatenate([x, x], 1).sum().backward()
    assert_exact(x.grad, torch.full((3, 5), 2.0))


@pytest.mark.parametrize(
    ("tensors", "dim", "message"),
    [
        ([], 0, "tensors is empty, but must hold at least one"),
        ([torch.ones(3), torch.ones(3).int()], 0, r"tensors\[1\] is torch.int32, but must be torch.float32 as tensors"),
        (
            [torch.ones(3, 2), torch.ones(2, 3)],
            0,
            r"tensors\[1\] has shape \[2, 3\], but must have that of tensors\[0\]",
        ),
        ([torch.ones(3)], 1, "dim is 1, but tensors have 1 dimensions"),
        ([torch.tensor(1.0)], 0, "dim is 0, but tensors have 0 dimensions"),
    ],
)
def test_refuses_in_one_sentence(tensors, dim, message):
    with pytest.raises(ValueError, match=f"concatenate: {message}") as error:
        concatenate(tensors, dim)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "dim", "out", "message"),
    [
        ([], 0, torch.empty(3), "tensors is empty"),
        ([torch.ones(3)], 0, torch.empty(4), "out has 4 in dimension 0, but tensors have 3"),
        ([torch.ones(3)], 2, torch.empty(3), "dim is 2, but tensors have 1 dimensions"),
        ([torch.ones(3).int()], 0, torch.empty(3), r"tensors\[0\] is int32\[3\], but must be float32\[3\] except in"),
    ],
)
def test_compiled_function_refuses_in_one_sentence(tensors, dim, out, message):
    with pytest.raises(ValueError, match=f"concatenate: {message}"):
        _C.concatenate(tensors, dim, out)
