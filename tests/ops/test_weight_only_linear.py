"""weight_only_linear: what holds beside "close to the reference", and every way to call it wrongly."""

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FIXED_POINT_ERROR, INT4_LAYER_SQNR_DB, INT8_LAYER_SQNR_DB, assert_exact, assert_lossy, sqnr_db
from torch.nn import functional as F

import lamina
from lamina import _C
from lamina.ops import (
    pack_int4_weight,
    pack_int8_weight,
    unpack_int4_weight,
    unpack_int8_weight,
    weight_only_linear,
)
from lamina.ops.int8_linear import ACTIVATIONS
from lamina.quant import (
    dequantize_weight,
    dequantize_weight_groups,
    pack_nibbles,
    quantize_weight_groups,
    unpack_nibbles,
)
from lamina.reference.int8_linear import ACTIVATIONS as PLAIN

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PACK = pytest.mark.parametrize("pack", [pack_int8_weight, pack_int4_weight], ids=["int8", "int4"])
VNNI = ("avx512vnni", "avx512bf16")


def codes_of(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)


def weight_of(packed, k: int) -> torch.Tensor:
    """The dequantized weight of either format."""
    if isinstance(packed, lamina.ops.PackedInt4Weight):
        return dequantize_weight_groups(*unpack_int4_weight(packed, k), packed.group_size)
    return dequantize_weight(unpack_int8_weight(packed, k), packed.scale)


