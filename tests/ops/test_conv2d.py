"""conv2d: the signature of torch's, what is fused behind it, and how exact Winograd is."""

import pytest
import torch
from tolerances import assert_composite, assert_exact
from torch.nn import functional as F

import lamina
from lamina.ops import conv2d
from lamina.ops.conv2d import _pool_sizes
from lamina.reference.conv2d import conv2d as reference

CONFIGURATIONS = [
    {"padding": 1},
    {"padding": "same"},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "stride": 2},
    {"padding": (2, 0), "stride": (1, 3), "dilation": (2, 1)},
    {"groups": 4, "padding": 1},
    {"groups": 8},
]


def tensors(groups=1, kernel=(3, 3), channels=8, outputs=16, dtype=torch.float32, generator=None):
    x = torch.randn(2, channels, 13, 11, generator=generator).to(dtype)
    weight = torch.randn(outputs, channels // groups, *kernel, generator=generator).to(dtype) / 8
    return x, weight, torch.randn(outputs, generator=generator).to(dtype)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)], ids=str)
def test_the_signature_is_torchs(options, kernel, generator):
    x, weight, bias = tensors(options.get("groups", 1), kernel, generator=generator)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), **options)
    for bias_or_none in (bias, None):
        expected = truth if bias_or_none is not None else truth - bias.double().view(1, -1, 1, 1)
        eager = F.conv2d(x, weight, bias_or_none, **options)
        assert_composite(conv2d(x, weight, bias_or_none, **options), eager, expected)
        assert_composite(conv2d(x[0], weight, bias_or_none, **options), eager[0], expected[0])


@pytest.mark.parametrize("channels", [64, 256])
def test_winograd_two_is_as_exact_as_torch_and_four_loses_a_digit_or_two(channels, isa, generator):
    x = torch.randn(1, channels, 14, 14, generator=generator)
    weight = torch.randn(channels, channels, 3, 3, generator=generator) / (3 * channels**0.5)
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    eager = F.conv2d(x, weight, padding=1)
    with lamina.force_isa(isa):
        default, four = conv2d(x, weight, padding=1), conv2d(x, weight, padding=1, winograd=4)
        assert_exact(default, conv2d(x, weight, padding=1, winograd=2))
    assert_composite(default, eager, truth, factor=3)
    assert_composite(four, eager, truth, factor=60)


