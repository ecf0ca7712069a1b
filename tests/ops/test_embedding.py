"""embedding: exact rows of any dtype, indices that are refused, gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_exact

import lamina
from lamina import _C
from lamina.ops import embedding


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    rows=st.integers(1, 40),
    size=st.integers(0, 150),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64]),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 1000),
)
def test_embedding_is_torchs(shape, rows, size, dtype, index, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, rows, shape, generator=generator, dtype=index)
    weight = (50 * torch.randn(rows, size, generator=generator)).to(dtype)
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            assert_exact(embedding(indices, weight), weight[indices.long()])


def test_embedding_copies_bits_that_are_no_numbers(isa):
    bits = torch.randint(-(2**31), 2**31, (30, 37), dtype=torch.int64).to(torch.int32)
    picked = torch.tensor([3, 29, 0, 3])
    with lamina.force_isa(isa):
        out = embedding(picked, bits.view(torch.float32))
    assert_exact(out.view(torch.int32), bits[picked])


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("place", [0, 1, 2, 7, 4000])
def test_embedding_refuses_an_index_out_of_range(isa, index, bad, place):
    indices = torch.randint(0, 50, (2, 4096), dtype=index).T
    indices[place, 1] = bad
    for weight in (torch.randn(50, 33), torch.randn(33, 50).T):
        with (
            lamina.force_isa(isa),
            pytest.raises(
                ValueError, match=rf"embedding: index {bad} is out of range, weight is float32\[50, 33\]"
            ) as e,
        ):
            embedding(indices, weight)
        assert "\n" not in str(e.value)


def test_embedding_refuses_in_one_sentence():
    indices, weight = torch.tensor([1, 2]), torch.randn(5, 3)
    with pytest.raises(ValueError, match="embedding: indices is float32, but must be int32 or int64"):
        embedding(indices.float(), weight)
    with pytest.raises(ValueError, match=r"embedding: weight is float32\[3\], but must be \[V, D\]"):
        embedding(indices, weight[0])
    with pytest.raises(ValueError, match=r"embedding: out is float32\[2, 4\], but must have the shape of indices"):
        _C.embedding(indices, weight, torch.empty(2, 4))
    with pytest.raises(ValueError, match="embedding: out must be contiguous"):
        _C.embedding(indices, weight, torch.empty(3, 2).T)
    with pytest.raises(ValueError, match="embedding: weight is an unsupported dtype"):
        torch.ops.lamina.embedding(indices, weight.to(torch.complex64))


def test_embedding_leaves_the_rest_to_torch():
    indices, weight = torch.tensor([[1, 2], [4, 1]]), torch.randn(5, 3)
    assert_exact(embedding(indices, weight.to(torch.complex64)).real, embedding(indices, weight))
    assert embedding(indices.to("meta"), weight.to("meta")).shape == (2, 2, 3)
    grads = []
    for function in (embedding, F.embedding):
        leaf = weight.clone().requires_grad_()
        function(indices, leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert_exact(*grads)


def test_embedding_compiles():
    indices, weight = torch.tensor([[1, 2], [4, 1]]), torch.randn(5, 3)
    compiled = torch.compile(lambda i, w: embedding(i, w) + 1, fullgraph=True, backend="aot_eager")
    assert_exact(compiled(indices, weight), embedding(indices, weight) + 1)
