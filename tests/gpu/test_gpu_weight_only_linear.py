"""weight_only_linear on a GPU: only the weight is rounded."""

import pytest
import torch
from tolerances import ACTIVATION_SLOPE, activation_error, assert_exact, assert_sum

from lamina.ops import (
    PackedInt8Weight,
    move_int4_weight,
    pack_int4_weight,
    pack_int8_weight,
    unpack_int4_weight,
    unpack_int8_weight,
    weight_only_linear,
)
from lamina.ops.int8_linear import plain_int8_weight
from lamina.ops.weight_only_linear import plain_int4_codes, plain_int4_weight, traced_int4_weight
from lamina.quant.weights import quantize_weight_groups
from lamina.reference.int8_linear import ACTIVATIONS
from lamina.reference.weight_only_linear import dequantize
from lamina.reference.weight_only_linear import weight_only_linear as reference

BF16 = torch.bfloat16
FORMATS = pytest.mark.parametrize("group", [0, 32, 128], ids=["int8", "int4", "int4 in groups of 128"])


def weights(n: int, k: int, group: int, device: str):
    """(packed as a GPU takes it, what it stands for in float64)."""
    weight = torch.randn(n, k)
    if group == 0:
        packed = pack_int8_weight(weight)
        codes = unpack_int8_weight(packed, k)
        return plain_int8_weight(codes.to(device), packed.scale.to(device)), dequantize(codes, packed.scale)
    codes, scale = quantize_weight_groups(weight, group)
    plain = plain_int4_weight(codes, scale, group)
    return plain._replace(data=plain.data.to(device)), dequantize(codes, scale, group)


def check(x, packed, weight, bias=None, activation="none"):
    y = weight_only_linear(x, packed, bias, activation=activation)
    assert y.dtype is x.dtype
    assert y.is_contiguous()
    x64, bias64 = x.cpu().double(), None if bias is None else bias.cpu().double()
    before = reference(x64, weight, bias64)
    magnitude = x64.abs() @ weight.abs().T + (0.0 if bias is None else bias64.abs())
    assert_sum(
        y.cpu(),
        ACTIVATIONS[activation](before),
        terms=x.shape[-1] + 2,
        magnitude=ACTIVATION_SLOPE[activation] * magnitude,
        extra=activation_error(activation, before),
    )
    return y


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 48, 512), (16, 70, 96), (17, 33, 77), (65, 130, 128), (3, 1, 1)], ids=str)
def test_only_the_weight_is_rounded(device, shape, dtype, group):
    m, n, k = shape
    packed, weight = weights(n, k, group, device)
    x, bias = torch.randn(m, k).to(dtype).to(device), torch.randn(n).to(dtype).to(device)
    check(x, packed, weight, bias)


@FORMATS
def test_sums_that_are_shared(device, group):
    packed, weight = weights(40, 1088, group, device)
    for rows in (2, 70):
        x = torch.randn(rows, 1088, device=device)
        assert_exact(check(x, packed, weight), weight_only_linear(x, packed))


def test_every_code_of_int4(device):
    """Each code at each place of a block, exactly."""
    codes = (torch.arange(16 * 64) * 7 % 16 - 8).to(torch.int8).reshape(16, 64)
    plain = plain_int4_weight(codes, torch.ones(16, 2, dtype=BF16), 32)
    plain = plain._replace(data=plain.data.to(device))
    for dtype in (torch.float32, BF16, torch.float16):
        y = weight_only_linear(torch.eye(64, dtype=dtype, device=device), plain)
        assert_exact(y.cpu(), codes.T.to(dtype).contiguous())


def test_every_code_of_int8(device):
    codes = (torch.arange(16 * 64) % 255 - 127).to(torch.int8).reshape(16, 64)
    plain = plain_int8_weight(codes.to(device), torch.ones(16, device=device))
    for dtype in (torch.float32, BF16, torch.float16):
        y = weight_only_linear(torch.eye(64, dtype=dtype, device=device), plain)
        assert_exact(y.cpu(), codes.T.to(dtype).contiguous())


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"none"}))
def test_activations(device, activation, group):
    packed, weight = weights(33, 64, group, device)
    check(torch.randn(5, 64, device=device), packed, weight, torch.randn(33, device=device), activation)


@FORMATS
def test_leading_dimensions_and_strides(device, group):
    packed, weight = weights(24, 40, group, device)
    x = torch.randn(40, 3, 5, 2, device=device).permute(1, 3, 2, 0)
    y = check(x, packed, weight)
    assert_exact(weight_only_linear(x.contiguous(), packed), y)
    check(torch.randn(9, 60, device=device)[:, 3:43], packed, weight)
    check(torch.randn(40, device=device), packed, weight)


@FORMATS
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0)], ids=str)
def test_nothing(device, shape, group):
    m, n, k = shape
    packed, _ = weights(n, k, group, device)
    x, bias = torch.randn(m, k, device=device), torch.randn(n, device=device)
    y = weight_only_linear(x, packed, bias)
    assert_exact(y, (bias.expand(m, n) if k == 0 else torch.zeros(m, n, device=device)).contiguous())


@FORMATS
def test_bad_rows_stay_alone(device, group):
    packed, _ = weights(20, 64, group, device)
    x = torch.randn(9, 64, device=device)
    clean = weight_only_linear(x, packed)
    x[4, 7] = float("nan")
    y = weight_only_linear(x, packed)
    assert y[4].isnan().all()
    others = [i for i in range(9) if i != 4]
    assert_exact(y[others], clean[others])


