"""lamina.nn.SparseInt8Linear: Int8Linear with the zero blocks left out, and the config that puts it into models."""

import copy

import pytest
import torch
from cases import zero_blocks
from tolerances import assert_exact, assert_lossy
from torch import nn

import lamina
from lamina import FormatError
from lamina.nn import Int8Linear, SparseInt8Linear
from lamina.ops.sparse_int8_linear import PATTERNS


def pruned(k: int = 70, n: int = 30, pattern: str = "4x4", density: float = 0.2, **options) -> nn.Linear:
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(k, n, **options)
    linear.weight.data = zero_blocks(linear.weight.data, pattern, density, generator)
    return linear


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gives_what_the_dense_int8_layer_gives(pattern):
    linear = pruned(pattern=pattern)
    for options in ({}, {"activation": "gelu"}, {"input_scale": 0.02}, {"out_dtype": torch.bfloat16}):
        layer, dense = (
            SparseInt8Linear.from_float(linear, pattern=pattern, **options),
            Int8Linear.from_float(linear, **options),
        )
        for x in (torch.randn(70), torch.randn(2, 5, 70), torch.randn(0, 70)):
            assert_exact(layer(x), dense(x), str(options))
        assert_exact(layer.weight.clone(), dense.weight.clone())
    x = torch.randn(3, 70)
    plain = SparseInt8Linear.from_float(linear, pattern=pattern)
    gelu = SparseInt8Linear.from_float(linear, "gelu", pattern=pattern)
    assert_exact(plain.activated(x, "gelu"), gelu(x))


def test_is_close_to_the_pruned_layer():
    linear, x = pruned(256, 64), torch.randn(40, 256)
    assert_lossy(SparseInt8Linear.from_float(linear)(x), linear(x), min_sqnr_db=33)


def test_constructor_and_repr():
    layer = SparseInt8Linear(6, 5, bias=False, dtype=torch.bfloat16, activation="silu", pattern="1x4")
    assert layer.bias is None
    assert layer(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.options() == {"activation": "silu", "pattern": "1x4"}
    text = repr(SparseInt8Linear.from_float(pruned(8, 8, density=0.0)))
    assert text == "SparseInt8Linear(in_features=8, out_features=8, bias=True, pattern=4x4, density=0)"
    with pytest.raises(ValueError, match="pattern '4x1' is unknown; use 1x4, 2x4, 4x4"):
        SparseInt8Linear(4, 4, pattern="4x1")
    with pytest.raises(ValueError, match="SparseInt8: pattern '2:4' is unknown; use one of 1x4, 2x4, 4x4"):
        lamina.SparseInt8("2:4")


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_zeros_and_nothing_else(density):
    linear, x = pruned(density=density), torch.randn(9, 70)
    layer = SparseInt8Linear.from_float(linear)
    assert layer.density == density
    assert_exact(layer(x), Int8Linear.from_float(linear)(x))


def test_memory():
    layer = SparseInt8Linear.from_float(pruned(3072, 768, density=0.1))
    assert sum(buffer.nbytes for buffer in layer.buffers()) < 0.034 * 4 * 768 * 3072


def test_state_dict_is_that_of_the_dense_layer():
    linear, x = pruned(), torch.randn(4, 70)
    layer, dense = SparseInt8Linear.from_float(linear), Int8Linear.from_float(linear)
    ours, theirs = layer.state_dict(), dense.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_exact(ours[name], theirs[name], name)
    for state in (theirs, linear.state_dict()):
        other = SparseInt8Linear(70, 30, pattern="2x4")
        other.load_state_dict(state)
        assert_exact(other(x), layer(x))
    broken = SparseInt8Linear(70, 30)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \[30, 70\] in the checkpoint, \[30, 71\]"):
        SparseInt8Linear(71, 30).load_state_dict(theirs)
    with pytest.raises(RuntimeError, match="an int8 weight needs its scale"):
        broken.load_state_dict({"weight": theirs["weight"], "bias": theirs["bias"]}, strict=False)


def test_save_and_load(tmp_path):
    model = nn.Sequential(pruned(), nn.ReLU(), nn.Linear(30, 4)).eval()
    fresh, x = copy.deepcopy(model), torch.randn(3, 70)
    lamina.swap_(model, {"0": lamina.SparseInt8("4x4")})
    lamina.save(model, tmp_path / "m.safetensors")
    lamina.load_(fresh, tmp_path / "m.safetensors")
    assert type(fresh[0]) is SparseInt8Linear
    assert fresh[0].pattern == "4x4"
    assert_exact(fresh(x), model(x))
    with pytest.raises(FormatError):
        lamina.load_(nn.Sequential(nn.Linear(9, 30), nn.ReLU(), nn.Linear(30, 4)), tmp_path / "m.safetensors")


def test_moves_and_copies():
    layer, x = SparseInt8Linear.from_float(pruned()), torch.randn(4, 70)
    other = copy.deepcopy(layer)
    assert_exact(other(x), layer(x))
    assert other.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert other.weight.dtype == torch.bfloat16


def test_input_gradient_reaches_what_lies_before():
    layer, x = SparseInt8Linear.from_float(pruned()), torch.randn(4, 70, requires_grad=True)
    layer(x).sum().backward()
    assert_lossy(x.grad, layer.weight.clone().sum(0).expand(4, 70), min_sqnr_db=100)
    assert not [p for p in layer.parameters() if p.requires_grad]


# -- SparseInt8 in swap_ and accelerate


def test_swap():
    torch.manual_seed(0)
    model = nn.Sequential(pruned(64, 64), nn.ReLU(), nn.Linear(64, 8), nn.LayerNorm(8)).eval()
    reference, x = copy.deepcopy(model), torch.randn(5, 64)
    report = lamina.swap_(model, lamina.SparseInt8())
    assert [type(m) for m in model] == [SparseInt8Linear, nn.ReLU, nn.Linear, nn.LayerNorm]
    decision = next(d for d in report.left if d.fqn == "2")
    assert decision.reason == "100% of its 4x4 blocks hold a nonzero, and above 70% the dense int8 layer is as fast"
    assert_lossy(model(x), reference(x), min_sqnr_db=30)


def test_swap_leaves_what_it_cannot_take():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(8, 8), nn.Linear(8, 8).double(), pruned(8, 8)).eval()
    model[2].weight.data[0, 0] = float("nan")
    report = lamina.swap_(model, lamina.SparseInt8())
    assert not report.swapped
    reasons = " ".join(d.reason for d in report.left)
    for word in ("Own is a subclass", "torch.float64", "NaN or infinite"):
        assert word in reasons


def test_attention_projections():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in (layer.self_attn.in_proj_weight, layer.self_attn.out_proj.weight, layer.linear1.weight):
        parameter.data = zero_blocks(parameter.data, "4x4", 0.3, generator)
    reference, x = copy.deepcopy(layer), torch.randn(2, 9, 32)
    with torch.no_grad():
        report = lamina.swap_(layer, lamina.SparseInt8())
        assert len(report.swapped) == 3
        assert_lossy(layer(x), reference(x), min_sqnr_db=30)
