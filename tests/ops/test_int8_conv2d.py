"""int8_conv2d: exact sums, the ends of its epilogue, layouts, gradients, and what bad input gets."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_exact, assert_sum

import lamina
from lamina import _C
from lamina.ops import int8_conv2d, pack_int8_conv_weight, unpack_int8_conv_weight
from lamina.ops.int8_conv2d import four_paddings
from lamina.ops.int8_linear import ACTIVATIONS
from lamina.quant.weights import dequantize_weight
from lamina.reference.int8_conv2d import quantize_images
from lamina.reference.int8_linear import requantize

ONE = torch.tensor(1.0)


def codes_of(*shape: int, generator: torch.Generator, low: int = -127) -> torch.Tensor:
    return torch.randint(low, 128, shape, generator=generator, dtype=torch.int8)


def one_sentence(error: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(("int8_conv2d", "pack_int8_conv_weight"))


@pytest.fixture
def packed():
    return pack_int8_conv_weight(torch.randn(6, 5, 3, 3))


# -- integers


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_integer_sums_are_exact_on_every_isa(data):
    """Any window over codes, -128 among them: unit scales give the sums themselves, equal to int64's."""
    draw = data.draw
    groups, per_group, each = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    kernel = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    stride, dilation = (tuple(draw(st.integers(1, 3)) for _ in range(2)) for _ in range(2))
    padding = [draw(st.integers(0, 4)) for _ in range(4)]
    size = [d * (k - 1) + 1 + draw(st.integers(0, 8)) for k, d in zip(kernel, dilation, strict=True)]
    size = [max(1, size[0] - padding[0]), max(1, size[1] - padding[2])]
    if draw(st.booleans()) and groups > 1:
        per_group = each = 1  # depthwise
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = codes_of(draw(st.integers(1, 2)), groups * per_group, *size, generator=generator, low=-128)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    w = codes_of(groups * each, per_group, *kernel, generator=generator)
    top, bottom, left, right = padding
    padded = F.pad(x.double(), (left, right, top, bottom))
    expected = F.conv2d(padded, w.double(), None, stride, 0, dilation, groups).float()
    packed = pack_int8_conv_weight(w, torch.ones(len(w)), groups=groups)
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            out = torch.ops.lamina.int8_conv2d(
                x, *packed[:3], list(packed.size), None, stride, padding, dilation, groups, "none", x_scale=ONE
            )
        assert_exact(out.contiguous(), expected, isa)


