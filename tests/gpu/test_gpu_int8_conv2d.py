"""int8_conv2d on a GPU: sums, and all that is exact behind them, are the bits of the CPU."""

import pytest
import torch
from tolerances import assert_activation, assert_exact, assert_lossy, assert_rounded

from lamina.ops import (
    PackedInt8ConvWeight,
    int8_conv1d,
    int8_conv2d,
    int8_conv_transpose2d,
    move_int8_conv_weight,
    pack_int8_conv_transpose_weight,
    pack_int8_conv_weight,
    unpack_int8_conv_weight,
)
from lamina.ops.int8_conv2d import four_paddings, plain_int8_conv_weight, traced_conv_weight
from lamina.ops.library import CPU_IMPLEMENTATIONS
from lamina.reference.int8_linear import ACTIVATIONS

BF16 = torch.bfloat16
cpu = CPU_IMPLEMENTATIONS[torch.ops.lamina.int8_conv2d.default]


def weights(size, device: str, groups: int = 1):
    """One weight, as the CPU and as the GPU takes it."""
    packed = pack_int8_conv_weight(torch.randn(size), groups=groups)
    plain = plain_int8_conv_weight(unpack_int8_conv_weight(packed), packed.scale, groups)
    return packed, PackedInt8ConvWeight(*(t.to(device) for t in plain[:3]), *plain[3:])


def on_cpu(x, packed, bias=None, stride=1, padding=0, dilation=1, activation="none", **others):
    def here(t):
        return t.cpu() if isinstance(t, torch.Tensor) else t

    def pair(value):
        return [value, value] if isinstance(value, int) else list(value)

    data, scale, compensation, size, groups = packed
    stride, dilation = pair(stride), pair(dilation)
    padding = list(four_paddings(padding, size[2:], stride, dilation))
    names = "residual", "residual_scale", "x_scale", "out_scale", "out_dtype"
    ends = [here(others.get(name)) for name in names]
    return cpu(
        here(x), data, scale, compensation, list(size), here(bias), stride, padding, dilation, groups, activation, *ends
    )


def check(x, pair, bias=None, stride=1, padding=0, dilation=1, activation="none", **others):
    packed, plain = pair
    y = int8_conv2d(x, plain, bias, stride, padding, dilation, activation=activation, **others)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_exact(y.cpu(), on_cpu(x, packed, bias, stride, padding, dilation, activation, **others))
    return y


