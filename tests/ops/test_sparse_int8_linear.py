"""sparse_int8_linear: the bits of the dense layer, its packed format, and every way to call it wrongly."""

import pytest
import torch
from cases import LAYOUTS, zero_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import ACTIVATION_SLOPE, activation_error, assert_exact, assert_sum

import lamina
from lamina import FormatError
from lamina.ops import (
    PackedSparseInt8Weight,
    int8_linear,
    layer_norm_panels,
    pack_int8_weight,
    pack_sparse_int8_weight,
    quantize_panels,
    sparse_int8_linear,
    sparse_int8_linear_panels,
    token_panels,
    token_rows,
    unpack_sparse_int8_weight,
)
from lamina.ops.sparse_int8_linear import PATTERNS as ALL
from lamina.ops.sparse_int8_linear import block_density
from lamina.quant import dequantize_weight, quantize_weight
from lamina.reference.sparse_int8_linear import sparse_int8_linear_panels as panels_reference

PATTERNS = pytest.mark.parametrize("pattern", ALL)
LARGEST_K = (2**31 - 1) // (127 * 127)


def codes_of(n: int, k: int, pattern: str, density: float, generator: torch.Generator) -> torch.Tensor:
    codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    return zero_blocks(codes, pattern, density, generator)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    pattern=st.sampled_from(ALL),
    n=st.integers(0, 70),
    k=st.integers(0, 70),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_pack_and_unpack_are_inverse(pattern, n, k, density, seed):
    codes = codes_of(n, k, pattern, density, torch.Generator().manual_seed(seed))
    packed = pack_sparse_int8_weight(codes, torch.ones(n), pattern=pattern)
    assert_exact(unpack_sparse_int8_weight(packed, k), codes)


def test_packing_takes_any_strides(generator):
    weight = zero_blocks(torch.randn(70, 33, generator=generator), "2x4", 0.3, generator)
    plain = pack_sparse_int8_weight(weight, pattern="2x4")
    for layout in ("transposed", "misaligned", "sliced", "every_second"):
        for ours, expected in zip(pack_sparse_int8_weight(LAYOUTS[layout](weight), pattern="2x4"), plain, strict=True):
            assert_exact(ours, expected, layout)


@PATTERNS
def test_packed_bytes(pattern, generator):
    """Codes, two bytes for the place of each block, and little else."""
    n, k = 768, 3072
    codes = torch.ones(n, k, dtype=torch.int8)
    kept = pack_sparse_int8_weight(zero_blocks(codes, pattern, 0.1, generator), torch.ones(n), pattern=pattern)
    height = int(pattern[0])
    assert sum(t.nbytes for t in kept) <= 0.11 * n * k * (1 + 2 / (4 * height)) + 24 * n


# -- the same bits as the dense layer


@PATTERNS
@pytest.mark.parametrize(("m", "k", "n"), [(1, 300, 40), (3, 1541, 37), (9, 77, 70), (40, 1541, 37), (70, 96, 130)])
def test_bits_of_the_dense_layer(pattern, m, k, n, isa, generator):
    codes, scale = codes_of(n, k, pattern, 0.25, generator), torch.rand(n, generator=generator)
    x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
    residual = torch.randn(m, n, generator=generator)
    dense, sparse = pack_int8_weight(codes, scale), pack_sparse_int8_weight(codes, scale, pattern=pattern)
    with lamina.force_isa(isa):
        for options in ({}, {"activation": "gelu", "residual": residual}, {"out_scale": torch.tensor(0.2)}):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                expected = int8_linear(x, dense, bias, **options)
                assert_exact(sparse_int8_linear(x, sparse, bias, **options), expected, f"{options} {threads}")


@PATTERNS
@pytest.mark.parametrize("rows", [1, 5])
def test_extremes_do_not_saturate_or_wrap(pattern, rows, isa):
    for x_sign in (1, -1):
        for w_sign in (1, -1):
            x = torch.full((rows, LARGEST_K), 127.0 * x_sign)
            weight = torch.full((5, LARGEST_K), 127 * w_sign, dtype=torch.int8)
            with lamina.force_isa(isa):
                y = sparse_int8_linear(x, pack_sparse_int8_weight(weight, torch.ones(5), pattern=pattern))
            expected = float(127 * 127 * LARGEST_K * x_sign * w_sign)
            assert_exact(y, torch.full((rows, 5), expected), isa)