@pytest.mark.parametrize(
    ("images", "size", "stride", "padding", "dilation"),
    [
        (8, (7, 7), 1, 1, 1),
        (4, (7, 2), 1, (1, 1), 1),
        (5, (1, 9), (1, 2), (1, 1), 1),
        (3, (14, 13), 2, (2, 1), 1),
        (4, (6, 5), 1, (0, 1), (2, 1)),
        (4, (6, 5), 1, (1, 2), 1),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_narrow_maps_are_the_same_on_every_isa(images, size, stride, padding, dilation, residual):
    """First and last columns of several images without the taps that see padding only."""
    generator = torch.Generator().manual_seed(0)
    x = codes_of(images, 12, *size, generator=generator, low=-128).contiguous(memory_format=torch.channels_last)
    packed = pack_int8_conv_weight(torch.randn(64, 12, 3, 3, generator=generator))
    scales = {"x_scale": torch.tensor(0.02), "out_scale": torch.tensor(0.5)}

    def call():
        return lamina.ops.int8_conv2d(x, packed, torch.arange(64) / 7, stride, padding, dilation, **scales)

    if residual:
        scales |= {"residual": codes_of(*call().shape, generator=generator), "residual_scale": torch.tensor(0.3)}
    bits_on_every_isa(call)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_depthwise_codes_are_the_same_on_every_isa(data):
    """Any kernel and stride, and channels around multiples of 16, 32 and 64."""
    draw = data.draw
    channels = draw(st.sampled_from([2, 3, 15, 16, 17, 32, 33, 40, 64, 65, 96, 112, 144]))
    kernel = draw(st.sampled_from([(3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (4, 2), (9, 9)]))
    stride = draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (2, 1), (3, 3)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)]))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(2))
    size = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 5, 7, 13, 60]))
    size = [max(s, d * (k - 1) + 1 - 2 * p) for s, d, k, p in zip(size, dilation, kernel, padding, strict=True)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    images = draw(st.integers(1, 3))
    x = codes_of(images, channels, *size, generator=generator, low=-128).contiguous(memory_format=torch.channels_last)
    packed = pack_int8_conv_weight(torch.randn(channels, 1, *kernel, generator=generator), groups=channels)
    scales = {"x_scale": torch.tensor(0.02) if draw(st.booleans()) else torch.rand(images, generator=generator) + 0.01}
    if draw(st.integers(0, 3)):
        scales["out_scale"] = torch.tensor(draw(st.sampled_from([0.02, 0.1, 1.0])))
    activation = draw(st.sampled_from([None, "relu", "relu6"]))
    bits_on_every_isa(
        lambda: lamina.ops.int8_conv2d(
            x, packed, torch.arange(channels) / 7, stride, padding, dilation, activation=activation, **scales
        )
    )


def bits_on_every_isa(call) -> None:
    """What is not finite among the bits, too."""
    with lamina.force_isa("generic"):
        expected = call()
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            got = call()
        same = got.view(torch.int16) == expected.view(torch.int16) if got.dtype is torch.bfloat16 else got == expected
        if got.dtype is torch.bfloat16:
            same |= got.isnan() & expected.isnan()
        assert same.all(), isa


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("channels", [32, 64, 96, 128, 200])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 7), (2, 29)])
def test_ends_have_the_same_bits_on_every_isa(size, channels, activation):
    """bfloat16 out, residuals of bfloat16 (with values that no code holds) and of int8, with both shapes of tiles."""
    g = torch.Generator().manual_seed(channels)
    x = codes_of(1, 12, *size, generator=g).contiguous(memory_format=torch.channels_last)
    packed = pack_int8_conv_weight(torch.randn(channels, 12, 1, 1, generator=g))
    bias = torch.randn(channels, generator=g)
    shape = (1, channels, *size)
    floats = (100 * torch.randn(shape, generator=g)).bfloat16().contiguous(memory_format=torch.channels_last)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, 3e38, -3e38)):
        floats[:, i] = value
    codes = codes_of(*shape, generator=g).contiguous(memory_format=torch.channels_last)
    scale, out_scale = torch.tensor(0.05), torch.tensor(0.7)

    def call(bias=bias, **ends):
        return lambda: int8_conv2d(x, packed, bias, activation=activation, x_scale=scale, **ends)

    bits_on_every_isa(call(out_dtype=torch.bfloat16))
    bits_on_every_isa(call(bias.clone().index_fill_(0, torch.tensor([3]), torch.nan), out_dtype=torch.bfloat16))
    bits_on_every_isa(call(residual=floats, out_scale=out_scale))
    bits_on_every_isa(call(residual=codes, residual_scale=out_scale, out_scale=out_scale))


@pytest.mark.parametrize("width", [1, 15, 16, 17, 47, 64])
def test_planes_of_three_channels_are_read_as_pixels(width, isa):
    g = torch.Generator().manual_seed(width)
    x = codes_of(2, 3, 5, width, generator=g)
    packed = pack_int8_conv_weight(torch.randn(8, 3, 3, 3, generator=g))
    with lamina.force_isa(isa):
        planes = int8_conv2d(x, packed, padding=1, x_scale=ONE)
        pixels = int8_conv2d(x.contiguous(memory_format=torch.channels_last), packed, padding=1, x_scale=ONE)
    assert_exact(planes.contiguous(), pixels.contiguous())


