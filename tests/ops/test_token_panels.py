"""token_panels, token_rows and quantize_panels: a layout and back, codes bit by bit, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_exact

import lamina
from lamina import _C
from lamina.ops import quantize_panels, quantize_rows, token_panels, token_rows
from lamina.reference import token_panels as reference


@settings(deadline=None, derandomize=True, max_examples=60)
@given(lead=st.lists(st.integers(0, 4), max_size=2), length=st.integers(0, 70), k=st.integers(0, 40))
def test_rows_are_the_inverse(lead, length, k):
    x = torch.arange(torch.Size(lead).numel() * length * k, dtype=torch.float32).view(*lead, length, k)
    assert_exact(token_rows(token_panels(x), x.shape[:-1]), x)


@pytest.mark.parametrize("length", [1, 4, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("k", [1, 3, 16, 19])
def test_rows_match_the_reference(length, k, isa, generator):
    panels = torch.randn(2 * -(-length // 32), k, 32, generator=generator)
    with lamina.force_isa(isa):
        assert_exact(token_rows(panels, (2, length)), reference.token_rows(panels, (2, length)))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 64, 97])
def test_codes_are_those_of_the_rows(k, isa, generator):
    """Ties, values of every size, tokens of nothing, tokens that are not finite."""
    x = 20 * torch.randn(40, k, generator=generator)
    x[:10] = (torch.randint(-127, 127, (10, k), generator=generator) + 0.5) / 4
    x[:10, 0] = 127 / 4
    x[10], x[11, -1], x[12, 0], x[13, 0], x[14, 0] = 0.0, float("nan"), float("inf"), -float("inf"), 3e38
    x[15] *= 1e-38
    with lamina.force_isa(isa):
        codes, scales = quantize_panels(token_panels(x))
        rows, row_scales = quantize_rows(x)
    of_tokens = reference.codes_of_panels(codes, k).flatten(0, 1)
    assert_exact(of_tokens[:40], rows)
    assert_exact(scales.flatten()[:40], row_scales)
    assert (of_tokens[40:] == 0).all()
    for ours, expected in zip((codes, scales), reference.quantize_panels(reference.token_panels(x)), strict=True):
        assert_exact(ours, expected)


def test_panels_may_lie_apart(isa, generator):
    """Parts of a wider tensor: what a merged projection gives."""
    whole = torch.randn(3, 50, 32, generator=generator)
    part = whole[:, 10:31]
    with lamina.force_isa(isa):
        for ours, expected in zip(quantize_panels(part), quantize_panels(part.contiguous()), strict=True):
            assert_exact(ours, expected)
        assert_exact(token_rows(part, (1, 70)), token_rows(part.contiguous(), (1, 70)))


def test_every_thread_count_gives_the_same_bits(generator):
    panels = torch.randn(7, 600, 32, generator=generator)
    torch.set_num_threads(1)
    codes, rows = quantize_panels(panels), token_rows(panels, (1, 200))
    torch.set_num_threads(2)
    for ours, expected in zip((*quantize_panels(panels), token_rows(panels, (1, 200))), (*codes, rows), strict=True):
        assert_exact(ours, expected)


def test_opcheck(generator):
    panels = torch.randn(4, 10, 32, generator=generator)
    torch.library.opcheck(torch.ops.lamina.token_panels.rows, (panels, (2, 50)))
    torch.library.opcheck(torch.ops.lamina.token_panels.codes, (panels,))


def test_bad_input(generator):
    panels = torch.randn(4, 10, 32, generator=generator)
    for call, message in (
        (lambda: token_panels(torch.ones(3)), r"token_panels: x has shape \[3\], but must be \[..., L, K\]"),
        (lambda: token_panels(torch.ones(3, 4).double()), "token_panels: x is float64"),
        (lambda: token_rows(panels[0], (10,)), r"token_rows: panels has shape \[10, 32\], but must be"),
        (lambda: token_rows(panels, ()), "token_rows: shape is empty"),
        (lambda: token_rows(panels, (2, 65)), "panels has 4 panels, but 2 sequences of 65 tokens have 6"),
        (lambda: token_rows(panels[..., :16], (2, 10)), "token_rows: panels has shape"),
        (lambda: token_rows(panels.bfloat16(), (2, 50)), "token_rows: panels is bfloat16"),
        (lambda: quantize_panels(panels[0]), "quantize_panels: panels has shape"),
        (lambda: quantize_panels(panels.mT.contiguous().mT), "the features of panels must lie one behind the other"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_kernel_that_ran(isa):
    with lamina.force_isa(isa):
        quantize_panels(torch.ones(1, 4, 32))
        assert _C.last_isa() == {"generic": "generic", "avx2": "avx2"}.get(isa, "avx512")
