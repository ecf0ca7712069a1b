"""lamina behind torch's scaled_dot_product_attention, by torch.nn.attention's registry of flash attention."""

import pytest
import torch
from tolerances import assert_composite, assert_exact
from torch.nn import functional as F

import lamina
from lamina.integrations import sdpa


@pytest.fixture
def active():
    sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("lamina")
    yield
    torch.nn.attention.restore_flash_attention_impl()


@pytest.fixture
def calls(monkeypatch):
    counted = []
    original = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *args, **kwargs: counted.append(args) or original(*args, **kwargs))
    return counted


def inputs(dtype=torch.float32, grad=False):
    return [torch.randn(2, 3, n, 16).to(dtype).requires_grad_(grad) for n in (7, 9, 9)]


MASKS = {
    "none": None,
    "bool": torch.arange(63).view(7, 9) % 5 != 3,
    "float": torch.linspace(-2, 2, 126).view(2, 1, 7, 9),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_it_runs_and_agrees(mask, dtype, calls):
    q, k, v = inputs(dtype)
    mask = MASKS[mask].to(dtype) if mask == "float" else MASKS[mask]
    truth = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask.double() if mask is not None and mask.is_floating_point() else mask
    )
    theirs = F.scaled_dot_product_attention(q, k, v, mask)
    assert calls == []
    sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("lamina")
    try:
        assert torch.nn.attention.current_flash_attention_impl() == "lamina"
        ours = F.scaled_dot_product_attention(q, k, v, mask)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert len(calls) == 1
    assert_composite(ours, theirs, truth, floor=4 * torch.finfo(dtype).eps)
    assert_exact(F.scaled_dot_product_attention(q, k, v, mask), theirs)
    assert len(calls) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal, calls):
    q, k, v = inputs(grad=True)
    sdpa.register()
    gradients = []
    for kind in ("float64", "torch", "lamina"):
        if kind == "lamina":
            torch.nn.attention.activate_flash_attention_impl("lamina")
        try:
            given = [t.detach().double().requires_grad_() if kind == "float64" else t for t in (q, k, v)]
            output = F.scaled_dot_product_attention(*given, is_causal=causal)
            gradients.append(torch.autograd.grad(output.square().sum(), given))
        finally:
            if kind == "lamina":
                torch.nn.attention.restore_flash_attention_impl()
    assert len(calls) == 1
    for truth, eager, actual in zip(*gradients, strict=True):
        assert_composite(actual, eager, truth, floor=1e-5)


@pytest.mark.usefixtures("active")
def test_inside_torchs_layers_and_under_autocast(calls):
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    layer(x, x, x, need_weights=False)[0].sum().backward()
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*inputs()).dtype == torch.bfloat16
    assert calls[-1][0].dtype == torch.bfloat16


@pytest.mark.usefixtures("active")
def test_dropout_stays_torchs(calls):
    F.scaled_dot_product_attention(*inputs(), dropout_p=0.5)
    assert calls == []


def test_import_activates_nothing():
    assert torch.nn.attention.current_flash_attention_impl() is None
    assert lamina.integrations.sdpa is sdpa