@pytest.mark.parametrize("groups", [1, 70])
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_do_not_saturate(sign, groups, isa):
    x = torch.full((1, 70, 6, 6), -128, dtype=torch.int8)
    w = torch.full((70, 70 // groups, 3, 3), 127 * sign, dtype=torch.int8)
    packed = pack_int8_conv_weight(w, torch.ones(70), groups=groups)
    with lamina.force_isa(isa):
        y = int8_conv2d(x, packed, padding=1, x_scale=ONE)
    expected = F.conv2d(x.double(), w.double(), padding=1, groups=groups)
    assert_exact(y.contiguous(), expected.float())


# Shapes that Winograd's filtering takes: ragged tiles and channels, threads that share panels and tiles, two bands.
WINOGRAD = [
    ((2, 100, 19, 23), 64, (1, 1, 1, 1)),
    ((1, 36, 33, 30), 32, (0, 2, 0, 1)),
    ((1, 68, 61, 63), 32, (1, 1, 1, 1)),
]


@pytest.mark.parametrize(("shape", "n", "padding"), WINOGRAD)
def test_winograd_is_the_direct_sum(shape, n, padding, generator):
    """All codes, to float and with everything in the epilogue. Its last number lets the compensation choose."""
    x, w = codes_of(*shape, generator=generator, low=-128), codes_of(n, shape[1], 3, 3, generator=generator)
    packed = pack_int8_conv_weight(w, torch.rand(n, generator=generator) / 1000)
    assert packed.compensation[-1] == 1
    direct = packed._replace(compensation=packed.compensation.clone())
    direct.compensation[-1] = 0

    def call(weight, bias=None, activation="none", **extras):
        sizes = list(packed.size), bias, [1, 1], padding, [1, 1], 1, activation
        return torch.ops.lamina.int8_conv2d(x, *weight[:3], *sizes, **extras)

    wide = call(direct, x_scale=ONE)
    extras = {"activation": "relu6", "residual": codes_of(*wide.shape, generator=generator), "residual_scale": ONE / 9}
    extras |= {"out_scale": ONE / 20, "x_scale": torch.rand(len(x), generator=generator)}
    codes = call(direct, wide[0, :, 0, 0], **extras)
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            assert_exact(call(packed, x_scale=ONE), wide, isa)
            assert_exact(call(packed, wide[0, :, 0, 0], **extras), codes, isa)


def test_winograd_leaves_sums_that_it_could_not_hold(isa):
    """Sums past 2^25: with the number in the compensation that allows it, it would be wrong, so it does run here."""
    x, w = torch.full((1, 240, 16, 16), -128, dtype=torch.int8), torch.full((32, 240, 3, 3), 127, dtype=torch.int8)
    packed = pack_int8_conv_weight(w, torch.ones(32))
    assert packed.compensation[-1] == 0
    expected = F.conv2d(x.double(), w.double(), padding=1).float()
    with lamina.force_isa(isa):
        assert_exact(int8_conv2d(x, packed, padding=1, x_scale=ONE).contiguous(), expected)
        packed.compensation[-1] = 1
        assert not torch.equal(int8_conv2d(x, packed, padding=1, x_scale=ONE), expected)


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("residual", [None, "int8", "float32"])
@pytest.mark.parametrize("groups", [1, 40])
def test_outputs_are_bit_equal_on_every_isa(groups, residual, activation, generator):
    x = torch.randn(2, 40, 9, 15, generator=generator)
    packed = pack_int8_conv_weight(torch.randn(40, 40 // groups, 3, 3, generator=generator), groups=groups)
    extras = {"activation": activation, "padding": 1, "x_scale": torch.tensor(0.03)}
    if residual is not None:
        extras["residual"] = torch.randn(2, 40, 9, 15, generator=generator)
    if residual == "int8":
        extras |= {"residual": codes_of(2, 40, 9, 15, generator=generator), "residual_scale": torch.tensor(0.07)}
    bias, found = torch.randn(40, generator=generator), []
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            found.append(
                (int8_conv2d(x, packed, bias, **extras), int8_conv2d(x, packed, bias, out_scale=ONE / 3, **extras))
            )
    for isa, both in zip(_C.available_isas(), found, strict=True):
        assert_exact(both, found[0], isa)


def test_an_int8_output_is_the_rounded_float_output(generator):
    """But for one code where 1 / out_scale in the scales moves a value over the middle of two."""
    x = torch.randn(2, 20, 9, 9, generator=generator)
    packed = pack_int8_conv_weight(torch.randn(33, 20, 3, 3, generator=generator))
    scale = torch.tensor(0.21)
    for activation in ("relu", "relu6", "silu", "hardswish", None):
        wide = requantize(int8_conv2d(x, packed, activation=activation), scale)
        codes = int8_conv2d(x, packed, activation=activation, out_scale=scale)
        assert (codes.int() - wide.int()).abs().max() <= 1
        assert (codes == wide).float().mean() > 0.999
    assert codes.min() == -127
    assert codes.max() == 127


def test_outputs_beyond_int32_are_clamped(isa):
    """Where the scaled sums pass what a conversion to int32 takes, the epilogue does not fold."""
    x = torch.tensor([100, 0, -100], dtype=torch.int8).reshape(1, 1, 1, 3).expand(1, 4, 1, 3)
    for weight, groups in ((torch.ones(40, 4, 1, 1), 1), (torch.ones(4, 1, 1, 1), 4)):
        packed = pack_int8_conv_weight(weight, groups=groups)
        with lamina.force_isa(isa):
            codes = int8_conv2d(x, packed, x_scale=torch.tensor(1e30), out_scale=torch.tensor(1e-5))
        assert codes[0, :, 0].unique(dim=0).tolist() == [[127, 0, -127]]


def test_codes_flow_from_layer_to_layer(isa, generator):
    """Two layers without a float tensor between them: the same as quantizing it with that static scale."""
    x = torch.randn(2, 12, 8, 8, generator=generator)
    first, second = (
        pack_int8_conv_weight(torch.randn(n, c, 3, 3, generator=generator)) for n, c in ((40, 12), (9, 40))
    )
    scale = torch.tensor(0.25)
    with lamina.force_isa(isa):
        codes = int8_conv2d(x, first, padding=1, activation="relu", out_scale=scale)
        assert_exact(quantize_images(int8_conv2d(x, first, padding=1, activation="relu"), scale)[0], codes)
        wide = int8_conv2d(codes.float() * scale, second, padding=1, x_scale=scale)
        assert_exact(int8_conv2d(codes, second, padding=1, x_scale=scale), wide)


# -- images


def test_what_else_is_in_the_batch_changes_nothing(generator):
    x = torch.randn(4, 6, 7, 7, generator=generator) * torch.tensor([1.0, 50.0, 1e-3, 1e30]).reshape(4, 1, 1, 1)
    packed = pack_int8_conv_weight(torch.randn(20, 6, 3, 3, generator=generator))
    for extras in ({}, {"out_scale": torch.tensor(0.5)}, {"residual": torch.randn(4, 20, 5, 5, generator=generator)}):
        together = int8_conv2d(x, packed, **extras)
        for i in range(4):
            alone = {k: v[i : i + 1] if k == "residual" else v for k, v in extras.items()}
            assert_exact(together[i : i + 1], int8_conv2d(x[i : i + 1], packed, **alone))


@pytest.mark.parametrize("x_scale", [None, 0.05])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_with_nan_or_infinity_is_nan(bad, x_scale, isa, generator):
    x = torch.randn(3, 6, 7, 7, generator=generator)
    packed = pack_int8_conv_weight(torch.randn(20, 6, 3, 3, generator=generator))
    scale = None if x_scale is None else torch.tensor(x_scale)
    with lamina.force_isa(isa):
        good = int8_conv2d(x, packed, x_scale=scale)
        x[1, 3, 4, 5] = bad
        y = int8_conv2d(x, packed, x_scale=scale)
        codes = int8_conv2d(x, packed, x_scale=scale, activation="relu", out_scale=torch.tensor(0.1))
    assert y[1].isnan().all()
    assert_exact(y[[0, 2]], good[[0, 2]])
    assert (codes[1] == -127).all()


def test_images_of_zeros_and_of_tiny_values(generator):
    packed = pack_int8_conv_weight(torch.randn(20, 6, 3, 3, generator=generator))
    bias = torch.randn(20, generator=generator)
    x = torch.stack([torch.zeros(6, 5, 5), torch.full((6, 5, 5), 1e-37)])
    assert_exact(int8_conv2d(x, packed, bias).contiguous(), bias[:, None, None].expand(2, 20, 3, 3).contiguous())


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_channels_first_and_last_are_the_same(dtype, groups, isa, generator):
    x = (20 * torch.randn(2, 6, 9, 11, generator=generator)).to(dtype)
    packed = pack_int8_conv_weight(torch.randn(6, 6 // groups, 3, 3, generator=generator), groups=groups)
    with lamina.force_isa(isa):
        first, last = (
            int8_conv2d(x.contiguous(memory_format=form), packed, padding=1, x_scale=ONE)
            for form in (torch.contiguous_format, torch.channels_last)
        )
    assert_exact(first, last)
    for y in (first, last):
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0, 5, 8, 8), (0, 5, 3, 3)])
def test_a_batch_of_no_images(shape, packed):
    y = int8_conv2d(torch.ones(shape), packed, out_scale=ONE)
    assert y.shape == (0, 6, shape[2] - 2, shape[3] - 2)
    assert y.dtype == torch.int8


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("padding", ["same", "valid", 2, (1, 2), [0, 3]])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 2)])
def test_padding_is_torchs(padding, kernel, generator):
    x = codes_of(2, 5, 9, 8, generator=generator)
    w = codes_of(6, 5, *kernel, generator=generator)
    y = int8_conv2d(x, pack_int8_conv_weight(w, torch.ones(6)), padding=padding, dilation=(1, 2), x_scale=ONE)
    expected = F.conv2d(x.double(), w.double(), padding=padding, dilation=(1, 2))
    assert_exact(y.contiguous(), expected.float())


