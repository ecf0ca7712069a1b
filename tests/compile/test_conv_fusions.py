"""What convolutions take in, and int8 codes from layer to layer, on the smallest modules that have the pattern."""

import copy
from collections import Counter

import pytest
import torch
from test_fusions import EVERY, Of
from tolerances import INT8_LAYER_SQNR_DB, assert_composite, assert_exact, assert_lossy
from torch import nn
from torch.nn import functional as F

import lamina
from lamina.compile import compile_

# Two roundings of a tensor where eager has one: its residual, or what a concatenation rescales.
_ROUNDED_TWICE_DB = INT8_LAYER_SQNR_DB - 3


def trained(*channels: int) -> list[nn.BatchNorm2d]:
    """Batch norms with statistics and parameters of every kind: negative, zero, small and large factors."""
    made = []
    for n in channels:
        norm = nn.BatchNorm2d(n, eps=1e-3)
        with torch.no_grad():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 4.0)
            norm.weight.normal_()
            norm.bias.normal_()
            norm.weight[0] = 0.0
        made.append(norm)
    return made


def compiled(module: nn.Module, *inputs: torch.Tensor, options=EVERY):
    """The result of a compiled copy, and what was fused."""
    copied = copy.deepcopy(module).eval()
    report = compile_(copied, inputs, options=options)
    with torch.no_grad():
        return copied(*inputs), report


def check(module: nn.Module, *inputs: torch.Tensor) -> Counter[str]:
    module.eval()
    actual, report = compiled(module, *inputs)
    with torch.no_grad():
        eager = module(*inputs)
        truth = copy.deepcopy(module).double()(*(t.double() for t in inputs))
    assert actual.stride() == eager.stride()
    # Winograd's sums have a few roundings more than direct ones.
    assert_composite(actual, eager, truth, factor=4.0)
    return report.fused


IMAGES = (2, 5, 13, 11)

FLOAT = {
    "norm": (
        lambda m, x: m.norm(m.conv(x)),
        {"conv": nn.Conv2d(5, 20, 3, bias=False), "norm": trained(20)[0]},
        {"conv + batch_norm": 1, "conv": 1},
    ),
    "norm, activation, pool": (
        lambda m, x: F.max_pool2d(m.norm(m.conv(x)).relu_(), 3, 2, 1),
        {"conv": nn.Conv2d(5, 20, 3, padding="same"), "norm": trained(20)[0]},
        {"conv + batch_norm": 1, "conv + relu + max pool": 1, "in-place activation": 1},
    ),
    "activation behind its pool": (
        lambda m, x: F.relu(F.max_pool2d(m.conv(x), 2)),
        {"conv": nn.Conv2d(5, 20, 5)},
        {"activation before its pool": 1, "conv + relu + max pool": 1},
    ),
    "average": (
        lambda m, x: F.avg_pool2d(F.hardswish(m.conv(x)), 2),
        {"conv": nn.Conv2d(5, 16, 1)},
        {"conv + hardswish + avg pool": 1},
    ),
    "depthwise": (
        lambda m, x: F.relu6(m.norm(m.conv(x))),
        {"conv": nn.Conv2d(5, 5, 3, stride=2, groups=5, bias=False), "norm": trained(5)[0]},
        {"conv + batch_norm": 1, "conv + relu6": 1},
    ),
    "zeros around it": (
        lambda m, x: F.relu(m.norm(m.conv(F.pad(x, (0, 1, 2, 1))))),
        {"conv": nn.Conv2d(5, 20, 3, stride=2, padding=1), "norm": trained(20)[0]},
        {"conv + batch_norm": 1, "pad + conv + relu": 1},
    ),
    "other numbers around it": (
        lambda m, x: m.conv(F.pad(x, (0, 1), value=2.0)) + m.conv(F.pad(x, (1, 1, 0, 0), "reflect"))[..., 1:],
        {"conv": nn.Conv2d(5, 20, 3)},
        {"conv": 2},
    ),
    "less than there was": (
        lambda m, x: m.conv(F.pad(x, (0, -1))),
        {"conv": nn.Conv2d(5, 20, 3)},
        {"conv": 1},
    ),
    "zeros that others see": (
        lambda m, x: m.conv(y := F.pad(x, (1, 0))) + y.mean(),
        {"conv": nn.Conv2d(5, 20, 3)},
        {"conv": 1},
    ),
    "view of what is channels_last now": (
        lambda m, x: m.head(F.relu(m.conv(x)).view(x.shape[0], -1)),
        {"conv": nn.Conv2d(5, 4, 3), "head": nn.Linear(4 * 11 * 9, 30)},
        {"conv + relu": 1, "linear on a packed copy of its weight": 1},
    ),
}


