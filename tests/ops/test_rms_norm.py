"""rms_norm: what it does not share with layer_norm, whose tests cover rows, strides and sums for both."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_composite, assert_exact

from lamina import _C
from lamina.ops import quantize_rows, rms_norm, rms_norm_codes
from lamina.reference.rms_norm import rms_norm as reference

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0])
def test_rms_norm_has_torchs_default_eps(isa, dtype, scale):
    x = (scale * torch.randn(5, 33)).to(dtype)
    assert_composite(rms_norm(x, (33,)), F.rms_norm(x, (33,)), reference(x.double(), (33,)))


def test_rms_norm_of_zeros_is_zero(isa):
    assert_exact(rms_norm(torch.zeros(3, 70), (70,), torch.randn(70)).abs(), torch.zeros(3, 70))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_treats_nan_and_infinity_as_torch_does(isa, dtype):
    x = torch.randn(6, 67).to(dtype)
    clean = rms_norm(x, (67,), eps=1e-6)
    x[2, 40], x[4, 3] = math.nan, math.inf
    out, eager = rms_norm(x, (67,), eps=1e-6), F.rms_norm(x, (67,), eps=1e-6)
    assert out[2].isnan().all()
    assert_exact(out[4], eager[4])
    assert_exact(out[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_rms_norm_returns_the_sum(isa, dtype, residual_dtype):
    x, r = torch.randn(4, 9, 67).to(dtype), torch.randn(4, 9, 67).to(residual_dtype)
    norm, total = rms_norm(x, (67,), torch.randn(67), residual=r, return_sum=True)
    assert_exact(total, x + r)
    assert norm.dtype == total.dtype == torch.promote_types(dtype, residual_dtype)
    plain, total = rms_norm(x, (67,), residual=r, return_sum=True)
    assert_exact(plain, rms_norm(x, (67,), residual=r))


def test_rms_norm_is_the_llama_formula(isa):
    """As transformers writes it: the statistics in float32, the weight last."""
    x, weight = torch.randn(3, 64), torch.randn(64)
    eager = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    truth = reference(x.double(), (64,), weight.double(), 1e-6)
    assert_composite(rms_norm(x, (64,), weight, 1e-6), eager, truth)


def test_rms_norm_with_sum_passes_opcheck():
    op = torch.ops.lamina.rms_norm.with_sum
    x, r = torch.randn(3, 5, 8).transpose(0, 1), torch.randn(5, 3, 8, dtype=torch.bfloat16)
    torch.library.opcheck(op, (x, [8], torch.randn(8), None, r))
    torch.library.opcheck(op, (x.bfloat16(), [3, 8], None, 1e-5, r))


@pytest.mark.parametrize("return_sum", [False, True])
def test_rms_norm_has_torchs_gradient(return_sum):
    leaves = [torch.randn(4, 6), torch.randn(6), torch.randn(4, 6)]

    def gradients(function):
        x, weight, r = (t.clone().requires_grad_() for t in leaves)
        function(x, weight, r).square().sum().backward()
        return [t.grad for t in (x, weight, r)]

    def ours(x, weight, r):
        out = rms_norm(x, (6,), weight, residual=r, return_sum=return_sum)
        return out[0] * out[1] if return_sum else out

    def torchs(x, weight, r):
        norm = F.rms_norm(x + r, (6,), weight)
        return norm * (x + r) if return_sum else norm

    for actual, expected in zip(gradients(ours), gradients(torchs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_rms_norm_leaves_the_rest_to_torch():
    x, r = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    assert_exact(rms_norm(x, (6,)), F.rms_norm(x, (6,)))
    norm, total = rms_norm(x, (6,), residual=r, return_sum=True)
    assert_exact(norm, F.rms_norm(x + r, (6,)))
    assert_exact(total, x + r)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (((7,),), {}, r"rms_norm: input is float32\[4, 6\], but must end in normalized_shape, float32\[7\]"),
        (((6,), torch.ones(5)), {}, r"rms_norm: weight is float32\[5\], but must have the shape of the rows"),
        (((6,),), {"return_sum": True}, "rms_norm: return_sum goes with a residual"),
    ],
)
def test_rms_norm_refuses_in_one_sentence(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.randn(4, 6), *arguments, **options)


# -- the codes as well


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_codes_are_quantize_rows_of_the_norm(dtype, with_residual):
    x = torch.randn(3, 5, 12).to(dtype)
    x[1, 2, 3] = math.nan
    residual = torch.randn(5, 12).to(dtype) if with_residual else None
    operands = (12,), torch.randn(12), 1e-6
    norm, total, codes, scales = rms_norm_codes(x, *operands, residual=residual)
    assert_exact(norm, rms_norm(x, *operands, residual=residual))
    assert_exact((codes, scales), quantize_rows(norm))
    if with_residual:
        assert_exact(total, x + residual)
    else:
        assert total.numel() == 0


def test_rms_norm_with_codes_passes_opcheck():
    op = torch.ops.lamina.rms_norm.with_codes
    x = torch.randn(3, 5, 12).transpose(0, 1)
    torch.library.opcheck(op, (x, [12], torch.randn(12), 1e-6, None))
    torch.library.opcheck(op, (x, [12], torch.randn(12), 1e-6, torch.randn(5, 3, 12)))