def test_four_paddings_in_words():
    with pytest.raises(ValueError, match="padding 'same' goes with stride 1, not \\(2, 1\\)"):
        four_paddings("same", (3, 3), (2, 1), (1, 1))
    with pytest.raises(ValueError, match="padding 'reflect' is unknown; use 'same', 'valid' or numbers"):
        four_paddings("reflect", (3, 3), (1, 1), (1, 1))


def test_output_and_residual_may_be_slices_of_channels(packed, generator):
    """As where branches are concatenated: each writes its own channels."""
    x = torch.randn(2, 5, 7, 7, generator=generator)
    whole, out = (torch.full((2, 20, 5, 5), 7.0).contiguous(memory_format=torch.channels_last) for _ in range(2))
    whole[:, 4:10] = torch.randn(2, 6, 5, 5, generator=generator)
    _C.int8_conv2d(
        *(x, *packed[:3], list(packed.size), None, [1, 1], [0, 0, 0, 0], [1, 1], 1, "relu"),
        *(whole[:, 4:10], None, None, None, out[:, 3:9]),
    )
    expected = int8_conv2d(x, packed, residual=whole[:, 4:10].clone(), activation="relu")
    assert_exact(out[:, 3:9].contiguous(), expected.contiguous())
    out[:, 3:9] = 7.0
    assert (out == 7.0).all()