def test_codes_of_minus_128(isa):
    """Codes that somebody else made may use the one value that ours never take."""
    codes = torch.full((6, 40), -128, dtype=torch.int8)
    for pattern in ALL:
        packed = pack_sparse_int8_weight(torch.full((5, 40), -127, dtype=torch.int8), torch.ones(5), pattern=pattern)
        with lamina.force_isa(isa):
            y = sparse_int8_linear(codes, packed, x_scale=torch.tensor(1.0))
        assert_exact(y, torch.full((6, 5), 128.0 * 127 * 40), isa)


@PATTERNS
def test_a_weight_of_zeros_gives_the_bias(pattern, generator):
    bias = torch.randn(20, generator=generator)
    packed = pack_sparse_int8_weight(torch.zeros(20, 36), pattern=pattern)
    for m in (1, 6):
        assert_exact(sparse_int8_linear(torch.randn(m, 36), packed, bias), bias.expand(m, 20).contiguous())


def test_a_row_with_nan_gives_nan(generator):
    packed = pack_sparse_int8_weight(torch.randn(20, 36, generator=generator))
    for m in (2, 7):
        x = torch.randn(m, 36, generator=generator)
        x[1, 3] = float("inf")
        y = sparse_int8_linear(x, packed)
        assert y[1].isnan().all()
        assert y[0].isfinite().all()


def test_work_is_shared_by_blocks(generator):
    """All blocks in the first channels: the others' outputs still come, for every number of threads."""
    weight = torch.zeros(300, 256)
    weight[:16] = torch.randn(16, 256, generator=generator)
    packed, x = pack_sparse_int8_weight(weight), torch.randn(8, 256, generator=generator)
    expected = int8_linear(x, pack_int8_weight(weight))
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        assert_exact(sparse_int8_linear(x, packed), expected, str(threads))


# -- gradients


def test_gradients_are_those_of_the_dense_layer(generator):
    weight = zero_blocks(torch.randn(20, 33, generator=generator), "4x4", 0.4, generator)
    codes, scale = quantize_weight(weight)
    x = torch.randn(5, 33, generator=generator, requires_grad=True)
    bias = torch.randn(20, generator=generator, requires_grad=True)
    residual = torch.randn(5, 20, generator=generator, requires_grad=True)
    packed = pack_sparse_int8_weight(weight)
    grad = torch.randn(5, 20, generator=generator)
    sparse_int8_linear(x, packed, bias, activation="relu", residual=residual).backward(grad)
    before = int8_linear(x.detach(), pack_int8_weight(weight), bias.detach(), residual=residual.detach())
    passed = grad.double().where(before > 0, 0.0)
    dense = dequantize_weight(codes, scale).double()
    assert_sum(x.grad, passed @ dense, terms=20, magnitude=passed.abs() @ dense.abs())
    assert_sum(bias.grad, passed.sum(0), terms=5, magnitude=passed.abs().sum(0))
    assert_exact(residual.grad, passed.float())


# -- what is refused


def test_density():
    weight = torch.zeros(9, 10)
    assert block_density(weight, "4x4") == 0
    weight[8, 9] = 1e-3
    assert block_density(weight, "4x4") == pytest.approx(1 / 9)
    assert block_density(weight, "1x4") == pytest.approx(1 / 27)
    assert block_density(torch.ones(0, 4), "2x4") == 0
    assert block_density(torch.ones(3, 5), "2x4") == 1


