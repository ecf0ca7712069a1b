"""lamina.nn.Int8WeightOnlyLinear and Int4WeightOnlyLinear: Linears whose weight alone is quantized."""

import copy

import pytest
import torch
from tolerances import INT4_LAYER_SQNR_DB, INT8_LAYER_SQNR_DB, assert_exact, assert_lossy
from torch import nn

import lamina
from lamina.nn import Int4WeightOnlyLinear, Int8WeightOnlyLinear
from lamina.quant import (
    dequantize_weight,
    dequantize_weight_groups,
    pack_nibbles,
    quantize_weight,
    quantize_weight_groups,
)
from lamina.reference.int8_linear import ACTIVATIONS

BOTH = [Int8WeightOnlyLinear, Int4WeightOnlyLinear]
SQNR = {Int8WeightOnlyLinear: INT8_LAYER_SQNR_DB, Int4WeightOnlyLinear: INT4_LAYER_SQNR_DB - 1}
CONFIG = {Int8WeightOnlyLinear: lamina.Int8WeightOnly(), Int4WeightOnlyLinear: lamina.Int4WeightOnly()}


@pytest.fixture(params=BOTH, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def linear():
    return nn.Linear(70, 30)


@pytest.fixture
def layer(kind, linear):
    return kind.from_float(linear)


def same_layer(a: nn.Module, b: nn.Module) -> None:
    assert type(a) is type(b)
    assert a.options() == b.options()
    ours, others = dict(a.named_buffers()), dict(b.named_buffers())
    assert list(ours) == list(others)
    for name, buffer in ours.items():
        assert_exact(buffer, others[name], name)
    for ours, others in zip(a.parameters(), b.parameters(), strict=True):
        assert_exact(ours.detach(), others.detach())


def test_is_a_linear(kind, layer, linear):
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (70, 30)
    x = torch.randn(7, 70)
    assert_lossy(layer(x), linear(x), min_sqnr_db=SQNR[kind])
    assert_lossy(layer(x), nn.functional.linear(x, layer.weight, layer.bias), min_sqnr_db=110)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_weight_is_the_dequantized_one(kind, layer, linear):
    if kind is Int8WeightOnlyLinear:
        expected = dequantize_weight(*quantize_weight(linear.weight))
    else:
        expected = dequantize_weight_groups(*quantize_weight_groups(linear.weight), 32)
    assert_exact(layer.weight.clone(), expected)
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(kind, linear, activation):
    x = torch.randn(7, 70)
    expected = ACTIVATIONS[activation](kind.from_float(linear)(x))
    assert_lossy(kind.from_float(linear, activation)(x), expected, min_sqnr_db=90)


def test_constructor_arguments(kind):
    layer = kind(6, 5, bias=False, dtype=torch.bfloat16, activation="silu")
    assert layer.bias is None
    assert layer(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    torch.manual_seed(4)
    fresh = kind(6, 5)
    torch.manual_seed(4)
    same_layer(fresh, kind.from_float(nn.Linear(6, 5)))
    with pytest.raises(ValueError, match=f"{kind.__name__}: activation 'softsign' is unknown; use one of none, relu"):
        kind(4, 4, activation="softsign")


def test_repr():
    linear = nn.Linear(64, 30)
    text = repr(Int8WeightOnlyLinear.from_float(linear, "gelu"))
    assert text == "Int8WeightOnlyLinear(in_features=64, out_features=30, bias=True, activation=gelu)"
    text = repr(Int4WeightOnlyLinear.from_float(linear, group_size=64))
    assert text == "Int4WeightOnlyLinear(in_features=64, out_features=30, bias=True, group_size=64)"


@pytest.mark.parametrize("group_size", [32, 64, 96, 4096])
def test_groups(linear, group_size):
    layer = Int4WeightOnlyLinear.from_float(linear, group_size=group_size)
    assert_exact(
        layer.weight.clone(), dequantize_weight_groups(*quantize_weight_groups(linear.weight, group_size), group_size)
    )
    assert layer.state_dict()["weight_scale"].shape == (30, -(-70 // group_size))
    torch.manual_seed(4)
    fresh = Int4WeightOnlyLinear(70, 30, group_size=group_size)
    torch.manual_seed(4)
    same_layer(fresh, Int4WeightOnlyLinear.from_float(nn.Linear(70, 30), group_size=group_size))


@pytest.mark.parametrize("group_size", [0, 16, 33, -32])
def test_refuses_other_groups(linear, group_size):
    for make in (
        lambda: Int4WeightOnlyLinear.from_float(linear, group_size=group_size),
        lambda: Int4WeightOnlyLinear(70, 30, group_size=group_size),
        lambda: lamina.Int4WeightOnly(group_size),
    ):
        with pytest.raises(ValueError, match=f"group_size is {group_size}, but must be a positive multiple of 32"):
            make()


def test_from_float_copies_and_keeps_the_mode(kind, linear):
    layer = kind.from_float(linear.eval())
    assert not layer.training
    before = layer.weight.clone()
    with torch.no_grad():
        linear.weight.zero_()
        layer.bias.zero_()
    assert_exact(layer.weight.clone(), before)
    assert linear.bias.abs().sum() > 0
    assert not any(p.requires_grad for p in layer.parameters())


def test_refuses_weights_that_are_not_finite(kind, linear):
    with torch.no_grad():
        linear.weight[11, 2] = float("nan")
    with pytest.raises(ValueError, match="output channel 11 has a NaN or infinite weight"):
        kind.from_float(linear)


def test_memory(kind):
    layer = kind.from_float(nn.Linear(768, 1024, bias=False))
    held = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
    saved = sum(t.nbytes for t in layer.state_dict().values())
    most = {Int8WeightOnlyLinear: 0.27, Int4WeightOnlyLinear: 0.15}[kind] * 4 * 768 * 1024
    assert held <= most
    assert saved <= most


# -- state_dict


def test_state_dict_is_independent_of_the_packing(kind, layer, linear):
    state = layer.state_dict()
    assert list(state) == ["bias", "weight", "weight_scale"]
    if kind is Int8WeightOnlyLinear:
        codes, scale = quantize_weight(linear.weight)
    else:
        codes, scale = quantize_weight_groups(linear.weight)
        codes = pack_nibbles(codes)
    assert_exact(state["weight"], codes)
    assert_exact(state["weight_scale"], scale)


def test_state_dict_round_trip(kind, layer, linear):
    for state in (copy.deepcopy(layer.state_dict()), linear.state_dict()):
        other = kind(70, 30)
        assert other.load_state_dict(state) == nn.modules.module._IncompatibleKeys([], [])
        same_layer(other, layer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(20, 30)}, r"size mismatch for weight: \[20, 30\] in the checkpoint, \[30, 70\]"),
        ({"weight": torch.zeros(30, 71, dtype=torch.uint8)}, r"size mismatch for weight: \[30, 71\]"),
        ({"weight_scale": torch.ones(29, 3)}, r"scale has shape \[29, 3\]"),
        ({"weight_scale": None}, "need.* scale"),
        ({"weight": torch.full((30, 70), float("nan"))}, "NaN or infinite weight"),
        ({"bias": torch.zeros(29)}, "size mismatch for bias"),
    ],
)
def test_a_damaged_state_dict_is_refused_and_the_weight_stays(kind, layer, change, message):
    state = {name: value for name, value in {**layer.state_dict(), **change}.items() if value is not None}
    other = kind(70, 30)
    before = copy.deepcopy(other)
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(state)
    if "bias" not in change:
        assert_exact(other.weight.clone(), before.weight.clone())


def test_an_int8_state_dict_is_no_int4_one(linear):
    state = Int8WeightOnlyLinear.from_float(nn.Linear(35, 30)).state_dict()
    with pytest.raises(
        RuntimeError, match=r"an int4 weight is saved as uint8, two codes a byte, but this is torch\.int8"
    ):
        Int4WeightOnlyLinear(70, 30).load_state_dict(state)


def test_save_and_load(kind, layer, linear, tmp_path):
    model = nn.Sequential(linear, nn.ReLU(), nn.Linear(30, 5))
    original = copy.deepcopy(model)
    lamina.swap_(model, CONFIG[kind])
    lamina.save(model, tmp_path / "m.safetensors")
    x = torch.randn(3, 70)
    for target in (copy.deepcopy(original), copy.deepcopy(model)):
        lamina.load_(target, tmp_path / "m.safetensors")
        assert type(target[0]) is kind
        assert_exact(target(x), model(x))
    # A float file into the swapped model: quantized on the way in.
    lamina.save(original, tmp_path / "float.safetensors")
    swapped = copy.deepcopy(model)
    with torch.no_grad():
        swapped[0].bias.zero_()
    lamina.load_(swapped, tmp_path / "float.safetensors")
    assert_exact(swapped(x), model(x))


def test_group_size_is_saved(linear, tmp_path):
    model = nn.Sequential(linear)
    original = copy.deepcopy(model)
    lamina.swap_(model, lamina.Int4WeightOnly(group_size=64))
    lamina.save(model, tmp_path / "m.safetensors")
    lamina.load_(original, tmp_path / "m.safetensors")
    same_layer(original[0], model[0])


# -- in models


def test_swap_takes_every_linear(kind):
    shared = nn.Linear(16, 16)
    model = nn.Sequential(nn.Linear(8, 16), shared, nn.ReLU(), shared, nn.Linear(16, 2).double())
    report = lamina.swap_(model, CONFIG[kind])
    assert [type(module) for module in model] == [kind, kind, nn.ReLU, kind, nn.Linear]
    assert model[1] is model[3]
    assert [d.fqn for d in report.swapped] == ["0", "1"]
    (left,) = report.left
    assert f"int{'4' if kind is Int4WeightOnlyLinear else '8'} kernels take float32 and bfloat16" in left.reason
    assert not lamina.swap_(model[:4], CONFIG[kind]).decisions


def test_swap_leaves_bad_weights_with_the_reason(kind, linear):
    model = nn.Sequential(linear)
    with torch.no_grad():
        linear.weight[3, 3] = float("inf")
    (left,) = lamina.swap_(model, CONFIG[kind]).left
    assert "output channel 3 has a NaN or infinite weight" in left.reason
    assert model[0] is linear


def test_accelerate_takes_the_config(kind):
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 8)).eval()
    x = torch.randn(1, 256)
    fast = lamina.accelerate(model, (x,), config=CONFIG[kind], min_speedup=0.0, max_error=1.0)
    assert_lossy(fast.model(x), model(x), min_sqnr_db=SQNR[kind] - 6)