# -- packing


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [(12, 1, 3, 3), (3, 1, 5, 2), (33, 5, 1, 1), (51, 3, 2, 7)])
def test_unpacking_gives_the_codes_back(size, groups, generator):
    codes = codes_of(*size, generator=generator)
    packed = pack_int8_conv_weight(codes, torch.ones(size[0]), groups=groups)
    assert_exact(unpack_int8_conv_weight(packed), codes)


def test_packing_refuses_what_it_cannot_hold():
    weight = torch.zeros(4, 2, 3, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"weight has shape \[4, 2\], but must be"):
        pack_int8_conv_weight(torch.ones(4, 2))
    with pytest.raises(ValueError, match="an int8 weight needs its scale"):
        pack_int8_conv_weight(weight)
    with pytest.raises(ValueError, match="scale goes with an int8 weight"):
        pack_int8_conv_weight(weight.float(), torch.ones(4))
    with pytest.raises(ValueError, match="groups is 3, but must be positive and divide the 4 output channels"):
        pack_int8_conv_weight(weight, torch.ones(4), groups=3)
    with pytest.raises(ValueError, match=r"scale\[1\] is inf, but must be finite"):
        pack_int8_conv_weight(weight, torch.tensor([1.0, float("inf"), 1.0, 1.0]))
    with pytest.raises(ValueError, match="output channel 2 has a NaN or infinite weight"):
        pack_int8_conv_weight(weight.float().index_fill(0, torch.tensor(2), float("nan")))
    weight[3, 1, 2, 0] = -128
    with pytest.raises(ValueError, match="output channel 3 holds -128"):
        pack_int8_conv_weight(weight, torch.ones(4))
    with pytest.raises(
        ValueError, match="an output adds up 132105 products, but int32 sums are exact only up to 132104"
    ):
        pack_int8_conv_weight(torch.zeros(1, 132105, 1, 1, dtype=torch.int8), torch.ones(1))
    with pytest.raises(ValueError, match="the kernel is 0 x 3, but must have taps"):
        pack_int8_conv_weight(torch.zeros(1, 2, 0, 3, dtype=torch.int8), torch.ones(1))