# The weight's size, groups, and the geometry: channels that are runs of 16 bytes or not, whole blocks or not, sums that
# are shared, groups, one filter for each channel, windows that reach over the edges or leave columns out.
CASES = [
    ((20, 16, 3, 3), 1, {"padding": 1}),
    ((40, 3, 5, 3), 1, {"stride": 2, "padding": (2, 1)}),
    ((8, 64, 1, 1), 1, {}),
    ((12, 48, 2, 2), 1, {"dilation": 2, "padding": 2}),
    ((6, 5, 3, 3), 2, {"padding": 1}),
    ((33, 16, 3, 3), 3, {"stride": (1, 2)}),
    ((24, 1, 3, 3), 24, {"padding": 1, "stride": 2}),
    ((130, 1, 5, 1), 130, {"padding": (2, 0), "dilation": (2, 1)}),
    ((10, 128, 3, 3), 1, {"padding": "same"}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_the_cpu(device, case):
    size, groups, geometry = case
    dtype = BF16 if CASES.index(case) % 2 else torch.float32
    pair = weights(size, device, groups)
    x, bias = torch.randn(2, size[1] * groups, 6, 7).to(dtype).to(device), torch.randn(size[0]).to(device)
    y = check(x, pair, **geometry)
    check(x, pair, bias, activation="relu", residual=torch.randn(y.shape).to(dtype).to(device), **geometry)
    scale = torch.tensor(0.06, device=device)
    codes = torch.randint(-127, 128, y.shape, dtype=torch.int8).to(device)
    check(x.to(memory_format=torch.channels_last), pair, bias, activation="relu6", out_scale=scale, **geometry)
    check(
        x,
        pair,
        bias,
        activation="relu",
        residual=codes,
        residual_scale=2 * scale,
        x_scale=scale,
        out_scale=scale,
        **geometry,
    )


def test_codes_as_input(device):
    pair = weights((20, 16, 3, 3), device)
    codes = torch.randint(-128, 128, (3, 16, 5, 6), dtype=torch.int8).to(device)
    one, each = torch.tensor(0.02, device=device), torch.tensor([0.02, 0.5, 0.001], device=device)
    for x in (codes, codes.to(memory_format=torch.channels_last), codes.transpose(2, 3)):
        check(x, pair, padding=1, x_scale=one)
        check(x, pair, padding=1, x_scale=each, out_dtype=BF16)
        check(x, pair, padding=1, x_scale=each, out_scale=one)


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"none"}))
def test_activations(device, activation):
    packed, plain = weights((24, 8, 2, 2), device)
    x, bias, scale = 5 * torch.randn(1, 8, 4, 4), torch.randn(24), torch.tensor(0.05)
    before = on_cpu(x, packed, bias)
    truth = ACTIVATIONS[activation](before.double())
    x, bias = x.to(device), bias.to(device)
    assert_activation(int8_conv2d(x, plain, bias, activation=activation).cpu(), before.double(), truth, activation)
    codes = int8_conv2d(x, plain, bias, activation=activation, out_scale=scale.to(device)).cpu()
    assert_rounded(codes, truth, scale=scale, error=3e-6 + 1e-6 * before.double().abs())


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("x_scale", [None, 0.03])
def test_bad_images_stay_alone(device, groups, x_scale):
    pair = weights((32 // (2 if groups > 1 else 1), 16 // groups, 3, 3), device, groups)
    x = torch.randn(6, 16, 5, 5)
    x[1, 3, 2, 2], x[2, 0, 0, 0], x[3], x[4] = float("nan"), float("inf"), 0.0, 1e-37
    given = {} if x_scale is None else {"x_scale": torch.tensor(x_scale, device=device)}
    one = torch.tensor(0.1, device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        images = x.to(device).to(memory_format=layout)
        check(images, pair, **given)
        for activation in ("none", "relu", "relu6"):
            check(images, pair, activation=activation, out_scale=one, **given)


def test_outputs_of_any_size_are_clamped(device):
    """Also beyond 2^30 steps, where the CPU does not fold the scales."""
    pair = weights((8, 16, 1, 1), device)
    x = torch.randn(1, 16, 3, 3, device=device)
    for scale in (1e-35, 1e-12, 1e-8, 1e-3, 1e10):
        for activation in ("none", "relu", "relu6"):
            check(x, pair, activation=activation, out_scale=torch.tensor(scale, device=device))


def test_strides_and_unbatched_images(device):
    pair = weights((20, 16, 3, 3), device)
    x = torch.randn(7, 9, 4, 16, device=device)
    for view in (x.permute(2, 3, 0, 1), x.permute(2, 3, 1, 0), x.permute(2, 3, 0, 1)[:, :, 1:, ::2]):
        check(view, pair, padding=1)
    packed, plain = pair
    one = x.permute(2, 3, 0, 1)[0]
    residual = torch.randn(20, 7, 9, device=device)
    y = int8_conv2d(one, plain, padding=1, residual=residual)
    assert_exact(y.cpu(), on_cpu(one[None], packed, padding=1, residual=residual[None])[0])


def test_float16(device):
    packed, plain = weights((20, 16, 3, 3), device)
    x, bias, residual = torch.randn(2, 16, 5, 5).half(), torch.randn(20).half(), torch.randn(2, 20, 3, 3).half()
    expected = on_cpu(x.float(), packed, bias.float(), residual=residual.float()).half()
    assert_exact(int8_conv2d(x.to(device), plain, bias.to(device), residual=residual.to(device)).cpu(), expected)


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 0, 5, 5)], ids=str)
def test_nothing(device, shape):
    pair = weights((6, shape[1], 3, 3), device)
    check(torch.randn(shape, device=device), pair, torch.randn(6, device=device))
    check(torch.randn(2, 4, 5, 5, device=device), weights((0, 4, 3, 3), device))


