"""Int8Conv1d, Int8Conv2d, Int8ConvTranspose2d: drop-in for torch's, every argument honoured, saved and loaded."""

import copy
import re

import pytest
import torch
from tolerances import INT8_LAYER_SQNR_DB, assert_exact, assert_lossy
from torch import nn

import lamina
from lamina.nn import Int8Conv1d, Int8Conv2d, Int8ConvTranspose2d

KINDS = {nn.Conv1d: Int8Conv1d, nn.Conv2d: Int8Conv2d, nn.ConvTranspose2d: Int8ConvTranspose2d}

# Every argument of the three, some of them together.
LAYERS = {
    "plain": lambda: nn.Conv2d(12, 20, 3),
    "numbers": lambda: nn.Conv2d(12, 20, 3, 2, 1, 2, 4, False),
    "pairs": lambda: nn.Conv2d(12, 20, (3, 2), (1, 2), (2, 1), (2, 1)),
    "same": lambda: nn.Conv2d(12, 20, (3, 5), padding="same"),
    "valid": lambda: nn.Conv2d(12, 20, 1, padding="valid"),
    "depthwise": lambda: nn.Conv2d(12, 12, 5, padding=2, groups=12),
    "multiplied": lambda: nn.Conv2d(12, 36, 3, padding=1, groups=12),
    **{mode: lambda mode=mode: nn.Conv2d(12, 20, 3, padding=2, padding_mode=mode) for mode in ("reflect", "circular")},
    "replicate-same": lambda: nn.Conv2d(12, 20, 3, padding="same", padding_mode="replicate"),
    "1d": lambda: nn.Conv1d(12, 20, 4, stride=2, padding=3, dilation=2, groups=2),
    "1d-same": lambda: nn.Conv1d(12, 20, 3, padding="same", padding_mode="reflect"),
    "transpose": lambda: nn.ConvTranspose2d(12, 20, 2, stride=2),
    "transpose-all": lambda: nn.ConvTranspose2d(12, 20, (4, 3), (2, 3), (1, 2), (1, 0), 4, dilation=(1, 2)),
    "transpose-unstrided": lambda: nn.ConvTranspose2d(12, 20, 3, padding=1, dilation=2, bias=False),
}
layers = pytest.mark.parametrize("name", LAYERS)


def x_for(layer: nn.Module, generator: torch.Generator) -> torch.Tensor:
    return (
        torch.randn(2, 12, 21, generator=generator)
        if layer.kernel_size[1:] == ()
        else torch.randn(2, 12, 11, 14, generator=generator)
    )


def made(name: str) -> nn.Module:
    torch.manual_seed(1)
    return LAYERS[name]()


def int8_of(layer: nn.Module, *args, **kwargs) -> nn.Module:
    return KINDS[type(layer)].from_float(layer, *args, **kwargs)


@layers
@pytest.mark.parametrize("static", [False, True])
def test_takes_the_place_of_the_float_layer(name, static, generator):
    layer = made(name)
    x = x_for(layer, generator)
    ours = int8_of(layer, input_scale=x.abs().max() / 127 if static else None)
    assert isinstance(ours, type(layer))
    for form in (x, x[0]) if layer.padding_mode == "zeros" else (x,):
        assert_lossy(ours(form), layer(form), min_sqnr_db=INT8_LAYER_SQNR_DB - 1)
    if name == "transpose":
        size = [length + 1 for length in layer(x).shape[2:]]
        assert ours(x, output_size=size).shape == layer(x, output_size=size).shape


@layers
def test_state_dict_and_constructor(name, generator):
    layer = made(name)
    x = x_for(layer, generator)
    ours = int8_of(layer, "relu", input_scale=0.03, out_dtype="bfloat16")
    state = ours.state_dict()
    assert state["weight"].dtype == torch.int8
    assert state["weight"].shape == layer.weight.shape == ours.weight.shape
    assert (ours.weight - layer.weight).abs().max() <= layer.weight.abs().max() / 253
    other = type(ours)(**lamina.nn.int8_conv.conv_arguments_of(layer), **ours.options())
    other.load_state_dict(state)
    assert_exact(other(x), ours(x))
    assert repr(other) == repr(ours)
    # The float state_dict is quantized when it is loaded, and makes the layer dynamic again.
    ours.load_state_dict(layer.state_dict())
    assert_exact(ours(x), int8_of(layer, "relu", out_dtype="bfloat16")(x))


