"""lamina.nn.Int8Linear: a Linear in everything but its bytes."""

import copy
import io
import sys

import pytest
import torch
from tolerances import INT8_LAYER_SQNR_DB, assert_exact, assert_lossy
from torch import nn

import lamina
from lamina.nn import Int8Linear
from lamina.quant import dequantize_weight, quantize_weight

ACTIVATIONS = {
    None: nn.Identity(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
}


@pytest.fixture
def linear():
    return nn.Linear(20, 30)


@pytest.fixture
def layer(linear):
    return Int8Linear.from_float(linear)


def same_layer(a: Int8Linear, b: Int8Linear) -> None:
    for name in ("_packed", "_scale", "_compensation"):
        assert_exact(getattr(a, name), getattr(b, name), name)
    assert (a.bias is None) == (b.bias is None)
    if a.bias is not None:
        assert_exact(a.bias.detach(), b.bias.detach())
    assert (a.activation, a.in_features, a.out_features) == (b.activation, b.in_features, b.out_features)


def test_is_a_linear(layer, linear):
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (20, 30)
    x = torch.randn(7, 20)
    assert_lossy(layer(x), linear(x), min_sqnr_db=INT8_LAYER_SQNR_DB)
    assert_lossy(layer(x), nn.functional.linear(x, layer.weight, layer.bias), min_sqnr_db=INT8_LAYER_SQNR_DB)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(linear, activation):
    layer, x = Int8Linear.from_float(linear, activation), torch.randn(7, 20)
    assert_lossy(layer(x), ACTIVATIONS[activation](linear(x)), min_sqnr_db=INT8_LAYER_SQNR_DB - 3)
    assert_lossy(layer(x), ACTIVATIONS[activation](Int8Linear.from_float(linear)(x)), min_sqnr_db=90)


def test_constructor_arguments():
    layer = Int8Linear(6, 5, bias=False, dtype=torch.bfloat16, activation="silu")
    assert layer.bias is None
    assert layer.activation == "silu"
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert Int8Linear(6, 5, dtype=torch.bfloat16).bias.dtype == torch.bfloat16
    assert Int8Linear(6, 5, True, "cpu", torch.float32).bias.dtype == torch.float32
    torch.manual_seed(4)
    fresh = Int8Linear(6, 5)
    torch.manual_seed(4)
    same_layer(fresh, Int8Linear.from_float(nn.Linear(6, 5)))


@pytest.mark.parametrize("activation", ["tanhh", "GELU", "", 3])
def test_refuses_unknown_activations(activation, linear):
    with pytest.raises(ValueError, match=f"Int8Linear: activation '{activation}' is unknown; use one of none, relu"):
        Int8Linear(4, 4, activation=activation)
    with pytest.raises(ValueError, match=f"activation '{activation}' is unknown"):
        Int8Linear.from_float(linear, activation)


def test_repr(linear):
    assert repr(Int8Linear.from_float(linear)) == "Int8Linear(in_features=20, out_features=30, bias=True)"
    text = repr(Int8Linear.from_float(linear, "gelu"))
    assert text == "Int8Linear(in_features=20, out_features=30, bias=True, activation=gelu)"


@pytest.mark.parametrize("training", [True, False])
def test_from_float_keeps_the_mode(linear, training):
    assert Int8Linear.from_float(linear.train(training)).training == training


def test_from_float_copies(linear):
    layer = Int8Linear.from_float(linear)
    weight, bias, scale = linear.weight.detach().clone(), linear.bias.detach().clone(), layer.weight.clone()
    with torch.no_grad():
        layer.bias.zero_()
    assert_exact(linear.bias.detach(), bias)
    with torch.no_grad():
        linear.weight.zero_()
    assert_exact(layer.weight, scale)
    assert weight.abs().sum() > 0


def test_from_float_of_a_layer_that_needs_gradients(linear):
    layer = Int8Linear.from_float(linear)
    assert not any(p.requires_grad for p in layer.parameters())
    assert linear.weight.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_from_float_refuses_weights_that_are_not_finite(linear, bad):
    with torch.no_grad():
        linear.weight[11, 2] = bad
    with pytest.raises(ValueError, match="output channel 11 has a NaN or infinite weight"):
        Int8Linear.from_float(linear)


@pytest.mark.parametrize("shape", [(20,), (0, 20), (1, 20), (2, 3, 20), (2, 1, 4, 20)])
def test_input_shapes(layer, linear, shape):
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == linear(x).shape
    assert y.dtype == x.dtype


@pytest.mark.parametrize("features", [0, 1, 17, 18, 19, 21, 24])
def test_refuses_other_numbers_of_features(layer, features):
    """Like nn.Linear; also the sizes that share their padding to a multiple of four with 18 or 20."""
    for made in (layer, Int8Linear(18, 3)):
        if made.in_features != features:
            with pytest.raises(ValueError, match="features"):
                made(torch.randn(2, features))


def test_what_is_known_of_the_weight_costs_no_values(layer, monkeypatch):
    """T5 asks for its weight's dtype on every call."""
    module = sys.modules["lamina.nn.packed_linear"]
    monkeypatch.setattr(module, "unpack_int8_weight", lambda *args: pytest.fail("the weight was computed"))
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, weight.shape) == (torch.float32, torch.device("cpu"), (30, 20))
    assert (weight.ndim, weight.dim(), weight.size(1), weight.numel(), len(weight)) == (2, 2, 20, 600, 30)
    assert weight.is_floating_point()
    assert not weight.requires_grad