@pytest.mark.parametrize("name", FLOAT)
def test_float_chain(name):
    function, layers, fused = FLOAT[name]
    assert check(Of(function, **layers), torch.randn(IMAGES)) == fused


@pytest.mark.parametrize("config", ["dynamic", "static"])
def test_zeros_around_a_convolution_in_int8(config):
    module = Of(lambda m, x: m.conv(F.pad(x, (0, 1, 2, 1))), conv=nn.Conv2d(5, 20, 3, padding=1)).eval()
    x = torch.randn(IMAGES)
    lamina.swap_(module, lamina.Int8Dynamic() if config == "dynamic" else lamina.Int8Static([(x,)]))
    actual, report = compiled(module, x)
    assert report.fused["pad + conv"] == 1
    with torch.no_grad():
        assert torch.equal(actual, module(x))


def residual(m, x):
    y = F.relu(m.norm1(m.conv1(x)), inplace=True)
    y = m.norm2(m.conv2(y))
    y += m.norm3(m.shortcut(x))
    return F.relu(y)


def residual_block() -> Of:
    """Two convolutions and a shortcut, each with a batch norm."""
    convs = {
        "conv1": nn.Conv2d(5, 24, 3, 2, 1),
        "conv2": nn.Conv2d(24, 24, 3, padding=1),
        "shortcut": nn.Conv2d(5, 24, 1, 2),
    }
    return Of(residual, **convs, **dict(zip(("norm1", "norm2", "norm3"), trained(24, 24, 24), strict=True)))


def test_residual_block():
    fused = check(residual_block(), torch.randn(IMAGES))
    names = ("conv + batch_norm", "conv + relu", "conv", "conv + residual + relu")
    assert [fused[name] for name in names] == [3, 1, 1, 1]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.norm(m.conv(x)) + m.conv(x), None),
        (lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)), "no convolution in front of it that it could join"),
        (lambda m, x: m.conv(m.before(x)), "no convolution in front of it that it could join"),
        (lambda m, x: m.norm(F.relu(m.conv(x))), "no convolution in front of it that it could join"),
        (lambda m, x: F.batch_norm(m.conv(x), None, None, training=True), "it computes its statistics at each call"),
    ],
    ids=["conv used twice", "sum used twice", "in front", "activation between", "training"],
)
def test_batch_norm_that_stays(function, reason):
    layers = {"conv": nn.Conv2d(5, 5, 3, padding=1), "norm": trained(5)[0], "before": trained(5)[0]}
    _, report = compiled(Of(function, **layers), torch.randn(IMAGES))
    left = {why for graph in report.graphs for what, why, _ in graph.eager if "norm" in what}
    assert left == ({reason} if reason else set())


def test_folded_weights_follow_their_parts():
    module, x = (
        Of(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(5, 7, 3), norm=trained(7)[0]).eval(),
        torch.randn(IMAGES),
    )
    with torch.no_grad():
        run = torch.compile(module, backend="lamina", options=EVERY)
        run(x)
        module.norm.running_mean.add_(1.0)
        module.conv.weight.mul_(2.0)
        torch.testing.assert_close(run(x), module(x))


