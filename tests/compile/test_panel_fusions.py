"""Chains of sparse int8 layers in a compiled graph: in panels they give the numbers that they give in rows."""

import sys

import pytest
import torch
import torch.nn.functional as F
from cases import zero_blocks
from tolerances import assert_exact, assert_lossy
from torch import nn

import lamina
from lamina.compile import explain
from lamina.models.bert import BERTConfig, BERTLayer

EVERY = {"measure": False}


class Of(nn.Module):
    """A function over pruned layers of so many inputs and outputs."""

    def __init__(self, function, pattern="4x4", **sizes):
        super().__init__()
        self.function = function
        for name, (inputs, outputs) in sizes.items():
            setattr(self, name, nn.Linear(inputs, outputs))
        pruned(self, pattern)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def pruned(model: nn.Module, pattern: str = "4x4") -> nn.Module:
    """With three quarters of the blocks of all its linear layers zero, as sparse int8 layers."""
    generator = torch.Generator().manual_seed(5)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = zero_blocks(layer.weight.data, pattern, 0.25, generator)
    lamina.swap_(model.eval(), lamina.SparseInt8(pattern))
    return model


def compiled(model: nn.Module, *inputs: torch.Tensor, rows: bool = False, options=EVERY):
    """The compiled model's answer; `rows`: with the pass left out."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if rows:
            patch.setattr(sys.modules["lamina.compile.fuse"], "panels", lambda captured: None)
        return torch.compile(model, backend="lamina", options=options)(*inputs)


def in_panels(model: nn.Module, *inputs: torch.Tensor, options=EVERY) -> list[str]:
    torch._dynamo.reset()
    return [pattern for pattern in explain(model, inputs, options=options).fused if "in panels" in pattern]


@pytest.mark.parametrize("shape", [(1,), (40,), (2, 9), (2, 3, 5)])
@pytest.mark.parametrize("pattern", ["1x4", "2x4", "4x4"])
def test_layers_without_attention_keep_their_bits(shape, pattern):
    model = Of(
        lambda m, x: x + m.down(F.gelu(m.up(x))) + m.out(m.mid(x).relu()),
        pattern,
        up=(48, 100),
        down=(100, 48),
        mid=(48, 30),
        out=(30, 48),
    )
    x = torch.randn(*shape, 48)
    assert in_panels(model, x) == ["4 sparse int8 layers in panels"]
    assert_exact(compiled(model, x), compiled(model, x, rows=True))


def test_results_that_others_use_are_rows():
    model = Of(lambda m, x: (m.b(y := m.a(x)), y.sigmoid(), y), a=(48, 64), b=(64, 20))
    x = torch.randn(5, 48)
    assert in_panels(model, x) == ["2 sparse int8 layers in panels"]
    assert_exact(compiled(model, x), compiled(model, x, rows=True))


def test_a_residual_from_outside_becomes_panels():
    model = Of(lambda m, x, y: m.b(m.a(x)) + y, a=(48, 64), b=(64, 20))
    x, y = torch.randn(70, 48), torch.randn(70, 20)
    assert in_panels(model, x, y) == ["2 sparse int8 layers in panels"]
    assert_exact(compiled(model, x, y), compiled(model, x, y, rows=True))


def test_layers_apart_stay_in_rows():
    model = Of(lambda m, x: m.b(m.a(x).cumsum(-1)), a=(48, 64), b=(64, 20))
    assert in_panels(model, torch.randn(5, 48)) == []


def test_a_static_scale_stays_in_rows():
    model = Of(lambda m, x: m.b(m.a(x)), a=(48, 64), b=(64, 20))
    model.b.input_scale = torch.tensor(0.05)
    assert in_panels(model, torch.randn(5, 48)) == []


@pytest.mark.parametrize(("batch", "length"), [(1, 32), (1, 128), (2, 40), (3, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_layer_stays_in_panels(batch, length, masked):
    torch.manual_seed(1)
    model = pruned(BERTLayer(BERTConfig(dim=64, heads=4, ffn=128)))
    x, mask = torch.randn(batch, length, 64), None
    if masked:
        mask = (torch.arange(length) < torch.arange(length - batch + 1, length + 1)[:, None])[:, None, None, :]
    assert in_panels(model, x, mask) == ["4 sparse int8 layers in panels"]
    ours, rows = compiled(model, x, mask), compiled(model, x, mask, rows=True)
    # bfloat16 inside attention where the processor has it, and codes that fall to the other side of a half.
    assert_lossy(ours, rows, min_sqnr_db=35)
    with torch.no_grad():
        assert_lossy(ours, model(x, mask), min_sqnr_db=30)


def test_a_mask_of_every_query_leaves_attention_in_rows():
    model = pruned(BERTLayer(BERTConfig(dim=64, heads=4, ffn=128)))
    x, mask = torch.randn(1, 20, 64), torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    assert in_panels(model, x, mask) == ["3 sparse int8 layers in panels"]
    assert_lossy(compiled(model, x, mask), compiled(model, x, mask, rows=True), min_sqnr_db=35)


def test_layers_of_an_encoder_are_one_chain():
    torch.manual_seed(1)
    config = BERTConfig(dim=64, heads=4, ffn=128)
    layers = nn.ModuleList(BERTLayer(config) for _ in range(3))
    model = Of(lambda m, x: m.layers[2](m.layers[1](m.layers[0](x, None), None), None))
    model.layers = pruned(layers)
    x = torch.randn(1, 64, 64)
    assert in_panels(model, x) == ["12 sparse int8 layers in panels"]
    with torch.no_grad():
        assert_lossy(compiled(model, x), model(x), min_sqnr_db=25)


def test_a_chain_is_taken_where_it_measures_faster(monkeypatch):
    """The clock is the test's own."""
    torch.manual_seed(1)
    model = pruned(BERTLayer(BERTConfig(dim=64, heads=4, ffn=128)))
    x = torch.randn(1, 32, 64)
    asked, answers = [], ["panels", "rows"]

    def fastest(key, candidates):
        for run in candidates.values():
            run()
        if "panels" in candidates:
            asked.append(key)
            return answers.pop()
        return list(candidates)[-1]

    monkeypatch.setattr("lamina.compile.choose.fastest", fastest)
    assert in_panels(model, x, None, options={}) == []
    assert in_panels(model, x, None, options={}) == ["4 sparse int8 layers in panels"]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("kept", [False, True])
