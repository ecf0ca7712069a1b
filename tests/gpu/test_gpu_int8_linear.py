"""int8_linear on a GPU: sums, and all that is exact behind them, are the bits of the CPU."""

import pytest
import torch
from tolerances import assert_activation, assert_exact, assert_lossy, assert_rounded

from lamina.ops import (
    PackedInt8Weight,
    int8_linear,
    move_int8_weight,
    pack_int8_weight,
    quantize_rows,
    unpack_int8_weight,
)
from lamina.ops.int8_linear import int8_product, plain_int8_weight
from lamina.ops.library import CPU_IMPLEMENTATIONS
from lamina.reference.int8_linear import ACTIVATIONS

BF16 = torch.bfloat16
EXACT = ["none", "relu", "relu6"]
cpu = CPU_IMPLEMENTATIONS[torch.ops.lamina.int8_linear.default]


def weights(n: int, k: int, device: str) -> tuple[PackedInt8Weight, PackedInt8Weight]:
    """One weight, as the CPU and as the GPU takes it."""
    packed = pack_int8_weight(torch.randn(n, k))
    on_gpu = plain_int8_weight(unpack_int8_weight(packed, k).to(device), packed.scale.to(device))
    return packed, on_gpu


def on_cpu(x, packed, bias=None, activation="none", residual=None, x_scale=None, out_scale=None, out_dtype=None):
    def here(t):
        return t if t is None else t.cpu()

    return cpu(here(x), *packed, here(bias), activation, here(residual), here(x_scale), here(out_scale), out_dtype)


# Rows: the kernels for few rows, 16, 32 and 64 at a time, and the one for many; k: what the tensor memory accelerator
# takes, and what is read byte by byte; sums that are shared and that are not.
SHAPES = [
    (1, 48, 512),
    (16, 70, 96),
    (17, 33, 77),
    (33, 64, 64),
    (65, 130, 128),
    (130, 40, 33),
    (3, 1, 1),
    (7, 5, 1040),
]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_cpu(device, shape, dtype):
    m, n, k = shape
    x, residual = torch.randn(m, k).to(dtype).to(device), torch.randn(m, n).to(BF16).to(device)
    bias, out_scale = torch.randn(n).to(device), torch.tensor(0.07, device=device)
    packed, plain = weights(n, k, device)
    assert_exact(int8_linear(x, plain).cpu(), on_cpu(x, packed))
    full = int8_linear(x, plain, bias, activation="relu", residual=residual)
    assert_exact(full.cpu(), on_cpu(x, packed, bias, "relu", residual))
    codes = int8_linear(x, plain, bias, activation="relu6", out_scale=out_scale)
    assert_exact(codes.cpu(), on_cpu(x, packed, bias, "relu6", out_scale=out_scale))


@pytest.mark.parametrize("rows", [5, 70])
def test_codes_as_input(device, rows):
    packed, plain = weights(50, 64, device)
    x = torch.randn(rows, 64, device=device)
    codes, scales = quantize_rows(x)
    assert_exact(int8_linear(codes, plain, x_scale=scales), int8_linear(x, plain))
    one = torch.tensor(0.02, device=device)
    extreme = torch.randint(-128, 128, (rows, 64), dtype=torch.int8).to(device)
    for given in (codes, extreme, extreme.T.contiguous().T, codes[:1].expand(rows, 64)):
        assert_exact(int8_linear(given, plain, x_scale=one).cpu(), on_cpu(given, packed, x_scale=one))
    assert_exact(int8_linear(x, plain, x_scale=one).cpu(), on_cpu(x, packed, x_scale=one))
    wide = int8_linear(codes, plain, x_scale=scales, out_dtype=BF16)
    assert_exact(wide.cpu(), on_cpu(codes, packed, x_scale=scales, out_dtype=BF16))


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"none"}))
def test_activations(device, activation):
    packed, plain = weights(96, 32, device)
    x, bias = 6 * torch.randn(20, 32), torch.randn(96)
    before = on_cpu(x, packed, bias)
    truth = ACTIVATIONS[activation](before.double())
    x, bias = x.to(device), bias.to(device)
    for dtype in (torch.float32, BF16):
        actual = int8_linear(x, plain, bias, activation=activation, out_dtype=dtype).cpu()
        assert_activation(actual, before.double(), truth, activation)
    scale = torch.tensor(0.05)
    codes = int8_linear(x, plain, bias, activation=activation, out_scale=scale.to(device)).cpu()
    assert_rounded(codes, truth, scale=scale, error=3e-6 + 1e-6 * before.double().abs())