def test_the_weight_is_an_ordinary_tensor_to_everything_else(layer):
    weight, plain, x = layer.weight, layer.weight.clone(), torch.randn(3, 20)
    assert type(plain) is torch.Tensor
    assert_exact(nn.functional.linear(x, weight), nn.functional.linear(x, plain))
    assert_exact(torch.stack([weight, plain])[0], plain)
    assert_exact(copy.deepcopy(weight), plain)
    assert weight.tolist() == plain.tolist()
    assert weight.data_ptr() != 0
    assert repr(weight) == repr(plain)
    assert_exact(torch._C._nn.linear(x, weight), nn.functional.linear(x, plain))


@pytest.mark.parametrize("bias", [True, False])
def test_the_weight_has_the_dtype_the_float_one_would_have(bias):
    layer = Int8Linear.from_float(nn.Linear(20, 30, bias=bias).bfloat16())
    assert layer.weight.dtype == layer.weight.clone().dtype == torch.bfloat16
    assert layer.float().weight.dtype == torch.float32


def test_reading_the_weights_dtype_breaks_no_graph(layer):
    def model(x):
        return layer(x.to(layer.weight.dtype))

    x = torch.randn(3, 20)
    torch._dynamo.reset()
    assert_exact(torch.compile(model, backend="eager", fullgraph=True)(x), layer(x))

    def reads(x):
        return x @ layer.weight.t()

    assert_exact(torch.compile(reads, backend="eager", fullgraph=True)(x), reads(x))


def test_weight_is_the_dequantized_one(layer, linear):
    assert layer.weight.dtype == torch.float32
    assert_exact(layer.weight, dequantize_weight(*quantize_weight(linear.weight)))
    assert_lossy(layer.weight, linear.weight, min_sqnr_db=INT8_LAYER_SQNR_DB)


# -- state_dict


def test_state_dict_is_independent_of_the_packing(layer, linear):
    state = layer.state_dict()
    assert list(state) == ["bias", "weight", "weight_scale"]
    codes, scale = quantize_weight(linear.weight)
    assert_exact(state["weight"], codes)
    assert_exact(state["weight_scale"], scale)
    assert_exact(state["bias"], linear.bias.detach())


def test_state_dict_round_trip(layer):
    other = Int8Linear(20, 30)
    assert other.load_state_dict(copy.deepcopy(layer.state_dict())) == nn.modules.module._IncompatibleKeys([], [])
    same_layer(other, layer)


def test_loading_a_float_state_dict(layer, linear):
    """The checkpoint of the original model fits: it is quantized on the way in."""
    other = Int8Linear(20, 30)
    other.load_state_dict(linear.state_dict())
    same_layer(other, layer)


def test_state_dict_inside_a_model(linear):
    model = nn.Sequential(linear, nn.ReLU(), nn.Linear(30, 4))
    swapped = copy.deepcopy(model)
    lamina.swap_(swapped, lamina.Int8Dynamic())
    assert set(swapped.state_dict()) == {f"{i}.{n}" for i in (0, 2) for n in ("weight", "weight_scale", "bias")}
    x = torch.randn(3, 20)
    y = swapped(x)
    fresh = nn.Sequential(Int8Linear(20, 30), nn.ReLU(), Int8Linear(30, 4))
    fresh.load_state_dict(swapped.state_dict())
    assert_exact(fresh(x), y)
    fresh.load_state_dict(model.state_dict())
    assert_exact(fresh(x), y)