def test_a_norm_is_made_by_its_layer(kept, monkeypatch):
    """Unless the layer's result is used elsewhere too."""
    model = Of(lambda m, x: (m.b(m.norm(y := m.a(x))), *((y,) if kept else ())), a=(48, 64), b=(64, 20))
    model.norm = nn.LayerNorm(64)
    calls = []
    kernel = lamina._C.sparse_int8_linear_panels
    monkeypatch.setattr(lamina._C, "sparse_int8_linear_panels", lambda *a: calls.append(a[10]) or kernel(*a))
    x = torch.randn(40, 48)
    ours = compiled(model, x)
    assert calls == ([None, None] if kept else [1e-5, None])
    for one, other in zip(ours, compiled(model, x, rows=True), strict=True):
        assert_lossy(one, other, min_sqnr_db=35)


def test_another_weight_is_taken_up():
    model = Of(lambda m, x: m.b(m.a(x)), a=(48, 64), b=(64, 20))
    other = Of(lambda m, x: m.b(m.a(x)), a=(48, 64), b=(64, 20))
    x = torch.randn(9, 48)
    torch._dynamo.reset()
    with torch.no_grad():
        call = torch.compile(model, backend="lamina", options=EVERY)
        assert_exact(call(x), model(x))
        model.load_state_dict(other.state_dict())
        assert_exact(call(x), other(x))