# -- the straight-through gradient


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish"])
@pytest.mark.parametrize("unbatched", [False, True])
def test_gradients_are_those_of_the_dequantized_layer(unbatched, activation, generator):
    x = torch.randn(2, 6, 7, 8, generator=generator).requires_grad_()
    bias = torch.randn(9, generator=generator).requires_grad_()
    residual = torch.randn(2, 9, 4, 8, generator=generator).requires_grad_()
    packed = pack_int8_conv_weight(torch.randn(9, 2, 3, 3, generator=generator), groups=3)
    grad = torch.randn(2, 9, 4, 8, generator=generator)
    geometry = {"stride": (2, 1), "padding": 1, "x_scale": torch.tensor(0.02)}
    pick = (lambda t: t[0]) if unbatched else (lambda t: t)
    y = int8_conv2d(pick(x), packed, bias, activation=activation, residual=pick(residual), **geometry)
    y.backward(pick(grad))
    before = int8_conv2d(pick(x).detach(), packed, bias.detach(), residual=pick(residual).detach(), **geometry)
    plain = ACTIVATIONS[activation](pick(grad), before)
    assert_exact(pick(residual.grad), plain)
    flat = plain if not unbatched else plain.unsqueeze(0)
    assert_sum(bias.grad, flat.double().sum((0, 2, 3)), terms=64, magnitude=flat.double().abs().sum((0, 2, 3)))
    weight = dequantize_weight(unpack_int8_conv_weight(packed), packed.scale).double()
    exact, size = (
        torch.nn.grad.conv2d_input(
            x.shape if not unbatched else (1, *x.shape[1:]), of(weight), of(flat.double()), (2, 1), 1, 1, 3
        )
        for of in (lambda t: t, torch.abs)
    )
    found = x.grad if not unbatched else x.grad[:1]
    assert_sum(found, exact, terms=27, magnitude=size, extra=torch.finfo(torch.float32).eps * size)


def test_an_int8_output_has_no_gradient(packed):
    assert not int8_conv2d(torch.ones(1, 5, 4, 4, requires_grad=True), packed, out_scale=ONE).requires_grad