@pytest.mark.parametrize("strict", [True, False])
def test_missing_and_surplus_keys(layer, strict):
    state = layer.state_dict()
    del state["weight"], state["weight_scale"]
    state["extra"] = torch.zeros(1)
    other = Int8Linear(20, 30)
    if strict:
        with pytest.raises(RuntimeError, match=r"Missing key.*weight.*\n.*Unexpected key.*extra"):
            other.load_state_dict(state)
    else:
        keys = other.load_state_dict(state, strict=False)
        assert (keys.missing_keys, keys.unexpected_keys) == (["weight"], ["extra"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(30, 21, dtype=torch.int8)}, r"size mismatch for weight: \[30, 21\] in the checkpoint"),
        ({"weight": torch.zeros(20, 30)}, "size mismatch for weight"),
        ({"weight_scale": torch.ones(29)}, r"scale has shape \[29\]"),
        ({"weight_scale": torch.full((30,), float("nan"))}, "must be finite"),
        ({"weight_scale": None}, "an int8 weight needs its scale"),
        ({"weight": torch.full((30, 20), -128, dtype=torch.int8)}, "must lie in"),
        ({"weight": torch.full((30, 20), float("nan"))}, "NaN or infinite weight"),
        ({"weight": torch.zeros(30, 20, dtype=torch.int32)}, "must be int8"),
        ({"bias": torch.zeros(29)}, "size mismatch for bias"),
    ],
)
def test_a_damaged_state_dict_is_refused_and_the_weight_stays(layer, change, message):
    state = {name: value for name, value in {**layer.state_dict(), **change}.items() if value is not None}
    other = Int8Linear(20, 30)
    before = copy.deepcopy(other)
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(state)
    for name in ("_packed", "_scale", "_compensation"):
        if "bias" not in change:
            assert_exact(getattr(other, name), getattr(before, name))


def test_loading_does_not_alias_the_checkpoint(layer):
    state = layer.state_dict()
    other = Int8Linear(20, 30)
    other.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    assert other.weight.abs().sum() > 0


def test_torch_save_of_a_state_dict(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = Int8Linear(20, 30)
    other.load_state_dict(torch.load(file, weights_only=True))
    same_layer(other, layer)


# -- copies, devices, dtypes


def test_deepcopy(layer):
    other = copy.deepcopy(layer)
    same_layer(other, layer)
    assert other._packed.data_ptr() != layer._packed.data_ptr()
    x = torch.randn(2, 20)
    assert_exact(other(x), layer(x))


def test_a_whole_module_survives_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    same_layer(torch.load(file, weights_only=False), layer)


def test_to_bfloat16_keeps_the_scales(layer):
    """.to(dtype) is about activations: scales in bfloat16 would cost three digits."""
    before, x = layer.weight.clone(), torch.randn(5, 20)
    y = layer(x)
    same = layer.to(torch.bfloat16)
    assert same is layer
    assert layer._scale.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    assert_exact(layer.weight, before.bfloat16())
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert_lossy(layer(x.bfloat16()), y, min_sqnr_db=INT8_LAYER_SQNR_DB)
    layer.float()
    assert layer._scale.dtype == torch.float32
    assert layer.bias.dtype == torch.float32


@pytest.mark.parametrize("convert", ["half", "double", "bfloat16"])
def test_conversions_leave_the_scales_float32(layer, convert):
    before = layer._scale.clone()
    getattr(layer, convert)()
    assert_exact(layer._scale, before)
    assert layer._packed.dtype == torch.int8


@pytest.mark.parametrize(("k", "n"), [(768, 768), (768, 3072), (3072, 768), (1000, 1001)])
def test_memory(k, n):
    """One copy of the weight, in memory and on disk; after a call as well."""
    floats, layer = nn.Linear(k, n), Int8Linear(k, n)
    layer(torch.randn(3, k))
    size = sum(t.nbytes for t in floats.parameters())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors_of(layer)}
    assert sum(storages.values()) <= 0.27 * size
    assert "_packed" not in layer.state_dict()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert file.tell() <= 0.27 * size


def _tensors_of(layer: nn.Module):
    """Everything the layer holds, registered or not."""
    return [t for t in [*layer.parameters(), *layer.buffers(), *vars(layer).values()] if isinstance(t, torch.Tensor)]


# -- static input scale and output dtype


def test_input_scale_is_static(linear):
    scale = torch.tensor(0.02)
    layer = Int8Linear.from_float(linear, input_scale=scale)
    assert Int8Linear.from_float(linear).input_scale is None
    x = torch.randn(7, 20)
    assert_exact(layer(x), lamina.ops.int8_linear(x, layer.packed_weight, layer.bias, x_scale=scale))
    assert_lossy(layer(x.clamp(-2.5, 2.5)), linear(x.clamp(-2.5, 2.5)), min_sqnr_db=INT8_LAYER_SQNR_DB - 3)
    assert_exact(
        layer(x * 1000),
        lamina.ops.int8_linear((x * 1000).clamp(-2.54, 2.54), layer.packed_weight, layer.bias, x_scale=scale),
    )
    scale.fill_(1.0)
    assert layer.input_scale.item() == pytest.approx(0.02)
    assert "input_scale=0.02" in repr(layer)
    assert Int8Linear.from_float(linear, input_scale=0.02).input_scale.shape == ()