def test_refused_weights(generator):
    weight = torch.randn(8, 8, generator=generator)
    for pattern in ("4x1", "3x3", "3:4", "unstructured"):
        with pytest.raises(ValueError, match=f"pattern '{pattern}' is unknown; use 1x4, 2x4, 4x4"):
            pack_sparse_int8_weight(weight, pattern=pattern)
    with pytest.raises(ValueError, match=r"weight has shape \[8\], but must be \[N, K\]"):
        pack_sparse_int8_weight(weight[0])
    with pytest.raises(ValueError, match="an int8 weight needs its scale"):
        pack_sparse_int8_weight(weight.to(torch.int8))
    with pytest.raises(ValueError, match="scale goes with an int8 weight"):
        pack_sparse_int8_weight(weight, torch.ones(8))
    with pytest.raises(ValueError, match="output channel 0 has a NaN or infinite weight"):
        pack_sparse_int8_weight(torch.full((2, 4), float("nan")))
    codes = torch.zeros(3, 4, dtype=torch.int8)
    codes[1, 2] = -128
    with pytest.raises(ValueError, match=r"weight\[1, 2\] is -128, but codes must lie in \[-127, 127\]"):
        pack_sparse_int8_weight(codes, torch.ones(3))
    with pytest.raises(ValueError, match=r"scale\[0\] is inf, but must be finite and not negative"):
        pack_sparse_int8_weight(torch.zeros(1, 4, dtype=torch.int8), torch.tensor([float("inf")]))
    with pytest.raises(ValueError, match=f"in_features is {LARGEST_K + 1}, but int32 sums are exact only up to"):
        pack_sparse_int8_weight(torch.zeros(1, LARGEST_K + 1, dtype=torch.int8), torch.ones(1))
    with pytest.raises(ValueError, match="weight is on meta, but int8 kernels run on the CPU"):
        pack_sparse_int8_weight(torch.empty(4, 4, device="meta"))


def test_refused_packed_data(generator):
    packed = pack_sparse_int8_weight(torch.randn(8, 12, generator=generator))
    x = torch.randn(2, 12, generator=generator)

    def call(data: torch.Tensor) -> torch.Tensor:
        return sparse_int8_linear(x, packed._replace(data=data))

    with pytest.raises(FormatError, match=r"packed_weight\.data is no packed sparse weight"):
        call(torch.zeros(500, dtype=torch.uint8))
    with pytest.raises(FormatError, match=r"packed_weight\.data is no packed sparse weight"):
        call(packed.data[:20])
    with pytest.raises(FormatError, match="has format version 9, but this lamina reads version 1"):
        call(changed(packed.data, 8, 9))
    with pytest.raises(FormatError, match="is truncated or damaged: its header does not go with"):
        call(packed.data[:-1])
    with pytest.raises(FormatError, match="has pattern '5x4', but must have one of 1x4, 2x4, 4x4"):
        call(changed(packed.data, 24, ord("5")))
    with pytest.raises(FormatError, match="is damaged: its header has slabs of 16 channels and steps of 3 blocks"):
        call(changed(packed.data, 20, 3))
    last = (packed.data != 0).nonzero()[-1].item()  # a value; the sections before it hold places
    for place in range(104, last - 64, 2):
        if packed.data[place]:
            with pytest.raises(FormatError, match="damaged"):
                unpack_sparse_int8_weight(packed._replace(data=changed(packed.data, place + 1, 0x7F)), 12)
            break
    with pytest.raises(FormatError, match=r"is int8\[.*, but must be uint8"):
        call(packed.data.to(torch.int8))
    other = lamina.ops.pack_sparse_weight(torch.randn(8, 12), pattern="4x1")
    with pytest.raises(FormatError, match="has pattern '4x1', but must have one of"):
        call(other.data)


def changed(data: torch.Tensor, at: int, value: int) -> torch.Tensor:
    data = data.clone()
    data[at] = value
    return data


def test_refused_calls(generator):
    packed = pack_sparse_int8_weight(torch.randn(8, 12, generator=generator))
    x = torch.randn(2, 12, generator=generator)
    with pytest.raises(ValueError, match="sparse_int8_linear: x has 11 features, but packed_weight was packed for 12"):
        sparse_int8_linear(x[:, :11], packed)
    with pytest.raises(ValueError, match=r"scale has 7 channels, but packed_weight.data has 8"):
        sparse_int8_linear(x, packed._replace(scale=packed.scale[:7].clone()))
    with pytest.raises(ValueError, match="sparse_int8_linear: x is a scalar"):
        sparse_int8_linear(torch.tensor(1.0), packed)
    with pytest.raises(ValueError, match=r"x is float64.*, but must be float32 or bfloat16"):
        sparse_int8_linear(x.double(), packed)
    with pytest.raises(ValueError, match="x is int8, but x_scale"):
        sparse_int8_linear(x.to(torch.int8), packed)
    with pytest.raises(ValueError, match="activation 'swish' is unknown; use none, relu"):
        sparse_int8_linear(x, packed, activation="swish")
    with pytest.raises(ValueError, match=r"residual has shape \[2, 12\], but must be \[2, 8\] like the output"):
        sparse_int8_linear(x, packed, residual=x)
    broken = PackedSparseInt8Weight(packed.data, packed.scale, packed.compensation[:8].clone())
    with pytest.raises(ValueError, match=r"packed_weight.compensation has shape \[8\], but must be \[16\]"):
        sparse_int8_linear(x, broken)