def test_torchs_convolution_stays_where_it_is_faster(monkeypatch):
    monkeypatch.setattr("lamina.compile.choose.fastest", lambda key, candidates: "torch")
    module = Of(lambda m, x: F.relu(m.norm(m.conv(x))), conv=nn.Conv2d(5, 7, 3), norm=trained(7)[0])
    actual, report = compiled(module, torch.randn(IMAGES), options={})
    assert report.fused == {"conv + batch_norm": 1}
    assert actual.shape == (2, 7, 11, 9)


# -- int8


def calibrated(module: nn.Module, *inputs: torch.Tensor, config=lamina.Int8Static) -> nn.Module:
    report = lamina.swap_(module.eval(), config([inputs]))
    assert not report.left
    return module


def chain(m, x):
    y = F.relu(m.norm1(m.conv1(x)))
    y = F.max_pool2d(F.relu6(m.norm2(m.conv2(y))), 3, 2, 1)
    return m.head(F.adaptive_avg_pool2d(F.relu(m.conv3(y)), 2).flatten(1))


def test_codes_from_the_first_layer_to_the_head():
    """Each layer writes the codes that the next one would have made of its floats: the same ones but for ties."""
    layers = {"conv1": nn.Conv2d(5, 20, 3), "conv2": nn.Conv2d(20, 20, 3, groups=20), "conv3": nn.Conv2d(20, 33, 1)}
    norms = dict(zip(("norm1", "norm2"), trained(20, 20), strict=True))
    x = torch.randn(IMAGES)
    module = calibrated(Of(chain, **layers, **norms, head=nn.Linear(33 * 4, 10)), x)
    actual, report = compiled(module, x)
    # conv3 writes floats: what only a mean reads has no steps.
    assert report.fused["int8_conv2d writes codes"] == 2
    assert [what for what, _, _ in report.graphs[0].eager] == ["adaptive_avg_pool2d"]
    with torch.no_grad():
        assert_lossy(actual, module(x), min_sqnr_db=INT8_LAYER_SQNR_DB + 3)


def test_codes_through_a_residual_block():
    def forward(m, x):
        y = m.stem(x)
        for block in (m.first, m.second):
            y = block(y)
        return m.last(y)

    x = torch.randn(2, 3, 14, 10)
    first, second = residual_block(), residual_block()
    second.shortcut, second.conv1 = nn.Conv2d(24, 24, 1, 2), nn.Conv2d(24, 24, 3, 2, 1)
    module = calibrated(
        Of(forward, stem=nn.Conv2d(3, 5, 3, padding=1), first=first, second=second, last=nn.Conv2d(24, 6, 1)), x
    )
    actual, report = compiled(module, x)
    assert report.fused["int8_conv2d writes codes"] == 5  # all but the last, and the two shortcuts
    assert report.eager == 0
    with torch.no_grad():
        assert_lossy(actual, module(x), min_sqnr_db=_ROUNDED_TWICE_DB)


def test_codes_through_concatenations_and_transposed_convolutions():
    """A U-Net's level: what is skipped has its own steps for one layer and is rescaled for the concatenation."""

    def forward(m, x):
        skipped = F.relu(m.enter(x))
        y = F.relu(m.down(F.max_pool2d(skipped, 2)))
        return m.leave(torch.cat([F.pad(m.up(y), (0, 1, 0, 0)), skipped], 1))

    layers = {
        "enter": nn.Conv2d(3, 8, 3, padding=1),
        "down": nn.Conv2d(8, 16, 3, padding=1),
        "up": nn.ConvTranspose2d(16, 8, 2, stride=2),
        "leave": nn.Conv2d(16, 4, 3),
    }
    x = torch.randn(2, 3, 12, 11)
    with torch.no_grad():
        layers["up"].weight.mul_(4.0)
    module = calibrated(Of(forward, **layers), x)
    actual, report = compiled(module, x)
    assert report.fused["int8_conv2d writes codes"] == 3
    with torch.no_grad():
        assert_lossy(actual, module(x), min_sqnr_db=_ROUNDED_TWICE_DB)