def test_batch_norm_is_folded(generator):
    conv, norm = nn.Conv2d(12, 20, 3, bias=False), nn.BatchNorm2d(20)
    for tensor in (norm.running_mean, norm.bias, norm.weight):
        tensor.data.normal_(generator=generator)
    norm.running_var.uniform_(0.5, 2, generator=generator)
    x = torch.randn(2, 12, 9, 9, generator=generator)
    ours = Int8Conv2d.from_float(conv, "relu", batch_norm=norm)
    assert ours.training
    assert_lossy(ours(x), norm.eval()(conv(x)).relu(), min_sqnr_db=INT8_LAYER_SQNR_DB - 1)
    up = nn.ConvTranspose2d(12, 20, 2, stride=2)
    ours = Int8ConvTranspose2d.from_float(up, batch_norm=norm)
    assert_lossy(ours(x), norm(up(x)), min_sqnr_db=INT8_LAYER_SQNR_DB - 1)


def test_compiles_with_its_weight_read(generator):
    for name in ("plain", "multiplied", "transpose-all"):
        layer = int8_of(made(name))
        x = x_for(layer, generator)

        def run(x, layer=layer):
            return layer(x.to(layer.weight.dtype)), layer.weight * 1

        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert_exact(compiled(x), run(x))


def test_no_memory_of_floats_and_no_training():
    layer = nn.Conv2d(64, 64, 3)
    ours = Int8Conv2d.from_float(layer)
    held = sum(t.nbytes for t in (*ours.buffers(), *ours.parameters()))
    assert held < 0.3 * layer.weight.nbytes
    assert not any(p.requires_grad for p in ours.parameters())
    assert ours.to(torch.bfloat16)._scale.dtype == torch.float32
    assert ours.weight.dtype == torch.bfloat16
    copied = copy.deepcopy(ours)
    assert_exact(copied._packed, ours._packed)


@pytest.mark.parametrize("scale", [0.0, float("nan"), [1.0, 2.0]])
def test_refuses_a_bad_input_scale(scale):
    with pytest.raises(ValueError, match=r"Int8Conv2d: input_scale (is|has shape)"):
        Int8Conv2d.from_float(nn.Conv2d(1, 1, 1), input_scale=torch.tensor(scale))
    with pytest.raises(ValueError, match="Int8Conv2d: activation 'softsign' is unknown"):
        Int8Conv2d.from_float(nn.Conv2d(1, 1, 1), "softsign")
    with pytest.raises(ValueError, match=r"Int8Conv2d: out_dtype is torch\.int8"):
        Int8Conv2d.from_float(nn.Conv2d(1, 1, 1), out_dtype=torch.int8)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 1), nn.Conv1d(3, 4, 1), nn.Linear(3, 4)], ids=str)
def test_scales_whose_product_overflows_leave_the_layer_alone(layer):
    """A dynamic scale is only known at the call, which then gives infinities as the float layer does."""
    x = torch.full((1, 3, 3, 3)[: 4 if isinstance(layer, nn.Conv2d) else 3], 1e21)
    with torch.no_grad():
        layer.weight.fill_(1e22)
    reason = r"input_scale 7\.87402e\+18 times the largest weight scale 7\.87402e\+19 is too large for float32$"
    (left,) = lamina.swap_(nn.Sequential(layer), lamina.Int8Static([(x,)])).left
    assert re.search(reason, left.reason), left.reason
    model = nn.Sequential(layer)
    expected = model(x)
    lamina.swap_(model, lamina.Int8Dynamic())
    assert_exact(model(x), expected)
    assert expected.isinf().all()