# -- from panels of tokens to panels


def panels_of(pattern: str, k: int, n: int, tokens: int, generator: torch.Generator) -> tuple:
    """x [tokens, K], its codes in panels, a packed weight, a bias, a residual [tokens, N]."""
    x, weight = torch.randn(tokens, k, generator=generator), torch.randn(n, k, generator=generator)
    packed = pack_sparse_int8_weight(zero_blocks(weight, pattern, 0.3, generator), pattern=pattern)
    bias, residual = torch.randn(n, generator=generator), torch.randn(tokens, n, generator=generator)
    return x, quantize_panels(token_panels(x)), packed, bias, residual


@PATTERNS
@pytest.mark.parametrize("tokens", [1, 32, 100])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (7, 17), (33, 40), (64, 31), (1700, 24)])
def test_panels_give_the_bits_of_rows(pattern, tokens, k, n, isa, generator):
    x, codes, packed, bias, residual = panels_of(pattern, k, n, tokens, generator)
    with lamina.force_isa(isa):
        for options in ({}, {"bias": bias}, {"bias": bias.bfloat16(), "activation": "relu"}):
            ours = sparse_int8_linear_panels(*codes, packed, **options)
            assert_exact(token_rows(ours, (tokens,)), sparse_int8_linear(x, packed, **options), str(options))
        for activation in ACTIVATION_SLOPE:
            ours = sparse_int8_linear_panels(
                *codes, packed, bias, activation=activation, residual=token_panels(residual)
            )
            truth = sparse_int8_linear(x, packed, bias, activation=activation, residual=residual)
            assert_exact(token_rows(ours, (tokens,)), truth, activation)
            quantized = sparse_int8_linear_panels(
                *codes, packed, bias, activation=activation, residual=token_panels(residual), quantize=True
            )
            assert_exact(quantized, quantize_panels(ours), activation)


@PATTERNS
def test_panels_match_the_reference(pattern, isa, generator):
    _, codes, packed, bias, residual = panels_of(pattern, 37, 50, 70, generator)
    weight = unpack_sparse_int8_weight(packed, 37)
    with lamina.force_isa(isa):
        ours = sparse_int8_linear_panels(*codes, packed, bias, activation="gelu", residual=token_panels(residual))
    arguments = (*codes, weight, packed.scale, bias)
    truth = panels_reference(*arguments, "gelu", token_panels(residual))
    linear = panels_reference(*arguments, "none", token_panels(residual))
    magnitude = linear.abs() + 2 * bias.double().abs()[:, None] + 2 * token_panels(residual).double().abs()
    extra = activation_error("gelu", linear)
    assert_sum(ours, truth, terms=3, magnitude=ACTIVATION_SLOPE["gelu"] * magnitude, extra=extra)


@pytest.mark.parametrize("tokens", [20, 100, 300])
def test_panels_do_not_depend_on_threads(tokens, isa, generator):
    """Shares of panels, and of the channels of one panel."""
    _, codes, packed, bias, residual = panels_of("4x4", 512, 700, tokens, generator)
    residual = token_panels(residual)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with lamina.force_isa(isa):
            results.append(
                (
                    sparse_int8_linear_panels(*codes, packed, bias, residual=residual),
                    *sparse_int8_linear_panels(*codes, packed, bias, activation="gelu", quantize=True),
                )
            )
    for other in results[1:]:
        assert_exact(other, results[0])