def test_means_of_codes():
    def forward(m, x):
        y = F.relu(m.conv(x))
        return m.other(y), F.avg_pool2d(y, 2), y.mean((2, 3)), m.head(y.mean((-1, -2), keepdim=True).flatten(1))

    layers = {"conv": nn.Conv2d(3, 8, 3), "other": nn.Conv2d(8, 8, 3), "head": nn.Linear(8, 5)}
    x = torch.randn(2, 3, 14, 10)
    module = calibrated(Of(forward, **layers), x)
    actual, report = compiled(module, x)
    assert report.fused["int8_conv2d writes codes"] == 1
    assert report.eager == 0
    with torch.no_grad():
        for ours, eager in zip(actual, module(x), strict=True):
            assert_lossy(ours, eager, min_sqnr_db=_ROUNDED_TWICE_DB)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (lambda y: m.second(y) + y.sigmoid())(m.first(x)),
        lambda m, x: (lambda y: (m.second(y), y))(m.first(x)),
        lambda m, x: m.second(torch.sigmoid(m.first(x))),
        lambda m, x: m.second(torch.cat([m.first(x), x[:, :, 1:-1, 1:-1]], 1)[:, :5]),
    ],
    ids=["used in float", "returned", "operation between", "concatenated with floats"],
)
def test_what_is_used_in_float_stays_float(function):
    layers = {"first": nn.Conv2d(5, 5, 3), "second": nn.Conv2d(5, 5, 3, padding=1)}
    x = torch.randn(IMAGES)
    module = calibrated(Of(function, **layers), x)
    actual, report = compiled(module, x)
    assert "int8_conv2d writes codes" not in report.fused
    with torch.no_grad():
        eager = module(x)
    for ours, theirs in zip(actual, eager, strict=True) if isinstance(eager, tuple) else [(actual, eager)]:
        assert_lossy(ours, theirs, min_sqnr_db=INT8_LAYER_SQNR_DB + 3)


def test_static_linear_layers_hand_on_codes():
    x = torch.randn(9, 24)
    module = calibrated(nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 7)), x)
    actual, report = compiled(module, x)
    assert report.fused == {"linear + gelu": 1, "int8_linear writes codes": 1}
    with torch.no_grad():
        assert_lossy(actual, module(x), min_sqnr_db=INT8_LAYER_SQNR_DB + 3)


def test_dynamic_layers_take_in_what_follows():
    module = residual_block().eval()
    lamina.swap_(module, lamina.Int8Dynamic())
    x = torch.randn(IMAGES)
    actual, report = compiled(module, x)
    assert (report.fused["conv + batch_norm"], report.fused["conv + residual + relu"]) == (3, 1)
    with torch.no_grad():
        assert_lossy(actual, module(x), min_sqnr_db=INT8_LAYER_SQNR_DB)


def test_a_loaded_model_gives_the_same_bits(tmp_path):
    """Saved after calibration and loaded into the float model, as layers and compiled."""
    original, x = residual_block().eval(), torch.randn(IMAGES)
    module = calibrated(copy.deepcopy(original), x)
    lamina.save(module, tmp_path / "calibrated.safetensors")
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.zero_()
        lamina.load_(original, tmp_path / "calibrated.safetensors")
        assert_exact(original(x), module(x))
        assert_exact(compiled(original, x)[0], compiled(module, x)[0])


def test_other_sizes_and_scales():
    x = torch.randn(IMAGES)
    layers = {"conv1": nn.Conv2d(5, 20, 3), "conv2": nn.Conv2d(20, 20, 3)}
    module = calibrated(Of(lambda m, x: m.conv2(F.relu(m.conv1(x))), **layers), x)
    run = torch.compile(module, backend="lamina", options=EVERY)
    with torch.no_grad():
        for shape in (IMAGES, (1, 5, 9, 9), (3, 5, 16, 12)):
            images = torch.randn(shape)
            assert_lossy(run(images), module(images), min_sqnr_db=INT8_LAYER_SQNR_DB)
        module.conv2.input_scale.mul_(2.0)  # the codes in front of it follow
        assert_lossy(run(x), module(x), min_sqnr_db=INT8_LAYER_SQNR_DB)