@FORMATS
@pytest.mark.parametrize("rows", [4, 40])
def test_every_tile(device, rows, group):
    from lamina.kernels.tuning.weight_only_linear import weight_only_candidates
    from lamina.kernels.weight_only_linear import weight_only_linear as launch

    packed, weight = weights(40, 320, group, device)
    x = torch.randn(rows, 320, device=device)
    tiles = weight_only_candidates(rows, 40, 320, group, 4, 90, 132)
    for tile in {(tile.k, min(tile.split, 2)): tile for tile in tiles if tile.columns < 128}.values():
        out = torch.full((rows, 40), 7.0, device=device)
        launch(x, packed.data, getattr(packed, "scale", None), None, group, "none", out, tile)
        assert_sum(out.cpu(), x.cpu().double() @ weight.T, terms=322, magnitude=x.cpu().double().abs() @ weight.abs().T)


@FORMATS
def test_gradients(device, group):
    packed, weight = weights(12, 40, group, device)
    x, bias = torch.randn(5, 40, device=device, requires_grad=True), torch.randn(12, device=device, requires_grad=True)
    grad = torch.randn(5, 12, device=device)
    weight_only_linear(x, packed, bias, activation="silu").backward(grad)
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, bias)]
    torch.nn.functional.silu(wide[0] @ weight.T + wide[1]).backward(grad.cpu().double())
    for ours, truth in zip((x, bias), wide, strict=True):
        torch.testing.assert_close(ours.grad.cpu().double(), truth.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("k", [1, 32, 50, 130])
def test_int4_layouts_move_between_devices(device, k, group):
    packed = pack_int4_weight(torch.randn(19, k), group_size=group)
    codes, scale = unpack_int4_weight(packed, k)
    plain = plain_int4_weight(codes, scale, group)
    assert_exact(plain_int4_codes(plain, k), (codes, scale))
    assert move_int4_weight(packed, k, "cpu").data is packed.data
    assert move_int4_weight(packed, k, "meta").data.shape == packed.data.shape
    on_gpu = plain._replace(data=plain.data.to(device))
    assert torch.equal(traced_int4_weight(on_gpu, k).cpu(), dequantize(codes, scale, group).float())
    if device == "cuda":
        moved = move_int4_weight(packed, k, device)
        assert_exact(moved.data, on_gpu.data)
        assert_exact(move_int4_weight(moved, k, "cpu").data, packed.data)
        assert_exact(pack_int4_weight(codes.to(device), scale.to(device), group_size=group).data, on_gpu.data)


def test_refuses_what_does_not_fit(device):
    int8, _ = weights(6, 32, 0, device)
    int4, _ = weights(6, 32, 32, device)
    x = torch.randn(2, 32, device=device)
    for packed in (int8, int4):
        for arguments, options, message in [
            ((x.double(), packed), {}, "weight_only_linear: x is float64, but must be float32, bfloat16 or float16"),
            ((x, packed, x[0]), {}, r"weight_only_linear: bias has shape \[32\], but must be \[6\]"),
            ((x, packed), {"activation": "elu"}, "weight_only_linear: activation 'elu' is unknown; use none, relu"),
        ]:
            with pytest.raises(ValueError, match=message):
                weight_only_linear(*arguments, **options)
    with pytest.raises(ValueError, match="weight_only_linear: x has 5 features, but packed_weight was packed for 32"):
        weight_only_linear(x[:, :5], int8)
    with pytest.raises(ValueError, match=r"has 120 bytes, but on a GPU a weight \[6, 31\] in groups of 32 takes 121"):
        weight_only_linear(x[:, :31], int4)
    with pytest.raises(ValueError, match=r"weight_only_linear: packed_weight\.data has shape"):
        weight_only_linear(x, PackedInt8Weight(int8.data.flatten(), int8.scale, int8.compensation))
    with pytest.raises(ValueError, match=r"pack_int4_weight: codes must lie in \[-8, 7\]"):
        plain_int4_weight(torch.full((2, 32), 8, dtype=torch.int8), torch.ones(2, 1), 32)


def _compiled(m: int, n: int, k: int, group: int, dtype: torch.dtype = BF16, activation: str = "none"):
    def launch():
        from lamina.kernels.weight_only_linear import weight_only_linear as kernel

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        data = empty(n, k, dtype=torch.int8)
        if group:
            size = -(-k // 32) * n * 16 + -(-k // group) * n * 4 + -k % 32
            data = empty(size, dtype=torch.uint8)
        scale = None if group else empty(n)
        kernel(
            empty(m, k, dtype=dtype), data, scale, empty(n, dtype=dtype), group, activation, empty(m, n, dtype=dtype)
        )

    return launch


COMPILED = [
    _compiled(16, 4096, 4096, 0),
    _compiled(64, 4096, 4096, 0, torch.float16),
    _compiled(4096, 4096, 4096, 0, activation="silu"),
    _compiled(16, 4096, 4096, 0, torch.float32),
    _compiled(4096, 4096, 4096, 0, torch.float32),
    _compiled(16, 4096, 4096, 32),
    _compiled(1, 16384, 4096, 32, torch.float16),
    _compiled(16, 4096, 4096, 128, activation="gelu"),
    _compiled(16, 4096, 4096, 32, torch.float32),
    _compiled(1024, 4096, 4096, 32),
    _compiled(1024, 4096, 4096, 32, torch.float32),
    _compiled(100, 99, 77, 0),
    _compiled(100, 99, 77, 32),
]