def test_activations_of_infinity_and_nan(device):
    _, plain = weights(3, 16, device)
    x = torch.zeros(2, 16, device=device)
    bias = torch.tensor([float("inf"), -float("inf"), float("nan")], device=device)
    for activation in ACTIVATIONS:
        y = int8_linear(x, plain, bias, activation=activation)
        above = {"relu6": 6.0, "tanh": 1.0}.get(activation, float("inf"))
        below = {"none": -float("inf"), "tanh": -1.0}.get(activation, 0.0)
        assert y[0, :2].tolist() == [above, below], activation
        assert y[:, 2].isnan().all(), activation


def test_float16(device):
    packed, plain = weights(33, 48, device)
    x, bias, residual = torch.randn(9, 48).half(), torch.randn(33).half(), torch.randn(9, 33).half()
    expected = on_cpu(x.float(), packed, bias.float(), "relu", residual.float(), None, None, torch.float32).half()
    x, bias, residual = x.to(device), bias.to(device), residual.to(device)
    assert_exact(int8_linear(x, plain, bias, activation="relu", residual=residual).cpu(), expected)


def test_leading_dimensions_and_strides(device):
    packed, plain = weights(24, 40, device)
    x = torch.randn(40, 3, 5, 2, device=device).permute(1, 3, 2, 0)
    residual = torch.randn(24, 3, 2, 5, device=device).permute(1, 2, 3, 0)
    y = int8_linear(x, plain, residual=residual)
    assert y.is_contiguous()
    assert_exact(y.cpu(), on_cpu(x, packed, residual=residual.contiguous()))
    assert_exact(int8_linear(x[0, 0, 0], plain), int8_linear(x, plain)[0, 0, 0])
    sliced = torch.randn(9, 60, device=device)[:, 3:43]
    assert_exact(int8_linear(sliced, plain).cpu(), on_cpu(sliced, packed))


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0), (0, 0, 0)], ids=str)
def test_nothing(device, shape):
    m, n, k = shape
    packed, plain = weights(n, k, device)
    x, bias = torch.randn(m, k, device=device), torch.randn(n, device=device)
    assert_exact(int8_linear(x, plain, bias).cpu(), on_cpu(x, packed, bias))


def test_bad_rows_stay_alone(device):
    packed, plain = weights(70, 37, device)
    x = torch.randn(9, 37)
    x[2, 5], x[4, 0], x[6] = float("nan"), float("inf"), 1e-38
    assert_exact(int8_linear(x.to(device), plain).cpu(), on_cpu(x, packed))
    one = torch.tensor(0.1)
    codes = int8_linear(x.to(device), plain, out_scale=one.to(device))
    assert_exact(codes.cpu(), on_cpu(x, packed, out_scale=one))


@pytest.mark.parametrize("rows", [4, 40, 100])
def test_every_tile_gives_the_same_sums(device, rows):
    from lamina.kernels.int8_linear import int8_linear as launch
    from lamina.kernels.tuning.int8_linear import int8_linear_candidates

    packed, plain = weights(40, 1104, device)
    codes, scales = quantize_rows(torch.randn(rows, 1104, device=device))
    expected = on_cpu(codes, packed, x_scale=scales)
    tiles = {(tile.swap, tile.split, tile.columns): tile for tile in int8_linear_candidates(rows, 40, 1104, 90, 132)}
    for tile in tiles.values():
        out = torch.full((rows, 40), 7.0, device=device)
        launch(codes, scales, plain.data, plain.scale, None, "none", None, None, out, tile)
        assert_exact(out.cpu(), expected, str(tile))


def test_int8_product_is_what_layers_with_codes_share(device):
    packed, plain = weights(16, 32, device)
    codes, scales = quantize_rows(torch.randn(6, 32, device=device))
    out = torch.empty(6, 16, device=device)
    int8_product(codes, scales, plain.data, plain.scale, None, "relu", None, None, out)
    assert_exact(out.cpu(), on_cpu(codes, packed, None, "relu", x_scale=scales))


def test_gradients_see_the_dequantized_weight(device):
    _, plain = weights(12, 20, device)
    x, bias = torch.randn(5, 20, device=device, requires_grad=True), torch.randn(12, device=device, requires_grad=True)
    residual = torch.randn(5, 12, device=device, requires_grad=True)
    grad = torch.randn(5, 12, device=device)
    int8_linear(x, plain, bias, activation="silu", residual=residual).backward(grad)
    weight = plain.data.double() * plain.scale.double()[:, None]
    wide = [t.detach().double().requires_grad_() for t in (x, bias, residual)]
    torch.nn.functional.silu(wide[0] @ weight.T + wide[1] + wide[2]).backward(grad.double())
    for ours, truth in zip((x, bias, residual), wide, strict=True):
        assert_lossy(ours.grad, truth.grad, min_sqnr_db=30.0)