@pytest.mark.parametrize("winograd", [2, 4])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_winograd_images_of_a_batch_are_those_alone(activation, winograd, isa, generator):
    """Tiles of all images are cut into blocks wherever a block ends; padding and residual stay those of an image."""
    x = torch.randn(7, 20, 9, 7, generator=generator).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(7, 40, 9, 7, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(40, 20, 3, 3, generator=generator)
    options = {"padding": 1, "activation": activation, "winograd": winograd}
    with lamina.force_isa(isa):
        together = conv2d(x, weight, residual=residual, **options)
        alone = [conv2d(x[i : i + 1], weight, residual=residual[i : i + 1], **options) for i in range(7)]
    assert_exact(together, torch.cat(alone))


@pytest.mark.parametrize("activation", [None, "relu", "hardswish", "gelu"])
@pytest.mark.parametrize("pool", [None, ("max", 2), ("avg", (3, 2), 1, (1, 0)), ("max", 3, 2, 1)], ids=str)
def test_gradients_are_torchs(activation, pool, generator):
    """Through everything that is fused, for all four tensors."""
    given = [*tensors(generator=generator), torch.randn(2, 16, 13, 11, generator=generator)]
    leaves = [t.clone().requires_grad_() for t in given]
    x, weight, bias, residual = leaves
    y = conv2d(x, weight, bias, padding=1, residual=residual, activation=activation, pool=pool)
    with torch.no_grad():
        plain = conv2d(*given[:3], padding=1, residual=given[3], activation=activation, pool=pool)
    torch.testing.assert_close(y, plain)
    grad = torch.randn(y.shape, generator=generator)
    y.backward(grad)
    exact = [t.double().requires_grad_() for t in given]
    sizes = () if pool is None else _pool_sizes(pool)[1]
    kind = "none" if pool is None else pool[0]
    steps = ((1, 1), (1, 1), (1, 1), 1)
    eager = [t.clone().requires_grad_() for t in given]
    reference(*eager, *steps, activation or "none", kind, sizes).backward(grad)
    reference(*exact, *steps, activation or "none", kind, sizes).backward(grad.double())
    for leaf, yardstick, right in zip(leaves, eager, exact, strict=True):
        assert_composite(leaf.grad, yardstick.grad, right.grad, factor=3)


def test_gradient_only_where_asked(generator):
    x, weight, bias = tensors(generator=generator)
    bias.requires_grad_()
    conv2d(x[0], weight, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((16,), 11.0 * 9.0))
    with torch.no_grad():
        assert not conv2d(x, weight, bias).requires_grad


def test_a_changed_weight_is_packed_anew(generator):
    x, weight, bias = tensors(channels=16, generator=generator)
    weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        for change in (
            lambda: weight.mul_(2.0),
            lambda: weight.data.add_(1.0),
            lambda: weight.data[8:].add_(1.0),
            lambda: setattr(weight, "data", torch.randn(weight.shape)),
        ):
            conv2d(x, weight, bias, padding=1)
            change()
            truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
            eager = F.conv2d(x, weight, bias, padding=1)
            assert_composite(conv2d(x, weight, bias, padding=1), eager, truth, factor=3)


@pytest.mark.parametrize("winograd", [0, 2, 4])
@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("of_weight", [False, True])
def test_layout_follows_torchs_rule(winograd, of_input, of_weight, generator):
    x, weight, bias = tensors(channels=16, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last) if of_input else x
    weight = weight.contiguous(memory_format=torch.channels_last) if of_weight else weight
    y = conv2d(x, weight, bias, padding=1, winograd=winograd)
    last = of_input or of_weight
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    plain = conv2d(x.contiguous(), weight.contiguous(), bias, padding=1, winograd=winograd)
    assert_exact(y.contiguous(), plain.contiguous())


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (2, 3)])
def test_nan_wins_in_a_maximum(place, isa):
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, place[0], place[1]] = float("nan")
    with lamina.force_isa(isa):
        y = conv2d(x, torch.ones(3, 1, 1, 1), pool=("max", 2))
    expected = torch.zeros(1, 3, 2, 2)
    expected[:, :, place[0] // 2, place[1] // 2] = float("nan")
    assert torch.equal(y.isnan(), expected.isnan())


def test_other_dtypes_and_autocast_are_torchs(generator):
    x, weight, bias = tensors(generator=generator)
    exact = conv2d(x.double(), weight.double(), bias.double(), padding=1, activation="relu", pool=("max", 2))
    assert exact.dtype is torch.float64
    torch.testing.assert_close(exact.float(), conv2d(x, weight, bias, padding=1, activation="relu", pool=("max", 2)))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d(x, weight, bias).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "input has 8 channels and weight is .* does not fit 3 groups"),
        ({"bias": torch.ones(5)}, r"bias has shape \[5\], but must be \[16\]"),
        ({"padding": "full"}, "padding 'full' is unknown; use 'same', 'valid' or numbers"),
        ({"padding": "same", "stride": 2}, r"padding 'same' goes with stride 1, but stride is \[2, 2\]"),
        ({"stride": 0}, "kernel, stride and dilation must be at least 1"),
        ({"dilation": 9}, r"smaller than the kernel's reach of \[19, 19\] after padding"),
        ({"activation": "swish"}, "activation 'swish' is unknown"),
        ({"pool": ("min", 2)}, "pool 'min' is unknown; use none, max or avg"),
        ({"pool": ("max", 20)}, "the pool's window of 20 is larger than its input of 11"),
        ({"pool": ("max", 2, 2, 2)}, "its padding at most half of the window"),
        ({"winograd": 3}, "winograd is 3, but must be 0, 2 or 4"),
        ({"winograd": 2, "stride": 2}, "winograd is for 3 x 3 kernels with stride 1, dilation 1 and one group"),
        ({"residual": torch.ones(2, 16, 3, 3)}, "residual"),
        ({"input": torch.ones(8, 8)}, r"input has shape \[8, 8\]"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input_is_refused_in_one_sentence(change, message, generator):
    x, weight, bias = tensors(generator=generator)
    arguments = {"input": x, "weight": weight, "bias": bias} | change
    with pytest.raises(ValueError, match=f"conv2d: .*{message}|{message}") as refused:
        conv2d(**arguments)
    assert "\n" not in str(refused.value)