# -- what bad input gets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(1, 4, 5, 5)}, "x has 4 channels, but packed_weight was packed for 5"),
        ({"x": torch.ones(5, 5)}, r"x has shape \[5, 5\], but must be \[images, channels, height, width\]"),
        ({"x": torch.ones(1, 5, 2, 5)}, "the padded input has 2 rows, but the kernel covers 3"),
        ({"x": torch.ones(1, 5, 5, 0)}, "the padded input has 0 columns, but the kernel covers 3"),
        ({"dilation": 3}, "the padded input has 5 rows, but the kernel covers 7"),
        ({"x": torch.ones(1, 5, 5, 5).double()}, "x is float64, but must be float32 or bfloat16"),
        ({"x": torch.ones(1, 5, 5, 5).to(torch.uint8)}, "x is uint8, but must be float32 or bfloat16"),
        ({"x": torch.ones(1, 5, 5, 5).to(torch.int8)}, "x is int8, but x_scale, which says what its codes mean"),
        ({"stride": 0}, r"stride is \[0, 0\], but must be two positive numbers"),
        ({"stride": (1, 2, 3)}, r"stride is \(1, 2, 3\), but must be one or two numbers"),
        ({"padding": -1}, r"padding is \[-1, -1, -1, -1\], but must be"),
        ({"padding": "full"}, "padding 'full' is unknown"),
        ({"activation": "softsign"}, "activation 'softsign' is unknown; use none, relu"),
        ({"bias": torch.ones(5)}, r"bias has shape \[5\], but must be \[6\]"),
        ({"residual": torch.ones(1, 6, 5, 5)}, r"residual has shape \[1, 6, 5, 5\], but must be \[1, 6, 3, 3\]"),
        ({"residual": torch.ones(1, 6, 3, 3).double()}, "residual is float64, but must be float32 or bfloat16 or int8"),
        (
            {"residual": torch.ones(1, 6, 3, 3, dtype=torch.int8)},
            "a residual of int8, and only that, goes with residual_s",
        ),
        ({"residual": torch.ones(1, 6, 3, 3), "residual_scale": ONE}, "a residual of int8, and only that, goes with"),
        ({"residual_scale": ONE}, "residual_scale goes with a residual of int8"),
        ({"x_scale": torch.tensor(0.0)}, "x_scale is 0, but must be finite and at least 1e-36"),
        ({"x_scale": torch.tensor(float("inf"))}, "x_scale is inf, but must be finite"),
        ({"x_scale": torch.tensor(3e38)}, r"x_scale 3e\+38 times the weight scale .* of output channel 0 is too large"),
        ({"out_scale": torch.tensor(float("nan"))}, "out_scale is nan, but must be finite"),
        ({"out_scale": ONE, "out_dtype": torch.float32}, "out_dtype torch.float32 goes with a float output"),
        ({"out_dtype": torch.float16}, "out is float16, but must be float32 or bfloat16"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_refuses_in_one_sentence(changes, message):
    packed = pack_int8_conv_weight(torch.full((6, 5, 3, 3), 1000.0))
    arguments = {"x": torch.ones(1, 5, 5, 5), "packed_weight": packed} | changes
    with pytest.raises(ValueError, match=f"int8_conv2d: {message}") as error:
        int8_conv2d(**arguments)
    one_sentence(error)


def test_a_weight_of_another_size_is_refused(packed):
    x = torch.ones(1, 5, 5, 5)
    for change in (
        {"data": packed.data[:-1]},
        {"compensation": packed.compensation[:-1]},
        {"scale": packed.scale[:-1]},
    ):
        with pytest.raises(ValueError, match=f"int8_conv2d: packed_weight.{next(iter(change))} has shape"):
            int8_conv2d(x, packed._replace(**change))


def test_the_scales_of_an_image_each(packed, generator):
    x, scales = quantize_images(torch.randn(3, 5, 6, 6, generator=generator))
    together = int8_conv2d(x, packed, x_scale=scales)
    for i in range(3):
        assert_exact(together[i], int8_conv2d(x[i], packed, x_scale=scales[i]))
    with pytest.raises(ValueError, match=r"int8_conv2d: x_scale has shape \[2\], but must be \[3\]"):
        int8_conv2d(x, packed, x_scale=scales[:2])