@pytest.mark.parametrize("channels", [3, 32])
def test_every_tile_gives_the_same_sums(device, channels):
    from lamina.kernels.int8_conv2d import int8_conv2d as launch
    from lamina.kernels.tuning.int8_conv2d import int8_conv_candidates

    packed, plain = weights((40, channels, 3, 3), device)
    codes = torch.randint(-127, 128, (1, channels, 5, 5), dtype=torch.int8).to(device)
    scale = torch.tensor(0.01, device=device)
    expected = on_cpu(codes, packed, padding=1, x_scale=scale)
    tiles = int8_conv_candidates(25, 40, 1, channels, 9, 90, 132)
    for tile in {(tile.k, tile.split): tile for tile in tiles if tile.pixels * tile.channels <= 4096}.values():
        out = torch.full((1, 5, 5, 40), 7.0, device=device)
        pixels = codes.permute(0, 2, 3, 1).contiguous()
        ends = None, (1, 1), (1, 1, 1, 1), (1, 1), 1, "none", None, None, None, out
        launch(pixels, scale, plain.data, plain.scale, *ends, tile)
        assert_exact(out.permute(0, 3, 1, 2).cpu(), expected, str(tile))


def test_other_convolutions_are_made_of_it(device):
    x = torch.randn(2, 16, 9, device=device)
    packed, plain = weights((12, 16, 1, 3), device)
    line = int8_conv1d(x, plain, padding=1)
    assert_exact(line.cpu(), on_cpu(x[:, :, None], packed, padding=(0, 1))[:, :, 0])
    transposed = pack_int8_conv_transpose_weight(torch.randn(16, 6, 3, 3), stride=2)
    conv = plain_int8_conv_weight(unpack_int8_conv_weight(transposed.conv), transposed.conv.scale, 1)
    conv = PackedInt8ConvWeight(*(t.to(device) for t in conv[:3]), *conv[3:])
    x = torch.randn(1, 16, 4, 5, device=device)
    y = int8_conv_transpose2d(x, transposed._replace(conv=conv), padding=1)
    weight = (unpack_int8_conv_weight(conv).double() * conv.scale.double().reshape(-1, 1, 1, 1)).to(device)
    phases = torch.nn.functional.conv2d(torch.nn.functional.pad(x.double(), (1, 1, 1, 1)), weight)
    assert y.shape == (1, 6, 7, 9)
    assert_lossy(y[:, :, 1::2, 1::2], phases.reshape(1, 6, 2, 2, 5, 6)[:, :, 0, 0, 1:-1, 1:-1], min_sqnr_db=30.0)


def test_gradients_see_the_dequantized_weight(device):
    _, plain = weights((12, 4, 3, 3), device, 2)
    x, bias = (
        torch.randn(2, 8, 6, 6, device=device, requires_grad=True),
        torch.randn(12, device=device, requires_grad=True),
    )
    grad = torch.randn(2, 12, 6, 6, device=device)
    int8_conv2d(x, plain, bias, padding=1, activation="silu").backward(grad)
    weight = unpack_int8_conv_weight(plain).double() * plain.scale.double().reshape(-1, 1, 1, 1)
    # torch's convolutions of float32 multiply in TF32 on a GPU, unless they are told not to.
    assert_lossy(traced_conv_weight(plain), weight, min_sqnr_db=60.0)
    wide = [t.detach().double().requires_grad_() for t in (x, bias)]
    y = torch.nn.functional.conv2d(wide[0], weight, wide[1], padding=1, groups=2)
    torch.nn.functional.silu(y).backward(grad.double())
    for ours, truth in zip((x, bias), wide, strict=True):
        assert_lossy(ours.grad, truth.grad, min_sqnr_db=30.0)


