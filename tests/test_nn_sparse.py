"""lamina.nn.SparseLinear and SparseConv2d, and how Sparse puts them into models."""

import copy

import pytest
import torch
from tolerances import assert_exact, assert_lossy
from torch import nn

import lamina
from lamina.nn import SparseConv2d, SparseLinear
from lamina.ops.sparse_blocks import BLOCKS
from lamina.ops.sparse_int8_linear import block_density
from lamina.ops.sparse_linear import PATTERNS
from lamina.sparsity import choose_pattern


def prune(module: nn.Module, zeros: float = 0.9, rows: int = 1) -> nn.Module:
    """Sets random blocks of `rows` output channels to zero."""
    with torch.no_grad():
        weight = module.weight
        kept = torch.rand(-(-weight.shape[0] // rows), *weight.shape[1:]) >= zeros
        weight.mul_(kept.repeat_interleave(rows, 0)[: weight.shape[0]])
    return module


@pytest.fixture(params=["linear", "conv"])
def pair(request):
    """(class, pruned float layer, input)."""
    if request.param == "linear":
        return SparseLinear, prune(nn.Linear(70, 30)), torch.randn(5, 70)
    return SparseConv2d, prune(nn.Conv2d(10, 30, 3, padding=1)), torch.randn(2, 10, 6, 7)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_takes_the_place_of_the_float_layer(pair, pattern):
    kind, module, x = pair
    layer = kind.from_float(module.eval(), pattern=pattern)
    assert isinstance(layer, type(module))
    assert not layer.training
    assert layer.pattern == pattern
    assert_lossy(layer(x), module(x), min_sqnr_db=110)
    assert_exact(layer.weight.clone().abs(), module.weight.detach().abs())
    assert layer.weight.shape == module.weight.shape
    assert not any(p.requires_grad for p in layer.parameters())
    assert f"pattern={pattern}, density=" in repr(layer)
    expected = nn.functional.gelu(layer(x))
    assert_lossy(kind.from_float(module, "gelu", pattern=pattern)(x), expected, min_sqnr_db=90)


@pytest.mark.parametrize("pattern", BLOCKS)
def test_blocks_of_gpus_are_packed_in_smaller_ones(pair, pattern, tmp_path):
    """The layer knows its blocks, for the GPU that it may move to, and a file keeps them."""
    kind, module, x = pair
    lamina.prune.magnitude_(module, 0.5, pattern)
    layer = kind.from_float(module, pattern=pattern)
    assert (layer.pattern, layer.sparse_info.pattern) == (pattern, "4x1")
    assert_exact(layer(x), kind.from_float(module, pattern="4x1")(x))
    other = kind.from_float(copy.deepcopy(module), pattern=pattern)
    other.load_state_dict(layer.state_dict())
    assert other.pattern == pattern
    lamina.save(nn.Sequential(layer), tmp_path / "m.safetensors")
    model = nn.Sequential(module)
    lamina.load_(model, tmp_path / "m.safetensors")
    assert model[0].pattern == pattern
    # Bytes that were packed in another pattern bring theirs.
    other.load_state_dict(kind.from_float(module, pattern="2x1").state_dict())
    assert other.pattern == "2x1"
    model = nn.Sequential(module)
    assert lamina.swap_(model, lamina.Sparse(pattern)).swapped
    assert model[0].pattern == pattern


def test_two_of_four_is_unstructured_on_the_cpu(pair):
    kind, module, x = pair
    lamina.prune.magnitude_(module, 0.5, "2:4")
    layer = kind.from_float(module, pattern="2:4")
    assert (layer.pattern, layer.sparse_info.pattern) == ("2:4", "unstructured")
    assert_exact(layer(x), kind.from_float(module)(x))


def test_pruned_blocks_are_large():
    linear = nn.Linear(256, 128)
    lamina.prune.magnitude_(linear, 0.5, "64x64")
    assert block_density(linear.weight, "64x64") == 0.5


def test_dtypes(pair):
    kind, module, x = pair
    layer = kind.from_float(module.bfloat16(), pattern="4x1")
    assert layer.sparse_info.dtype == torch.bfloat16
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_lossy(y, module.double()(x.bfloat16().double()), min_sqnr_db=45)
    # A float32 layer in a model that is moved to bfloat16 keeps its values.
    moved = kind.from_float(module.float()).to(torch.bfloat16)
    assert moved.sparse_info.dtype == torch.float32
    assert moved.weight.dtype == torch.bfloat16
    assert moved(x.bfloat16()).dtype == torch.bfloat16


def test_memory():
    layer = SparseLinear.from_float(prune(nn.Linear(768, 1024, bias=False), 0.9, rows=4), pattern="4x1")
    held = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
    assert held <= 0.125 * 4 * 768 * 1024
    assert sum(t.nbytes for t in layer.state_dict().values()) == held


def test_gradients_flow_to_the_input(pair):
    """A model with frozen sparse layers fine-tunes: what stands before them gets the dense layer's gradient."""
    kind, module, x = pair
    layer = kind.from_float(module)
    ours, dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(ours).square().sum().backward()
    module(dense).square().sum().backward()
    assert_lossy(ours.grad, dense.grad, min_sqnr_db=100)


def test_state_dict_goes_round(pair):
    kind, module, x = pair
    layer = kind.from_float(module, pattern="2x1")
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert layer.state_dict()["weight"].dtype == torch.uint8
    other = kind.from_float(copy.deepcopy(module).apply(lambda m: nn.init.ones_(m.weight)))
    other.load_state_dict(layer.state_dict())
    assert other.pattern == "2x1"
    assert_exact(other(x), layer(x))
    # A float weight, as a checkpoint of the pruned model has it, is packed in the layer's pattern.
    other.load_state_dict(module.state_dict())
    assert_exact(other(x), layer(x))
    copied = copy.deepcopy(layer)
    assert_exact(copied(x), layer(x))


def test_refuses_foreign_weights(pair):
    kind, module, _ = pair
    layer = kind.from_float(module)
    state = layer.state_dict()
    state["weight"] = state["weight"].clone()
    state["weight"][8] = 7
    with pytest.raises(RuntimeError, match=r"weight: .*format version 7, but this lamina reads version 1"):
        layer.load_state_dict(state)
    smaller = type(module)(7, 30, 3) if isinstance(module, nn.Conv2d) else nn.Linear(69, 30)
    with pytest.raises(RuntimeError, match=r"weight: size mismatch: \[30, \d+\] in the checkpoint"):
        layer.load_state_dict(kind.from_float(smaller).state_dict())


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = prune(nn.Conv2d(3, 8, 3)), prune(nn.Linear(8, 5))

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def test_file_goes_round(tmp_path):
    model, x = Small(), torch.randn(2, 3, 6, 6)
    report = lamina.swap_(model, lamina.Sparse("4x1"))
    assert [d.now for d in report.decisions] == ["SparseConv2d(3, 8, 3x3)", "SparseLinear(8, 5)"]
    lamina.save(model, tmp_path / "m.safetensors")
    other = Small()
    lamina.load_(other, tmp_path / "m.safetensors")
    assert (type(other.conv), type(other.head), other.head.pattern) == (SparseConv2d, SparseLinear, "4x1")
    assert_exact(other(x), model(x))
    lamina.load_(other, tmp_path / "m.safetensors")
    assert_exact(other(x), model(x))


def test_a_file_of_another_version_changes_nothing(tmp_path):
    model = Small()
    lamina.swap_(model, lamina.Sparse())
    lamina.save(model, tmp_path / "m.safetensors")
    before = model(torch.ones(1, 3, 6, 6))
    data = model.head._packed
    data[8] = 9
    lamina.save(model, tmp_path / "newer.safetensors")
    data[8] = 1
    with pytest.raises(lamina.FormatError, match=r"newer\.safetensors does not fit .*format version 9"):
        lamina.load_(model, tmp_path / "newer.safetensors")
    assert_exact(model(torch.ones(1, 3, 6, 6)), before)


# -- swap_ and accelerate


def test_left_alone_with_a_reason():
    model = nn.Sequential(
        nn.Linear(8, 8),
        prune(nn.Conv2d(8, 8, 3, groups=2)),
        prune(nn.Linear(8, 8)).double(),
        nn.Conv2d(4, 4, 1),
        prune(nn.Conv1d(4, 4, 1)),
    )
    report = lamina.swap_(model, lamina.Sparse())
    assert {d.fqn: d.reason for d in report.left} == {
        "0": "its weight has no zeros; prune it first",
        "1": "it has 2 groups, and sparse convolutions take one",
        "2": "the weight is torch.float64, and sparse kernels take float32 and bfloat16",
        "3": "its weight has no zeros; prune it first",
    }
    assert not report.swapped


def test_all_zeros():
    model = nn.Sequential(prune(nn.Linear(8, 6), zeros=1.1), prune(nn.Conv2d(6, 5, 3), zeros=1.1))
    linear, conv = copy.deepcopy(model)
    assert len(lamina.swap_(model, lamina.Sparse("4x1")).swapped) == 2
    x = torch.randn(3, 8)
    assert_exact(model[0](x), linear(x))
    assert_exact(
        model[1](torch.randn(1, 6, 4, 4)), conv(torch.randn(1, 6, 4, 4)).contiguous(memory_format=torch.channels_last)
    )


def test_unknown_patterns():
    for make in (lamina.Sparse, lambda p: SparseLinear(4, 4, pattern=p), lambda p: SparseConv2d(4, 4, 1, pattern=p)):
        with pytest.raises(ValueError, match="pattern '1x4' is unknown; use one of unstructured, 2x1, 4x1"):
            make("1x4")
    with pytest.raises(ValueError, match="Sparse: rows is 0, but must be positive or None"):
        lamina.Sparse("auto", rows=0)


def test_auto_measures():
    """Nearly nothing left is faster by far on any machine."""
    model = nn.Sequential(prune(nn.Linear(768, 512), 0.98, rows=4), nn.Linear(512, 8), prune(nn.Linear(8, 8), 0.1))
    report = lamina.swap_(model, lamina.Sparse("auto"))
    assert isinstance(model[0], SparseLinear)
    assert model[0].pattern == "4x1"
    first, second, third = (d.reason for d in report.decisions)
    assert "x at 98% zeros on 128 rows; 4x1 breaks even at" in first
    assert second == "its weight has no zeros; prune it first"
    assert third.endswith("of its weight is zeros, too few for a sparse kernel")


def test_auto_leaves_a_layer_dense_when_it_would_lose(monkeypatch):
    """Whatever machine this is: the clock says 10 dense, 12 sparse, 2 with an empty weight."""
    monkeypatch.setattr("lamina.sparsity._medians", lambda calls, stopwatch: [10.0, 12.0, 2.0])
    weight = torch.ones(40, 50)
    weight[:, ::2] = 0
    model = nn.Sequential(nn.Linear(50, 40))
    model[0].weight.data.copy_(weight)
    (decision,) = lamina.swap_(model, lamina.Sparse("auto", rows=7)).decisions
    assert decision.now is None
    reason = "a sparse kernel would be slower: 0.8x at 50% zeros on 7 rows; 4x1 breaks even at 60%"
    assert decision.reason == reason
    assert choose_pattern(weight).break_even == pytest.approx(0.4)


def test_choice_counts_blocks():
    torch.manual_seed(0)
    assert choose_pattern(prune(nn.Linear(400, 400), 0.9).weight, None).pattern == "unstructured"
    assert choose_pattern(prune(nn.Linear(400, 400), 0.9, rows=2).weight, None).pattern == "2x1"
    choice = choose_pattern(prune(nn.Linear(400, 400), 0.9, rows=4).weight, None)
    assert choice.pattern == "4x1"
    assert 0.08 < choice.density < 0.12
    assert choose_pattern(torch.zeros(0, 4)).pattern is None
    assert choose_pattern(torch.zeros(4, 4), 3).pattern is not None or choose_pattern(torch.zeros(4, 4), 3).speedup < 1


def test_choice_for_a_gpu():
    """The largest of the square blocks that hold as much; none where most of them hold something."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    corner, spread = torch.zeros(128, 128), torch.zeros(128, 128)
    corner[:64, :64] = 1.0
    spread[::16, ::16] = 1.0
    choice = choose_pattern(corner.as_subclass(OnGPU), None)
    assert (choice.pattern, choice.density) == ("64x64", 0.25)
    assert choose_pattern(torch.eye(128).as_subclass(OnGPU), None).pattern == "16x16"
    assert "blocks hold a nonzero, too many for a GPU" in choose_pattern(spread.as_subclass(OnGPU), None).reason


def test_auto_of_convolutions():
    model = nn.Sequential(prune(nn.Conv2d(16, 16, 3), 0.95), prune(nn.Conv2d(16, 16, 3), 0.6), nn.Conv2d(16, 16, 3))
    report = lamina.swap_(model, lamina.Sparse("auto"))
    assert [type(layer) for layer in model] == [SparseConv2d, nn.Conv2d, nn.Conv2d]
    assert report.decisions[1].reason.endswith("of its weight is zeros, too few for a sparse convolution")


def test_accelerate_offers_sparse_layers():
    """Float accuracy and 98% zeros: int8 is out by its error, and the sparse layer wins."""
    model = nn.Sequential(prune(nn.Linear(768, 768), 0.98, rows=4), nn.ReLU(), nn.Linear(768, 16))
    fast = lamina.accelerate(model, (torch.randn(128, 768),), max_error=1e-5, compile=False)
    assert isinstance(fast.model[0], SparseLinear)
    assert type(fast.model[2]) is nn.Linear
    decision = fast.report.decisions[0]
    assert decision.speedup > 1
    assert decision.error < 1e-5