def test_the_same_bits_on_every_isa_and_any_number_of_threads(generator):
    model, x = small_net(), torch.randn(3, 3, 8, 8, generator=generator)
    for config in (lamina.Int8Static([(x,)]), lamina.Int8Dynamic()):
        fast, found = copy.deepcopy(model), []
        lamina.swap_(fast, config)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)  # conftest.py puts it back
            for isa in lamina._C.available_isas():
                with lamina.force_isa(isa), torch.no_grad():
                    found.append((isa, threads, fast(x)))
        for isa, threads, output in found:
            assert_exact(output, found[0][2], f"{isa}, {threads} threads")


def small_net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        *(nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(2), nn.Conv1d(4, 2, 3), nn.Flatten(), nn.Linear(508, 5)),
    )


@pytest.mark.parametrize("static", [False, True])
def test_swap_save_and_load(static, tmp_path, generator):
    model, batches = small_net(), [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(3)]
    config = lamina.Int8Static([(x,) for x in batches]) if static else lamina.Int8Dynamic()
    fast = copy.deepcopy(model)
    report = lamina.swap_(fast, config)
    assert [d.now.split("(")[0] for d in report.swapped] == [
        *("Int8Conv2d", "Int8Conv2d", "Int8ConvTranspose2d", "Int8Conv1d", "Int8Linear")
    ]
    assert report.swapped[0].was == "Conv2d(3, 8, 3x3)"
    assert (fast[0].input_scale is not None) == static
    assert_lossy(fast(batches[0]), model(batches[0]), min_sqnr_db=28)
    lamina.save(fast, tmp_path / "m.safetensors")
    for other in (small_net(), copy.deepcopy(fast)):
        lamina.load_(other, tmp_path / "m.safetensors")
        assert_exact(other(batches[0]), fast(batches[0]))
    assert lamina.swap_(fast, lamina.Int8Dynamic()).decisions == ()


def test_swap_takes_subclasses_that_compute_the_same():
    """A constructor of their own changes nothing; a method or an attribute may."""

    class Square(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 3, padding=1)

    class Twice(Square):
        def forward(self, x):
            return 2 * super().forward(x)

    class Scaled(Square):
        scale = 2

    class Masked(Square):
        def __init__(self, channels):
            super().__init__(channels)
            self.register_buffer("mask", torch.ones(3, 3))

    class Named(Square):
        def __init__(self, channels):
            super().__init__(channels)
            self.name = "first"

    x = torch.randn(1, 4, 5, 5)
    for config, least in ((lamina.Int8Dynamic(), INT8_LAYER_SQNR_DB - 1), (lamina.FusedConv(), 100)):
        model = nn.Sequential(Square(4), Twice(4), Scaled(4), Masked(4), Named(4))
        expected = model[0](x)
        report = lamina.swap_(model, config)
        assert [d.fqn for d in report.swapped] == ["0"]
        assert [d.reason.split()[0] for d in report.left] == ["Twice", "Scaled", "Masked", "Named"]
        assert_lossy(model[0](x), expected, min_sqnr_db=least)


def test_swap_leaves_what_it_cannot_take():
    class Special(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    model = nn.Sequential(Special(2, 2, 1), nn.Conv2d(2, 2, 1).half(), nn.Conv2d(2, 2, 1), nn.Conv3d(1, 1, 1))
    model[2].weight.data[1] = float("nan")
    reasons = [d.reason for d in lamina.swap_(model, lamina.Int8Dynamic()).left]
    assert reasons == [
        "Special is a subclass of nn.Conv2d and may compute something else",
        "the weight is torch.float16, and int8 kernels take float32 and bfloat16",
        "quantize_weight: output channel 1 has a NaN or infinite weight",
    ]


def test_calibration_of_another_shape_is_an_error_of_the_model():
    model = small_net()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="channels"):
        lamina.swap_(model, lamina.Int8Static([(torch.ones(2, 4, 8, 8),)]))
    assert repr(model) == repr(before)