@pytest.mark.parametrize("tokens", [20, 100])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_of_the_result_is_the_norm_of_panels(tokens, affine, isa, generator):
    """By whole panels, and where the channels of one are shared out."""
    _, codes, packed, bias, residual = panels_of("4x4", 512, 700, tokens, generator)
    residual = token_panels(residual)
    weight, shift = (torch.randn(700, generator=generator) if affine else None for _ in range(2))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with lamina.force_isa(isa):
            result = sparse_int8_linear_panels(*codes, packed, bias, residual=residual)
            ours = sparse_int8_linear_panels(*codes, packed, bias, residual=residual, norm=(weight, shift, 1e-5))
            assert_exact(ours, layer_norm_panels(result, weight, shift, 1e-5), f"{threads} threads")


def test_panels_without_anything():
    packed = pack_sparse_int8_weight(torch.zeros(0, 8))
    assert sparse_int8_linear_panels(*quantize_panels(torch.ones(2, 8, 32)), packed).shape == (2, 0, 32)
    packed = pack_sparse_int8_weight(torch.ones(5, 8))
    assert sparse_int8_linear_panels(*quantize_panels(torch.ones(0, 8, 32)), packed).shape == (0, 5, 32)
    packed = pack_sparse_int8_weight(torch.ones(5, 0))
    assert (sparse_int8_linear_panels(*quantize_panels(torch.ones(2, 0, 32)), packed) == 0).all()


def test_a_token_that_is_not_finite_stays_alone(isa, generator):
    x, _, packed, bias, _ = panels_of("4x4", 24, 20, 40, generator)
    with lamina.force_isa(isa):
        clean = sparse_int8_linear(x, packed, bias)
        x[3, 5], x[35, 1] = float("nan"), float("inf")
        rows = token_rows(sparse_int8_linear_panels(*quantize_panels(token_panels(x)), packed, bias), (40,))
    bad = torch.tensor([3, 35])
    assert rows[bad].isnan().all()
    kept = torch.ones(40, dtype=torch.bool).index_fill(0, bad, False)
    assert_exact(rows[kept], clean[kept])


def test_opcheck_of_panels(generator):
    _, codes, packed, bias, residual = panels_of("4x4", 24, 20, 40, generator)
    arguments = (*codes, *packed, bias, "gelu", token_panels(residual))
    torch.library.opcheck(torch.ops.lamina.sparse_int8_linear.panels, arguments)
    torch.library.opcheck(torch.ops.lamina.sparse_int8_linear.panel_codes, arguments)
    norm = (torch.ones(20), None, 1e-5)
    torch.library.opcheck(torch.ops.lamina.sparse_int8_linear.panel_norm, (*arguments, *norm))


def test_bad_panels(generator):
    _, (codes, scales), packed, bias, residual = panels_of("4x4", 24, 20, 40, generator)
    residual = token_panels(residual)
    for arguments, options, message in (
        ((codes.to(torch.int8), scales, packed), {}, "sparse_int8_linear_panels: x_codes is int8"),
        ((codes[0], scales, packed), {}, r"x_codes has shape \[6, 32, 4\]"),
        ((codes[:, :5].contiguous(), scales, packed), {}, "x_codes has 5 groups of four features, but packed_weight"),
        ((codes[:, ::2], scales, packed), {}, "x_codes must be contiguous"),
        ((codes, scales[:1], packed), {}, r"x_scales has shape \[1, 32\]"),
        ((codes, scales, packed._replace(scale=packed.scale[:5])), {}, "packed_weight.scale has 5 channels"),
        ((codes, scales, packed, bias[:7]), {}, "bias has shape"),
        ((codes, scales, packed), {"residual": residual[:1]}, "residual has shape"),
        ((codes, scales, packed), {"residual": residual.mT.contiguous().mT}, "the features of residual must lie"),
        ((codes, scales, packed), {"activation": "swish"}, "activation 'swish' is unknown"),
        ((codes, scales, packed), {"norm": (torch.ones(9), None, 1e-5)}, "sparse_int8_linear_panels: weight has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_int8_linear_panels(*arguments, **options)
    with pytest.raises(FormatError, match="sparse_int8_linear_panels"):
        sparse_int8_linear_panels(codes, scales, packed._replace(data=torch.zeros_like(packed.data)))


def test_panels_run_on_vnni(isa, generator):
    _, codes, packed, _, _ = panels_of("4x4", 24, 20, 40, generator)
    with lamina.force_isa(isa):
        sparse_int8_linear_panels(*codes, packed)
        assert lamina._C.last_isa() == {"avx512bf16": "avx512vnni"}.get(isa, isa)