def test_layouts_move_between_devices(device):
    packed, plain = weights(19, 13, device)
    assert_exact(unpack_int8_weight(plain, 13).cpu(), unpack_int8_weight(packed, 13))
    back = pack_int8_weight(unpack_int8_weight(plain, 13).cpu(), plain.scale.cpu())
    assert_exact(tuple(back), tuple(packed))
    assert move_int8_weight(packed, 13, "cpu").data is packed.data
    assert move_int8_weight(packed, 13, "meta").data.shape == packed.data.shape
    if device == "cuda":
        moved = move_int8_weight(packed, 13, device)
        assert_exact(tuple(moved), tuple(plain))
        assert_exact(tuple(move_int8_weight(moved, 13, "cpu")), tuple(packed))
        weight = torch.randn(19, 13)
        assert_exact(
            tuple(move_int8_weight(pack_int8_weight(weight), 13, device)), tuple(pack_int8_weight(weight.to(device)))
        )


def test_refuses_what_does_not_fit(device):
    packed, plain = weights(6, 16, device)
    x = torch.randn(2, 16, device=device)
    for arguments, options, message in [
        ((x[:, :5], plain), {}, "int8_linear: x has 5 features, but packed_weight was packed for 16"),
        ((x.double(), plain), {}, "int8_linear: x is float64, but must be float32, bfloat16 or float16"),
        (
            (x.to(torch.int8), plain),
            {},
            "int8_linear: x is int8, but x_scale, which says what its codes mean, is missing",
        ),
        ((x, plain, x[0]), {}, r"int8_linear: bias has shape \[16\], but must be \[6\]"),
        ((x, plain), {"activation": "elu"}, "int8_linear: activation 'elu' is unknown; use none, relu"),
        ((x, plain), {"x_scale": x[:, 0]}, r"int8_linear: x_scale has shape \[2\], but must be \[\]"),
        ((x, plain), {"out_scale": x[0]}, r"int8_linear: out_scale has shape \[16\], but must be \[\]"),
        ((x, plain), {"residual": x}, r"int8_linear: residual has shape \[2, 16\], but must be \[2, 6\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            int8_linear(*arguments, **options)
    if device == "cuda":
        with pytest.raises(ValueError, match=r"int8_linear: packed_weight\.data is int8"):
            int8_linear(x, PackedInt8Weight(*(t.to(device) for t in packed)))
        with pytest.raises(ValueError, match="int8_linear: packed_weight is on cpu, but x is on cuda:0"):
            int8_linear(x, PackedInt8Weight(*(t.cpu() for t in plain)))
    with pytest.raises(ValueError, match="pack_int8_weight: weight holds -128"):
        plain_int8_weight(torch.full((2, 3), -128, dtype=torch.int8, device=device), torch.ones(2, device=device))


def _compiled(m: int, n: int, k: int, activation: str = "none", dtype=BF16, residual=None, candidate=None):
    def launch():
        from lamina.kernels.device import capability
        from lamina.kernels.int8_linear import int8_linear as kernel
        from lamina.kernels.tuning.int8_linear import int8_linear_candidates

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        tile = None
        if candidate is not None:
            tile = int8_linear_candidates(m, n, k, capability(empty(1)), 132)[candidate]
        kernel(
            empty(m, k, dtype=torch.int8),
            empty(m),
            empty(n, k, dtype=torch.int8),
            empty(n),
            empty(n, dtype=BF16),
            activation,
            None if residual is None else empty(m, n, dtype=residual),
            empty() if dtype is torch.int8 else None,
            empty(m, n, dtype=dtype),
            tile,
        )

    return launch


COMPILED = [
    _compiled(16, 4096, 4096),
    _compiled(32, 4096, 4096, "silu"),
    _compiled(64, 16384, 4096, "tanh"),
    _compiled(100, 512, 1024, "hardswish"),
    _compiled(2048, 2048, 1024, "quick_gelu"),
    _compiled(4096, 4096, 4096, "gelu", residual=BF16),
    _compiled(4096, 4096, 4096, "relu", dtype=torch.int8, residual=torch.float32),
    _compiled(100, 77, 79, "gelu_tanh", dtype=torch.float16),
]