# -- packing


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    n=st.integers(0, 70),
    k=st.integers(0, 150),
    group=st.sampled_from([32, 64, 96, 256]),
    seed=st.integers(0, 2**31),
)
def test_pack_and_unpack_are_inverse(n, k, group, seed):
    generator = torch.Generator().manual_seed(seed)
    codes, scale = codes_of(n, k, generator), torch.randn(n, -(-k // group), generator=generator).bfloat16()
    packed = pack_int4_weight(codes, scale, group_size=group)
    assert packed.out_features == n
    for ours, expected in zip(unpack_int4_weight(packed, k), (codes, scale), strict=True):
        assert_exact(ours, expected)


@pytest.mark.parametrize(("n", "k", "group"), [(16, 32, 32), (17, 70, 32), (40, 130, 64), (1, 1, 128)])
def test_packed_layout(n, k, group, isa, generator):
    """Slices of 16 channels: the scales of a group, then its blocks of 32 inputs; the number of bytes tells k."""
    codes, scale = codes_of(n, k, generator), torch.randn(n, -(-k // group), generator=generator).bfloat16()
    with lamina.force_isa(isa):
        packed = pack_int4_weight(codes, scale, group_size=group)
    padding = -k % 32
    unsigned = F.pad(codes, (0, padding, 0, -n % 16)).to(torch.int16) + 8
    scale = F.pad(scale.float(), (0, 0, 0, -n % 16)).bfloat16()
    parts = []
    for first in range(0, n, 16):
        for g in range(scale.shape[1]):
            parts.append(scale[first : first + 16, g].contiguous().view(torch.uint8))
            inside = unsigned[first : first + 16, g * group : (g + 1) * group]
            # [16 channels, blocks, quarter, half, 4] -> [block, quarter, channel, 4], the second half above the first
            low, high = inside.reshape(16, -1, 4, 2, 4).permute(3, 1, 2, 0, 4)
            parts.append((low | high << 4).to(torch.uint8).flatten())
    assert_exact(packed.data, torch.cat([*parts, torch.zeros(padding, dtype=torch.uint8)]))


@pytest.mark.parametrize(("n", "k"), [(768, 768), (3072, 768), (768, 3072), (384, 384), (1000, 1000)])
@pytest.mark.parametrize(("group", "share"), [(32, 0.15), (64, 0.14), (128, 0.135)])
def test_packed_bytes(n, k, group, share):
    assert _C.weight_only_linear_packed_size(n, k, group) <= share * 4 * n * k


def test_packing_takes_any_strides(generator):
    weight = torch.randn(70, 33, generator=generator)
    plain = pack_int4_weight(weight).data
    for layout in ("transposed", "misaligned", "sliced", "every_second"):
        assert_exact(pack_int4_weight(cases.LAYOUTS[layout](weight)).data, plain, layout)


@pytest.mark.parametrize("k", [0, 1, 2, 7, 64])
def test_nibbles_are_inverse(k, generator):
    codes = codes_of(5, k, generator)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, (k + 1) // 2)
    assert_exact(unpack_nibbles(packed, k), codes)


def test_nibble_layout():
    assert pack_nibbles(torch.tensor([[1, -8, 7], [-1, 0, -2]], dtype=torch.int8)).tolist() == [[0x81, 7], [0x0F, 14]]


# -- quantization of weights


@DTYPES
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantized_weight_is_the_nearest(dtype, group, generator):
    """Every value takes the nearest code of its group's scale, which reaches about as far as the largest value."""
    weight = torch.randn(40, 200, generator=generator).to(dtype)
    codes, scale = quantize_weight_groups(weight, group)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    assert scale.shape == (40, -(-200 // group))
    assert codes.min() == -8
    assert codes.max() <= 7
    step = scale.double().repeat_interleave(group, 1)[:, :200]
    nearest = torch.round(weight.double() / step).clamp(-8, 7)
    # Float32 quotients may fall on the other side of a tie.
    assert ((codes - nearest).abs() <= ((weight.double() / step - nearest).abs() > 0.4999)).all()


def test_search_beats_the_plain_scale(generator):
    """max / 7, as most libraries do it, is 1.5 dB worse for normal weights."""
    weight = torch.randn(256, 768, generator=generator)
    ours = dequantize_weight_groups(*quantize_weight_groups(weight), 32)
    groups = weight.reshape(-1, 32)
    plain_scale = groups.abs().amax(1, keepdim=True) / 7
    plain = (torch.round(groups / plain_scale) * plain_scale).reshape(weight.shape)
    assert sqnr_db(ours, weight) > sqnr_db(plain, weight) + 1.2


def test_zeros_and_tiny_and_huge_groups():
    weight = torch.zeros(4, 64)
    weight[1, :32] = 1e-38
    weight[2] = torch.linspace(-1, 1, 64) * 1e-35
    weight[3] = torch.linspace(-1, 1, 64) * 3e38
    codes, scale = quantize_weight_groups(weight)
    assert scale.isfinite().all()
    assert not codes[:2].any()
    assert scale[:2].eq(1).all()
    for row in (2, 3):
        unit = dequantize_weight_groups(codes, scale, 32)[row].double() / weight[row, 0].double()
        assert_lossy(unit, weight[row].double() / weight[row, 0].double(), min_sqnr_db=INT4_LAYER_SQNR_DB)
    y = weight_only_linear(torch.full((2, 64), 5.0), pack_int4_weight(weight[:2]), torch.tensor([0.25, -3.0]))
    assert y.tolist() == [[0.25, -3.0]] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_weights_that_are_not_finite(bad):
    weight = torch.ones(6, 40)
    weight[4, 39] = bad
    with pytest.raises(ValueError, match="quantize_weight_groups: output channel 4 has a NaN or infinite weight"):
        pack_int4_weight(weight)


# -- arithmetic


@PACK
@DTYPES
def test_close_to_the_float_layer(pack, dtype, isa, generator):
    """What the rounding of the weight costs a layer with normal weights and inputs."""
    x, weight = torch.randn(64, 768, generator=generator), torch.randn(96, 768, generator=generator)
    with lamina.force_isa(isa):
        y = weight_only_linear(x.to(dtype), pack(weight))
    least = INT8_LAYER_SQNR_DB + 3 if pack is pack_int8_weight else INT4_LAYER_SQNR_DB
    assert_lossy(y, x.double() @ weight.double().T, min_sqnr_db=least)


@PACK
@DTYPES
def test_activations_are_not_rounded(pack, dtype, isa, generator):
    """An identity gives the input back: exactly in bfloat16, and to 2^-22 of the row's largest in float32."""
    k = 96
    eye = torch.eye(k, dtype=torch.int8)
    packed = pack(eye, torch.ones(k) if pack is pack_int8_weight else torch.ones(k, 3))
    x = torch.randn(9, k, generator=generator).clamp(-2.9, 2.9).to(dtype)
    x[:, 0] = 3
    with lamina.force_isa(isa):
        y = weight_only_linear(x, packed)
    if dtype is torch.bfloat16 or isa not in VNNI:
        small = x.abs() < 3 * 2**-13  # of these, fixed point keeps fewer than bfloat16's eight bits
        assert_exact(torch.where(small, 0, y), torch.where(small, 0, x))
    rounding = x.double().abs() * (0 if dtype is torch.float32 else 2**-9)
    assert ((y.double() - x.double()).abs() <= 3 * FIXED_POINT_ERROR + rounding).all()


@PACK
@pytest.mark.parametrize("exponent", [-60, -1, 1, 20, 60])
def test_scaling_by_a_power_of_two_is_exact(pack, exponent, isa, generator):
    x, packed = torch.randn(9, 70, generator=generator), pack(torch.randn(21, 70, generator=generator))
    with lamina.force_isa(isa):
        y = weight_only_linear(x, packed)
        assert_exact(weight_only_linear(x * 2.0**exponent, packed), y * 2.0**exponent)


@PACK
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30])
def test_extreme_rows(pack, size, isa, generator):
    """Down to subnormal numbers, beside rows of ordinary size."""
    x = torch.randn(3, 64, generator=generator)
    x[1] = x[1] / x[1].abs().max() * size
    weight = torch.randn(20, 64, generator=generator) / 64
    packed = pack(weight)
    with lamina.force_isa(isa):
        y = weight_only_linear(x, packed)
    truth = x.double() @ weight_of(packed, 64).double().T
    reach = x.double().abs().amax(1, keepdim=True) * weight_of(packed, 64).double().abs().sum(1)
    # Subnormal results, and subnormal inputs of large rows, are off by the smallest number there is.
    assert ((y - truth).abs() <= 70 * FIXED_POINT_ERROR * reach + 2.0**-126 * (size < 1e-37)).all()


@PACK
@DTYPES
@pytest.mark.parametrize("k", [1, 64, 333])
def test_rows_do_not_depend_on_each_other(pack, k, dtype, isa, generator):
    """Any number of rows gives each row the same bits: the result must not depend on who shares the batch."""
    x = torch.randn(70, k, generator=generator).to(dtype)
    packed = pack(torch.randn(67, k, generator=generator))
    with lamina.force_isa(isa):
        whole = weight_only_linear(x, packed, activation="silu")
        for m in (*range(1, 18), 63, 64, 65):
            assert_exact(weight_only_linear(x[:m], packed, activation="silu"), whole[:m], f"{m} rows")
        assert_exact(weight_only_linear(x[57:58], packed, activation="silu"), whole[57:58], "one row")


@PACK
def test_channels_do_not_depend_on_each_other(pack, isa, generator):
    x, weight = torch.randn(7, 50, generator=generator), torch.randn(131, 50, generator=generator)
    with lamina.force_isa(isa):
        whole = weight_only_linear(x, pack(weight))
        for n in (1, 15, 16, 17, 64, 65, 130):
            assert_exact(weight_only_linear(x, pack(weight[:n])), whole[:, :n], f"{n} channels")


@PACK
def test_long_rows_in_parts_give_the_same_bits(pack, generator):
    """More rows than are prepared at once."""
    k = 512
    rows = (8 << 20) // (4 * k) + 9
    x, packed = torch.randn(rows, k, generator=generator), pack(torch.randn(17, k, generator=generator))
    whole = weight_only_linear(x, packed)
    assert_exact(whole[-20:], weight_only_linear(x[-20:], packed))
    assert_exact(whole[:20], weight_only_linear(x[:20], packed))


@PACK
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(pack, bad, isa, generator):
    """Their outputs are not finite; the other rows do not notice."""
    x = torch.randn(3, 40, generator=generator)
    packed = pack(torch.randn(20, 40, generator=generator))
    with lamina.force_isa(isa):
        clean = weight_only_linear(x, packed)
        x[1, 17] = bad
        y = weight_only_linear(x, packed)
    assert y[1].isnan().all() if isa in VNNI else not y[1].isfinite().any()
    assert_exact(y[::2], clean[::2])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [32, 64, 4096])
def test_extremes_do_not_overflow(sign, k, isa):
    """The largest codes times the largest digits: a block of 32 is just below 2^31."""
    x = torch.full((2, k), 8355711.0)
    codes = torch.full((17, k), -8 if sign > 0 else 7, dtype=torch.int8)
    packed = pack_int4_weight(codes, torch.ones(17, -(-k // 32)))
    with lamina.force_isa(isa):
        y = weight_only_linear(x, packed)
    assert ((y.double() / (8355711.0 * k * int(codes[0, 0])) - 1).abs() < k * FIXED_POINT_ERROR).all()


def test_int8_and_int8_linear_share_a_weight(generator):
    """One packed weight, two ops: the one that rounds activations is the less accurate."""
    x, weight = torch.randn(16, 768, generator=generator), torch.randn(96, 768, generator=generator)
    packed = pack_int8_weight(weight)
    truth = x.double() @ weight.double().T
    ours = sqnr_db(weight_only_linear(x, packed), truth)
    assert ours > sqnr_db(lamina.ops.int8_linear(x, packed), truth) + 2


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    lead=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    k=st.integers(0, 80),
    n=st.integers(0, 70),
    group=st.sampled_from([0, 32, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "misaligned", "sliced", "every_second", "columns_repeated"]),
    bias=st.sampled_from([None, torch.float32, torch.bfloat16]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_strides(lead, k, n, group, dtype, layout, bias, activation, seed):
    if layout == "columns_repeated" and k == 0:
        layout = "contiguous"
    case = cases._weight_only_linear_case(
        *lead, k=k, n=n, group=group, dtype=dtype, layout=layout, bias=bias, activation=activation
    )
    inputs = case.inputs(seed)
    cases.weight_only_linear_check(torch.ops.lamina.weight_only_linear(*inputs), inputs)


# -- gradients


@PACK
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradient_is_that_of_the_dequantized_layer(pack, activation, generator):
    x = torch.randn(5, 3, 40, generator=generator, requires_grad=True)
    bias = torch.randn(21, generator=generator, requires_grad=True)
    packed = pack(torch.randn(21, 40, generator=generator))
    out = torch.randn(5, 3, 21, generator=generator)
    weight_only_linear(x, packed, bias, activation=activation).backward(out)
    ours = x.grad, bias.grad
    x64, bias64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    y = F.linear(x64, weight_of(packed, 40).double(), bias64)
    PLAIN[activation](y).backward(out.double())
    for mine, truth in zip(ours, (x64.grad, bias64.grad), strict=True):
        assert_lossy(mine, truth, min_sqnr_db=100)


@PACK
def test_gradient_only_where_asked(pack, generator):
    x, packed = torch.randn(3, 40, generator=generator), pack(torch.randn(21, 40, generator=generator))
    bias = torch.zeros(21, dtype=torch.bfloat16, requires_grad=True)
    weight_only_linear(x, packed, bias).sum().backward()
    assert_exact(bias.grad, torch.full((21,), 3.0, dtype=torch.bfloat16))
    assert not weight_only_linear(x, packed).requires_grad


# -- refusals


def one_sentence(error) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert ": " in text


@pytest.mark.parametrize("group", [0, -32, 1, 16, 33, 48])
def test_refuses_other_groups(group):
    with pytest.raises(ValueError, match=f"group_size is {group}, but must be a positive multiple of 32") as error:
        pack_int4_weight(torch.ones(4, 64), group_size=group)
    one_sentence(error)
    with pytest.raises(ValueError, match=f"group_size is {group}, but must be a positive multiple of 32"):
        pack_int4_weight(torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 2), group_size=group)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4),), r"weight has shape \[4\], but must be \[N, K\]"),
        ((torch.ones(4, 32), torch.ones(4, 1)), "scale goes with int8 codes"),
        ((torch.ones(4, 32, dtype=torch.int8),), "codes need their scale"),
        ((torch.ones(4, 32, dtype=torch.int32), torch.ones(4, 1)), "codes is int32, but must be int8"),
        (
            (torch.full((4, 32), 8, dtype=torch.int8), torch.ones(4, 1)),
            r"codes\[0, 0\] is 8, but must lie in \[-8, 7\]",
        ),
        ((torch.full((4, 32), -9, dtype=torch.int8), torch.ones(4, 1)), r"is -9, but must lie in"),
        ((torch.ones(4, 32, dtype=torch.int8), torch.ones(4, 2)), r"scale has shape \[4, 2\], but must be \[4, 1\]"),
        ((torch.ones(4, 32, dtype=torch.int8), torch.full((4, 1), torch.nan)), r"scale\[0, 0\] is not finite"),
        ((torch.ones(4, 32, device="meta"),), "weight is on meta, but int4 kernels run on the CPU"),
    ],
)
def test_refuses_to_pack(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pack_int4_weight(*arguments)
    one_sentence(error)


@pytest.mark.parametrize("k", [0, 1, 31, 33, 39, 41, 64, 72])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_refuses_other_numbers_of_features(k, group):
    """Also those that share their padding to a multiple of 32."""
    packed = pack_int4_weight(torch.ones(20, 40), group_size=group)
    message = f"weight_only_linear: x has {k} features, but packed_weight was packed for 40"
    with pytest.raises(ValueError, match=message) as error:
        weight_only_linear(torch.ones(2, k), packed)
    one_sentence(error)
    with pytest.raises(ValueError, match=f"weight_only_linear: x has {k} features"):
        weight_only_linear(torch.ones(2, k), pack_int8_weight(torch.ones(20, 40)))


def test_the_size_tells_the_features():
    for group in (32, 96, 1024):
        for k in (1, 31, 32, 33, 95, 97, 1000, 4097):
            packed = pack_int4_weight(
                torch.zeros(17, k, dtype=torch.int8), torch.ones(17, -(-k // group)), group_size=group
            )
            with pytest.raises(ValueError, match=f"but packed_weight was packed for {k}$"):
                weight_only_linear(torch.ones(1, k + 1), packed)


@PACK
@pytest.mark.parametrize(
    ("x", "bias", "activation", "message"),
    [
        (torch.ones(2, 40, dtype=torch.float64), None, None, "x is float64, but must be float32 or bfloat16"),
        (torch.ones(2, 40, dtype=torch.float16), None, None, "x is float16, but must be"),
        (torch.ones(2, 40, dtype=torch.int8), None, None, "x is int8, but must be"),
        (torch.tensor(1.0), None, None, "x is a scalar"),
        (torch.ones(2, 40), torch.ones(19), None, r"bias has shape \[19\], but must be \[20\]"),
        (torch.ones(2, 40), torch.ones(20, dtype=torch.float64), None, "bias is float64, but must be"),
        (torch.ones(2, 40), None, "softsign", "activation 'softsign' is unknown; use none, relu, relu6, gelu"),
    ],
)
def test_refuses_wrong_input(pack, x, bias, activation, message):
    with pytest.raises(ValueError, match=f"weight_only_linear: {message}") as error:
        weight_only_linear(x, pack(torch.ones(20, 40)), bias, activation=activation)
    one_sentence(error)


def test_refuses_damaged_packed_weights():
    x, data = torch.ones(2, 40), pack_int4_weight(torch.ones(20, 40)).data
    op = torch.ops.lamina.weight_only_linear
    with pytest.raises(ValueError, match=r"packed_weight.data has \d+ bytes, but a weight \[20, 40\] in groups of 32"):
        op(x, data[:50], None, None, None, 20, 32, "none")
    with pytest.raises(ValueError, match=r"packed_weight\.data is int8, but must be uint8"):
        op(x, data.view(torch.int8), None, None, None, 20, 32, "none")
    with pytest.raises(ValueError, match=r"packed_weight\.data must be contiguous"):
        op(x, data[::2], None, None, None, 20, 32, "none")
    with pytest.raises(ValueError, match="an int8 packed_weight has scale and compensation"):
        op(x, data.view(torch.int8), None, None, None, 20, 0, "none")
    with pytest.raises(ValueError, match="group_size is 31"):
        op(x, data, None, None, None, 20, 31, "none")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(3, 20), r"out has shape \[3, 20\], but must be \[2, \*\]"),
        (torch.empty(2, 20, dtype=torch.bfloat16), "out is bfloat16, but must be float32"),
        (torch.empty(20, 2).T, "the rows of out must be contiguous"),
    ],
)
def test_refuses_a_wrong_output(out, message):
    data = pack_int4_weight(torch.ones(20, 40)).data
    with pytest.raises(ValueError, match=f"weight_only_linear: {message}"):
        _C.weight_only_linear(torch.ones(2, 40), data, None, None, None, 32, "none", out)
