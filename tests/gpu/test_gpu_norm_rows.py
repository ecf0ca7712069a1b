"""layer_norm and rms_norm on a GPU, which are one kernel: as good as torch's, with their sums and their codes."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_composite, assert_exact

from lamina import ops
from lamina.reference.layer_norm import layer_norm as layer_norm_reference
from lamina.reference.quantize_rows import quantize_rows
from lamina.reference.rms_norm import rms_norm as rms_norm_reference

ON_GPU = torch.cuda.is_available()
FLOATS = [torch.float32, torch.bfloat16]


def assert_alike(actual, expected):
    """Of kernels with other outputs, whose threads may share a row out and add it up in another way."""
    rounding = 1e-2 if actual.dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding, equal_nan=True)


@dataclass(frozen=True)
class Norm:
    """One of the two; parameters: how many it has."""

    name: str
    parameters: int
    call: Callable
    codes: Callable
    of_torch: Callable
    reference: Callable

    def random(self, k, dtype, device):
        return [torch.randn(k).to(dtype).to(device) for _ in range(self.parameters)]

    def check(self, x, parameters=(), eps=1e-5, residual=None, shape=None):
        shape = x.shape[-1:] if shape is None else shape
        total = x if residual is None else x + residual
        parameters = list(parameters) or [None] * self.parameters
        wide = [t if t is None else t.double() for t in parameters]
        truth = self.reference(x.double(), shape, *wide, eps, None if residual is None else residual.double())
        actual = self.call(x, shape, *parameters, eps, residual=residual)
        assert actual.is_contiguous()
        alike = [t if t is None else t.to(total.dtype) for t in parameters]
        assert_composite(actual, self.of_torch(total, shape, *alike, eps), truth)
        return actual


NORMS = [
    Norm("layer_norm", 2, ops.layer_norm, ops.layer_norm_codes, F.layer_norm, layer_norm_reference),
    Norm("rms_norm", 1, ops.rms_norm, ops.rms_norm_codes, F.rms_norm, rms_norm_reference),
]


@pytest.fixture(params=NORMS, ids=lambda norm: norm.name)
def norm(request) -> Norm:
    return request.param


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(5, 77), (3, 1), (1, 768), (2, 4, 33), (70, 16), (19,), (2, 1500)], ids=str)
def test_as_good_as_torch(norm, device, shape, dtype, with_residual):
    x = torch.randn(shape).to(dtype).to(device)
    residual = torch.randn(shape).to(dtype).to(device) if with_residual else None
    norm.check(x, norm.random(shape[-1], dtype, device), 1e-5 if shape[-1] > 2 else 1.0, residual)
    norm.check(x, (), 1e-5 if shape[-1] > 2 else 1.0, residual)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_rows_longer_than_a_block(norm, device, offset):
    x, residual = torch.randn(2, 2, 20000, device=device) + offset
    weights = norm.random(20000, torch.float32, device)
    for added in (None, residual):
        result = norm.check(x, weights, residual=added)
        results = norm.codes(x, (20000,), *weights, residual=added, eps=1e-5)
        assert_alike(results.norm, result)
        assert_exact((results.codes.cpu(), results.scales.cpu()), quantize_rows(results.norm.cpu()))
    assert_exact(results.sum, x + residual)


@pytest.mark.skipif(not ON_GPU, reason="on the CPU float16 is torch's")
@pytest.mark.parametrize("with_residual", [False, True])
def test_float16(norm, device, with_residual):
    x = torch.randn(9, 200).half().to(device)
    norm.check(x, norm.random(200, torch.float16, device), residual=x.flip(0) if with_residual else None)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_mixed_dtypes_and_the_sum(norm, device, dtypes):
    x, residual = (torch.randn(4, 9, 67).to(dtype).to(device) for dtype in dtypes)
    weights = norm.random(67, torch.bfloat16, device)
    result, total = norm.call(x, (67,), *weights, residual=residual, return_sum=True)
    assert result.dtype is total.dtype is torch.float32
    assert_exact(total, x + residual)
    assert_alike(result, norm.call(x, (67,), *weights, residual=residual))
    assert_alike(result, norm.call(total, (67,), *weights))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_codes_are_those_of_the_norm(norm, device, dtype, with_residual):
    x = torch.randn(7, 3, 90).to(dtype).to(device)
    x[1, 2], x[2, 0, 5], x[3, 1, 7] = 0.0, float("nan"), float("inf")
    residual = torch.randn(7, 3, 90).to(dtype).to(device) if with_residual else None
    weights = norm.random(90, dtype, device)
    result, total, codes, scales = norm.codes(x, (90,), *weights, residual=residual, eps=1e-5)
    assert_alike(result, norm.call(x, (90,), *weights, residual=residual, eps=1e-5))
    assert_exact((codes.cpu(), scales.cpu()), quantize_rows(result.cpu()))
    if with_residual:
        assert_exact(total, x + residual)
    else:
        assert total.numel() == 0


@pytest.mark.parametrize("layout", ["transposed", "every_second", "row_repeated", "swapped"])
def test_strides(norm, device, layout):
    x = torch.randn(6, 40, 60, device=device)
    x = {
        "transposed": x[0].T,
        "every_second": x[1, ::2, ::2],
        "row_repeated": x[0, :1].expand(7, 60),
        "swapped": x.transpose(0, 1),
    }[layout]
    residual = torch.randn(x.shape, device=device)
    norm.check(x, residual=residual)
    norm.check(residual, residual=x)


def test_rows_of_several_dimensions(norm, device):
    x = torch.randn(3, 4, 5, 6, device=device)
    norm.check(x, [torch.randn(5, 6, device=device) for _ in range(norm.parameters)], shape=(5, 6))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_nothing(norm, device, shape):
    x = torch.empty(shape, device=device)
    assert norm.call(x, shape[-1:]).shape == shape
    results = norm.codes(x, shape[-1:], residual=x)
    assert results.codes.shape == shape
    assert_exact(results.scales, torch.zeros(shape[:-1], device=device))


def test_a_bad_row_stays_alone(norm, device):
    x = torch.randn(9, 67, device=device)
    clean = norm.call(x, (67,))
    x[4, 40] = float("nan")
    result = norm.call(x, (67,))
    others = [i for i in range(9) if i != 4]
    assert result[4].isnan().all()
    assert_exact(result[others], clean[others])


def test_refuses_what_does_not_fit(norm, device):
    x = torch.randn(2, 6, device=device)
    with pytest.raises(ValueError, match=norm.name + r": input is \[2, 6\], but must end in normalized_shape, \[5\]"):
        norm.call(x, (5,))
    with pytest.raises(ValueError, match=norm.name + r": weight is \[5\], but must have the shape of the rows, \[6\]"):
        norm.call(x, (6,), torch.ones(5, device=device))
    with pytest.raises(ValueError, match=f"{norm.name}: normalized_shape is empty"):
        norm.codes(x, ())


def _compiled(norm: Norm, dtype: torch.dtype, k: int, *, residual: bool = False, codes: bool = False):
    def launch():
        kernel = getattr(import_module(f"lamina.kernels.{norm.name}"), norm.name)
        rows, weight = torch.empty(64, k, dtype=dtype, device="meta"), torch.empty(k, dtype=dtype, device="meta")
        kernel(
            rows,
            *[weight] * norm.parameters,
            1e-5,
            rows if residual else None,
            rows,
            rows if residual else None,
            rows.to(torch.int8) if codes else None,
            torch.empty(64, device="meta") if codes else None,
        )

    return launch


COMPILED = [
    _compiled(norm, dtype, k, **wanted)
    for norm in NORMS
    for dtype, k, wanted in (
        (torch.bfloat16, 768, {}),
        (torch.bfloat16, 4096, {"residual": True, "codes": True}),
        (torch.float32, 16384, {"residual": True, "codes": True}),
        (torch.float16, 28672, {"residual": True, "codes": True}),
    )
]