def test_input_scale_is_in_the_state_dict(linear):
    static, dynamic = Int8Linear.from_float(linear, input_scale=0.02), Int8Linear.from_float(linear)
    assert list(static.state_dict()) == ["bias", "input_scale", "weight", "weight_scale"]
    fresh = Int8Linear(20, 30)
    assert fresh.load_state_dict(static.state_dict()) == nn.modules.module._IncompatibleKeys([], [])
    assert_exact(fresh.input_scale, static.input_scale)
    assert fresh.input_scale.data_ptr() != static.input_scale.data_ptr()
    x = torch.randn(3, 20)
    assert_exact(fresh(x), static(x))
    # And back: a scale belongs to its weight.
    fresh.load_state_dict(dynamic.state_dict())
    assert fresh.input_scale is None
    assert_exact(fresh(x), dynamic(x))


@pytest.mark.parametrize("convert", ["half", "double", "bfloat16"])
def test_conversions_leave_the_input_scale_float32(linear, convert):
    layer = getattr(Int8Linear.from_float(linear, input_scale=0.02), convert)()
    assert_exact(layer.input_scale, torch.tensor(0.02))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_an_input_scale_that_is_not_positive(linear, layer, scale):
    with pytest.raises(ValueError, match=r"Int8Linear: input_scale is .*, but must be finite and at least 1e-36"):
        Int8Linear.from_float(linear, input_scale=scale)
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=r"input_scale is .*, but must be finite"):
        layer.load_state_dict({**layer.state_dict(), "input_scale": torch.tensor(scale)})
    same_layer(layer, before)
    assert layer.input_scale is None


def test_refuses_an_input_scale_per_channel(linear):
    with pytest.raises(ValueError, match=r"Int8Linear: input_scale has shape \[20\], but must be a scalar"):
        Int8Linear.from_float(linear, input_scale=torch.ones(20))


def test_out_dtype(linear):
    x = torch.randn(3, 20)
    layer = Int8Linear.from_float(linear, out_dtype=torch.bfloat16)
    assert_exact(layer(x), Int8Linear.from_float(linear)(x).bfloat16())
    assert Int8Linear(4, 4, out_dtype="float32")(torch.randn(2, 4).bfloat16()).dtype == torch.float32
    assert layer.options() == {"activation": None, "out_dtype": "bfloat16"}
    assert "out_dtype=torch.bfloat16" in repr(layer)
    for wrong in (torch.float64, "int8", "no such"):
        with pytest.raises(ValueError, match=r"Int8Linear: out_dtype is .*, but must be None, torch.float32 or"):
            Int8Linear(4, 4, out_dtype=wrong)


def test_a_static_layer_survives_lamina_save(linear, tmp_path):
    model = nn.Sequential(Int8Linear.from_float(linear, "relu", input_scale=0.02, out_dtype=torch.bfloat16))
    lamina.save(model, tmp_path / "m.safetensors")
    fresh = nn.Sequential(nn.Linear(20, 30))
    lamina.load_(fresh, tmp_path / "m.safetensors")
    x = torch.randn(3, 20)
    assert_exact(fresh(x), model(x))


# -- compile, export, gradients


def test_compile_in_one_graph(layer):
    x = torch.randn(5, 20)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_exact(compiled(x), layer(x))
    assert_exact(compiled(x[:3]), layer(x[:3]))


def test_compile_with_gradients(layer):
    x = torch.randn(5, 20, requires_grad=True)
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    compiled, x.grad = x.grad, None
    layer(x).sum().backward()
    assert_exact(compiled, x.grad)


def test_export_with_any_batch(layer):
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(nn.Sequential(layer), (torch.randn(5, 20),), dynamic_shapes=[{0: batch}])
    for rows in (1, 5, 13):
        x = torch.randn(rows, 20)
        assert_exact(exported.module()(x), layer(x))


def test_gradient_reaches_the_layers_before(layer):
    """A frozen int8 layer in the middle of a model that trains."""
    before = nn.Linear(8, 20)
    layer(before(torch.randn(3, 8))).square().sum().backward()
    assert before.weight.grad.abs().sum() > 0


def test_bias_trains_when_asked(layer):
    layer.bias.requires_grad_()
    layer(torch.randn(3, 20)).sum().backward()
    assert_exact(layer.bias.grad, torch.full((30,), 3.0))


def test_autocast_gives_its_dtype(layer, linear):
    """nn.Linear gives bfloat16 under autocast; a drop-in must fit between layers that do."""
    x = torch.randn(3, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = nn.Sequential(linear, nn.ReLU(), Int8Linear(30, 4), nn.Linear(4, 2))
        assert mixed(x).dtype == torch.bfloat16
        assert layer(x).dtype in (torch.float32, torch.bfloat16)


def test_functional_call(layer):
    x = torch.randn(3, 20)
    y = torch.func.functional_call(layer, {"bias": torch.zeros(30)}, (x,))
    assert_lossy(y, layer(x) - layer.bias, min_sqnr_db=100)