def test_autocast_gives_a_dtype_that_fits(layer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = nn.Sequential(nn.Linear(20, 70), layer, nn.Linear(30, 2))
        assert mixed(torch.randn(3, 20)).dtype == torch.bfloat16


def test_deepcopy_and_conversions(kind, layer):
    x = torch.randn(2, 70)
    y = layer(x)
    other = copy.deepcopy(layer)
    same_layer(other, layer)
    other.to(torch.bfloat16).float()
    # The bias was rounded; nothing else.
    other.bias = layer.bias
    assert_exact(other(x), y)


# -- compile, export, gradients


def test_compile_in_one_graph(layer):
    x = torch.randn(5, 70, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_exact(compiled(x).detach(), layer(x).detach())
    assert_exact(compiled(x[:3]).detach(), layer(x[:3]).detach())
    compiled(x).sum().backward()
    ours, x.grad = x.grad, None
    layer(x).sum().backward()
    assert_exact(ours, x.grad)


def test_compiled_code_may_read_the_weight(layer):
    torch._dynamo.reset()
    x = torch.randn(5, 70)
    compiled = torch.compile(lambda x: nn.functional.linear(x, layer.weight), fullgraph=True, backend="aot_eager")
    assert_lossy(compiled(x), layer(x) - layer.bias, min_sqnr_db=100)


def test_export_with_any_batch(layer):
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(nn.Sequential(layer), (torch.randn(5, 70),), dynamic_shapes=[{0: batch}])
    for rows in (1, 13):
        x = torch.randn(rows, 70)
        assert_exact(exported.module()(x), layer(x))


def test_gradient_reaches_the_layers_before(layer):
    before = nn.Linear(8, 70)
    layer(before(torch.randn(3, 8))).square().sum().backward()
    assert before.weight.grad.abs().sum() > 0
    layer.bias.requires_grad_()
    layer(torch.randn(3, 70)).sum().backward()
    assert_exact(layer.bias.grad, torch.full((30,), 3.0))
