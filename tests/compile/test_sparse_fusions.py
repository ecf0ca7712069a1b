"""Sparse int8 layers in a compiled graph: they take in what the dense ones take in, and give the same bits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import zero_blocks
from tolerances import assert_exact, assert_lossy
from torch import nn

import lamina
from lamina.compile import explain

EVERY = {"measure": False}


class Layers(nn.Module):
    """Three projections of one input, a product of them, an activation and a residual."""

    def __init__(self, width: int, pattern: str):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name in ("a", "b", "c", "up", "down"):
            layer = nn.Linear(48, width) if name in "abc" else nn.Linear(width, width)
            layer.weight.data = zero_blocks(layer.weight.data, pattern, 0.3, generator)
            setattr(self, name, layer)

    def forward(self, x):
        y = self.a(x) * self.b(x) - self.c(x)
        return y + self.down(F.gelu(self.up(y)))


@pytest.mark.parametrize(("width", "pattern"), [(64, "4x4"), (53, "1x4")])
def test_sparse_layers_fuse_as_dense_ones_do(width, pattern):
    model, x = Layers(width, pattern).eval(), torch.randn(2, 9, 48)
    dense = copy.deepcopy(model)
    lamina.swap_(model, lamina.SparseInt8(pattern))
    lamina.swap_(dense, lamina.Int8Dynamic())
    report = explain(model, (x,), options=EVERY)
    assert report.fused["3 sparse_int8_linear of one input"] == 1
    assert report.fused["linear + gelu"] == report.fused["linear + residual"] == 1
    with torch.no_grad():
        compiled = torch.compile(model, backend="lamina", options=EVERY)
        assert_exact(compiled(x), torch.compile(dense, backend="lamina", options=EVERY)(x))
        for name, layer in model.named_children():  # another weight, with other blocks
            layer.load_state_dict(getattr(Layers(width, pattern), name).state_dict())
        assert_exact(compiled(x), torch.compile(copy.deepcopy(model), backend="lamina", options=EVERY)(x))


def test_layers_of_different_patterns_stay_apart():
    model, x = Layers(64, "4x4").eval(), torch.randn(2, 9, 48)
    lamina.swap_(model, {"b": lamina.SparseInt8("2x4"), "_default": lamina.SparseInt8("4x4")})
    report = explain(model, (x,), options=EVERY)
    assert "3 sparse_int8_linear of one input" not in report.fused
    assert report.fused["rows quantized once for 3 layers"] == 1
    with torch.no_grad():
        assert_lossy(torch.compile(model, backend="lamina", options=EVERY)(x), model(x), min_sqnr_db=90)