def test_layouts_move_between_devices(device):
    packed, plain = weights((19, 6, 3, 2), device)
    assert plain.data.shape == (19, 3, 2, 6)
    assert_exact(unpack_int8_conv_weight(plain).cpu(), unpack_int8_conv_weight(packed))
    assert move_int8_conv_weight(packed, "cpu").data is packed.data
    assert move_int8_conv_weight(packed, "meta").data.shape == packed.data.shape
    if device == "cuda":
        moved = move_int8_conv_weight(packed, device)
        assert_exact(moved[:3], plain[:3])
        assert_exact(move_int8_conv_weight(moved, "cpu")[:3], packed[:3])


def test_refuses_what_does_not_fit(device):
    _, plain = weights((6, 4, 3, 3), device)
    x = torch.randn(2, 4, 5, 5, device=device)
    for arguments, options, message in [
        ((x[:, :3], plain), {}, "int8_conv2d: x has 3 channels, but packed_weight was packed for 4"),
        ((x[:, :, :2], plain), {}, "int8_conv2d: the padded input has 2 rows, but the kernel covers 3"),
        ((x.double(), plain), {}, "int8_conv2d: x is float64, but must be float32, bfloat16 or float16"),
        (
            (x.to(torch.int8), plain),
            {},
            "int8_conv2d: x is int8, but x_scale, which says what its codes mean, is missing",
        ),
        ((x, plain, x[0, 0, 0]), {}, r"int8_conv2d: bias has shape \[5\], but must be \[6\]"),
        ((x, plain), {"x_scale": x[:, 0, 0, 0]}, r"int8_conv2d: x_scale has shape \[2\], but must be \[\]"),
        ((x, plain), {"activation": "elu"}, "int8_conv2d: activation 'elu' is unknown; use none, relu"),
        ((x, plain), {"residual": x}, r"int8_conv2d: residual has shape \[2, 4, 5, 5\], but must be \[2, 6, 3, 3\]"),
        ((x, plain), {"residual_scale": x[0, 0, 0, 0]}, "int8_conv2d: a residual of int8, and only that, goes with"),
    ]:
        with pytest.raises(ValueError, match=message):
            int8_conv2d(*arguments, **options)
    flat = PackedInt8ConvWeight(plain.data.flatten(), *plain[1:])
    with pytest.raises(ValueError, match=r"int8_conv2d: packed_weight\.data is torch.int8 \[216\]"):
        int8_conv2d(x, flat)


def _compiled(shape, size, groups=1, dtype=torch.int8, residual=None, activation="relu", image=None):
    def launch():
        from lamina.kernels.int8_conv2d import int8_conv2d as kernel
        from lamina.kernels.int8_conv2d import quantize_pixels

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        images, height, width = shape
        n, c, kh, kw = size
        codes = empty(images, height, width, c * groups, dtype=torch.int8)
        if image is not None:
            quantize_pixels(empty(images, c * groups, height, width, dtype=image), None, codes, empty(images))
        out = empty(images, height, width, n, dtype=dtype)
        kernel(
            codes,
            empty(images),
            empty(n, kh, kw, c, dtype=torch.int8),
            empty(n),
            empty(n),
            (1, 1),
            (kh // 2, kh // 2, kw // 2, kw // 2),
            (1, 1),
            groups,
            activation,
            None if residual is None else empty(images, height, width, n, dtype=residual),
            empty() if residual is torch.int8 else None,
            empty() if dtype is torch.int8 else None,
            out,
        )

    return launch


COMPILED = [
    _compiled((32, 56, 56), (64, 64, 3, 3)),
    _compiled((32, 14, 14), (256, 256, 3, 3), residual=torch.int8),
    _compiled((1, 7, 7), (512, 512, 3, 3), dtype=BF16, residual=BF16),
    _compiled((32, 56, 56), (256, 96, 1, 1), activation="silu", dtype=torch.float16),
    _compiled((8, 112, 112), (64, 3, 7, 7), image=torch.float32),
    _compiled((32, 28, 28), (240, 1, 5, 5), groups=240, activation="hardswish", image=BF16),
]

COMPILED_ONCE = [[_compiled((64, height, width), (128, 64, 3, 3)) for height, width in ((64, 64), (33, 57), (80, 96))]]
