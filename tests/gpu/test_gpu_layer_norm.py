"""layer_norm on a GPU: as good as torch's, with its sum and its codes."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_composite, assert_exact

from lamina.ops import layer_norm, layer_norm_codes
from lamina.reference.layer_norm import layer_norm as reference
from lamina.reference.quantize_rows import quantize_rows

ON_GPU = torch.cuda.is_available()
FLOATS = [torch.float32, torch.bfloat16]


def assert_alike(actual, expected):
    """Of kernels with other outputs, whose threads may share a row out and add it up in another way."""
    rounding = 1e-2 if actual.dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding, equal_nan=True)


def parameters(k, dtype, device):
    return [torch.randn(k).to(dtype).to(device) for _ in range(2)]


def check(x, parameters=(), eps=1e-5, residual=None, shape=None):
    shape = x.shape[-1:] if shape is None else shape
    total = x if residual is None else x + residual
    parameters = list(parameters) or [None] * 2
    wide = [t if t is None else t.double() for t in parameters]
    truth = reference(x.double(), shape, *wide, eps, None if residual is None else residual.double())
    actual = layer_norm(x, shape, *parameters, eps, residual=residual)
    assert actual.is_contiguous()
    alike = [t if t is None else t.to(total.dtype) for t in parameters]
    assert_composite(actual, F.layer_norm(total, shape, *alike, eps), truth)
    return actual


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(5, 77), (3, 1), (1, 768), (2, 4, 33), (70, 16), (19,), (2, 1500)], ids=str)
def test_as_good_as_torch(device, shape, dtype, with_residual):
    x = torch.randn(shape).to(dtype).to(device)
    residual = torch.randn(shape).to(dtype).to(device) if with_residual else None
    check(x, parameters(shape[-1], dtype, device), 1e-5 if shape[-1] > 2 else 1.0, residual)
    check(x, (), 1e-5 if shape[-1] > 2 else 1.0, residual)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_rows_longer_than_a_block(device, offset):
    x, residual = torch.randn(2, 2, 20000, device=device) + offset
    weights = parameters(20000, torch.float32, device)
    for added in (None, residual):
        norm = check(x, weights, residual=added)
        results = layer_norm_codes(x, (20000,), *weights, residual=added)
        assert_alike(results.norm, norm)
        assert_exact((results.codes.cpu(), results.scales.cpu()), quantize_rows(results.norm.cpu()))
    assert_exact(results.sum, x + residual)


@pytest.mark.skipif(not ON_GPU, reason="on the CPU float16 is torch's")
@pytest.mark.parametrize("with_residual", [False, True])
def test_float16(device, with_residual):
    x = torch.randn(9, 200).half().to(device)
    check(x, parameters(200, torch.float16, device), residual=x.flip(0) if with_residual else None)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_mixed_dtypes_and_the_sum(device, dtypes):
    x, residual = (torch.randn(4, 9, 67).to(dtype).to(device) for dtype in dtypes)
    weights = parameters(67, torch.bfloat16, device)
    norm, total = layer_norm(x, (67,), *weights, residual=residual, return_sum=True)
    assert norm.dtype is total.dtype is torch.float32
    assert_exact(total, x + residual)
    assert_alike(norm, layer_norm(x, (67,), *weights, residual=residual))
    assert_alike(norm, layer_norm(total, (67,), *weights))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_codes_are_those_of_the_norm(device, dtype, with_residual):
    x = torch.randn(7, 3, 90).to(dtype).to(device)
    x[1, 2], x[2, 0, 5], x[3, 1, 7] = 0.0, float("nan"), float("inf")
    residual = torch.randn(7, 3, 90).to(dtype).to(device) if with_residual else None
    weights = parameters(90, dtype, device)
    norm, total, codes, scales = layer_norm_codes(x, (90,), *weights, residual=residual)
    assert_alike(norm, layer_norm(x, (90,), *weights, residual=residual))
    assert_exact((codes.cpu(), scales.cpu()), quantize_rows(norm.cpu()))
    if with_residual:
        assert_exact(total, x + residual)
    else:
        assert total.numel() == 0


@pytest.mark.parametrize("layout", ["transposed", "every_second", "row_repeated", "swapped"])
def test_strides(device, layout):
    x = torch.randn(6, 40, 60, device=device)
    x = {
        "transposed": x[0].T,
        "every_second": x[1, ::2, ::2],
        "row_repeated": x[0, :1].expand(7, 60),
        "swapped": x.transpose(0, 1),
    }[layout]
    residual = torch.randn(x.shape, device=device)
    check(x, residual=residual)
    check(residual, residual=x)


def test_rows_of_several_dimensions(device):
    x = torch.randn(3, 4, 5, 6, device=device)
    check(x, [torch.randn(5, 6, device=device) for _ in range(2)], shape=(5, 6))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_nothing(device, shape):
    x = torch.empty(shape, device=device)
    assert layer_norm(x, shape[-1:]).shape == shape
    results = layer_norm_codes(x, shape[-1:], residual=x)
    assert results.codes.shape == shape
    assert_exact(results.scales, torch.zeros(shape[:-1], device=device))


def test_a_bad_row_stays_alone(device):
    x = torch.randn(9, 67, device=device)
    clean = layer_norm(x, (67,))
    x[4, 40] = float("nan")
    norm = layer_norm(x, (67,))
    others = [i for i in range(9) if i != 4]
    assert norm[4].isnan().all()
    assert_exact(norm[others], clean[others])


def test_refuses_what_does_not_fit(device):
    x = torch.randn(2, 6, device=device)
    with pytest.raises(ValueError, match=r"layer_norm: input is \[2, 6\], but must end in normalized_shape, \[5\]"):
        layer_norm(x, (5,))
    with pytest.raises(ValueError, match=r"layer_norm: weight is \[5\], but must have the shape of the rows, \[6\]"):
        layer_norm(x, (6,), torch.ones(5, device=device))
    with pytest.raises(ValueError, match="layer_norm: normalized_shape is empty"):
        layer_norm_codes(x, ())


def _compiled(dtype: torch.dtype, k: int, *, residual: bool = False, codes: bool = False):
    def launch():
        from lamina.kernels.layer_norm import layer_norm as kernel

        rows, weight = torch.empty(64, k, dtype=dtype, device="meta"), torch.empty(k, dtype=dtype, device="meta")
        kernel(
            rows,
            weight,
            weight,
            1e-5,
            rows if residual else None,
            rows,
            rows if residual else None,
            rows.to(torch.int8) if codes else None,
            torch.empty(64, device="meta") if codes else None,
        )

    return launch


COMPILED = [
    _compiled(torch.bfloat16, 768),
    _compiled(torch.bfloat16, 4096, residual=True, codes=True),
    _compiled(torch.float32, 16384, residual=True, codes=True),
    _compiled(torch.float16, 28672, residual=True, codes=True),
]
