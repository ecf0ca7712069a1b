"""layer_norm: rows that are hard on the arithmetic, the second output, gradients, bad input; rms_norm has its own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_composite, assert_exact

import lamina
from lamina import _C
from lamina.ops import (
    layer_norm,
    layer_norm_codes,
    layer_norm_panels,
    quantize_panels,
    quantize_rows,
    token_panels,
    token_rows,
)
from lamina.reference.layer_norm import layer_norm as reference

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


def assert_as_good_as_torch(x, weight=None, bias=None, eps=1e-5, residual=None):
    shape = x.shape[-1:]
    total = x if residual is None else x + residual
    arguments = [t if t is None else t.double() for t in (weight, bias)]
    truth = reference(x.double(), shape, *arguments, eps, None if residual is None else residual.double())
    actual = layer_norm(x, shape, weight, bias, eps, residual=residual)
    assert_composite(actual, F.layer_norm(total, shape, weight, bias, eps), truth)


# -- rows that are hard on the arithmetic


@pytest.mark.parametrize("size", [1, 2, 17, 768, 5000])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.3, 1e4, 12345.678, 1e30])
def test_layer_norm_of_a_constant_row_is_the_bias(isa, value, size):
    """Exactly at zero, and to within what is left of the mean's rounding elsewhere."""
    bias = torch.randn(size)
    out = layer_norm(torch.full((3, size), value), (size,), torch.randn(size), bias)
    if value == 0.0 or size == 1:
        assert_exact(out, bias.expand(3, size).contiguous())
    else:
        assert_composite(out, bias.expand(3, size), bias.double().expand(3, size), floor=1e-6)


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
@pytest.mark.parametrize("size", [37, 768, 4097])
def test_layer_norm_far_from_zero_is_better_than_torch(isa, offset, size):
    """The mean's own rounding, up to eps * offset, is taken out of the result."""
    x = torch.randn(20, size) + offset
    truth = reference(x.double(), (size,))
    eager = F.layer_norm(x, (size,))
    assert_composite(layer_norm(x, (size,)), eager, truth, factor=1.0, floor=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_layer_norm_spreads_nan_over_its_row_only(isa, bad, dtype):
    x = torch.randn(5, 67).to(dtype)
    clean = layer_norm(x, (67,))
    x[2, 40] = bad
    for residual in (None, torch.zeros(5, 67, dtype=dtype)):
        out = layer_norm(x, (67,), residual=residual)
        assert out[2].isnan().all()
        assert_exact(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    out, total = layer_norm(torch.zeros_like(x), (67,), residual=x, return_sum=True)
    assert out[2].isnan().all()
    assert_exact(total, x)


def test_layer_norm_of_opposite_infinities_is_nan(isa):
    x, r = torch.full((1, 8), math.inf), torch.full((1, 8), -math.inf)
    assert layer_norm(x, (8,), residual=r).isnan().all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 300),
    offset=st.sampled_from([0.0, 3.0, -1e3]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    residual=st.booleans(),
    eps=st.sampled_from([1e-12, 1e-5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_layer_norm_is_as_good_as_torch(rows, size, offset, scale, residual, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    x, r = (scale * torch.randn(2, rows, size, generator=generator) + offset).unbind()
    if size < 3:  # two values may be equal to the last bit, and the truth is then all rounding
        eps = 1.0
    assert_as_good_as_torch(x, torch.randn(size), torch.randn(size), eps, r if residual else None)


def test_layer_norm_properties(isa):
    """Mean 0 and variance 1; unmoved by an offset and by a scale of the row."""
    x = torch.randn(10, 333, dtype=torch.float32)
    out = layer_norm(x, (333,), eps=0.0)
    assert out.double().mean(-1).abs().max() < 1e-6
    assert (out.double().var(-1, correction=0) - 1).abs().max() < 1e-6
    assert (layer_norm(4 * x, (333,), eps=0.0) - out).abs().max() < 1e-5
    assert (layer_norm(x + 64, (333,), eps=0.0) - out).abs().max() < 1e-3  # x itself loses bits


# -- the sum as well


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_layer_norm_returns_the_sum(isa, dtype, residual_dtype):
    x, r = torch.randn(4, 9, 67).to(dtype), torch.randn(4, 9, 67).to(residual_dtype)
    weight, bias = torch.randn(67), torch.randn(67)
    norm, total = layer_norm(x, (67,), weight, bias, residual=r, return_sum=True)
    assert_exact(total, x + r)
    assert_exact(norm, layer_norm(x, (67,), weight, bias, residual=r))
    assert norm.dtype == total.dtype == torch.promote_types(dtype, residual_dtype)


def test_layer_norm_broadcasts_the_residual():
    x, r = torch.randn(3, 5, 16), torch.randn(5, 16)
    assert_exact(layer_norm(x, (16,), residual=r), layer_norm(x, (16,), residual=r.expand(3, 5, 16).contiguous()))
    norm, total = layer_norm(r, (16,), residual=x, return_sum=True)
    assert_exact(total, x + r)
    assert_exact(norm, layer_norm(x, (16,), residual=r))


def test_layer_norm_with_sum_passes_opcheck():
    op = torch.ops.lamina.layer_norm.with_sum
    x, r = torch.randn(3, 5, 8).transpose(0, 1), torch.randn(5, 3, 8, dtype=torch.bfloat16)
    torch.library.opcheck(op, (x, [8], torch.randn(8), None, 1e-5, r))
    torch.library.opcheck(op, (x.bfloat16(), [3, 8], None, torch.randn(3, 8), 1e-5, r))


# -- the op in PyTorch's machinery


def test_layer_norm_compiles_and_exports():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(12)

        def forward(self, x, y):
            norm, total = layer_norm(x, (12,), self.norm.weight, self.norm.bias, residual=y, return_sum=True)
            return layer_norm(norm * total, self.norm.normalized_shape)

    model, x, y = Model(), torch.randn(2, 9, 12), torch.randn(2, 9, 12)
    with torch.no_grad():
        expected = model(x, y)
        assert_exact(torch.compile(model, fullgraph=True, backend="aot_eager")(x, y), expected)
        rows = torch.export.Dim("rows", min=2, max=64)
        exported = torch.export.export(model, (x, y), dynamic_shapes=({1: rows}, {1: rows}))
        targets = {node.target for node in exported.graph.nodes}
        assert {torch.ops.lamina.layer_norm.with_sum, torch.ops.lamina.layer_norm.default} <= targets
        longer = torch.randn(2, 2, 30, 12)
        assert_exact(exported.module()(*longer), model(*longer))


@pytest.mark.parametrize("return_sum", [False, True])
def test_layer_norm_has_torchs_gradient(return_sum):
    leaves = [torch.randn(4, 6), torch.randn(6), torch.randn(6), torch.randn(4, 6)]

    def gradients(function):
        x, weight, bias, r = (t.clone().requires_grad_() for t in leaves)
        function(x, weight, bias, r).square().sum().backward()
        return [t.grad for t in (x, weight, bias, r)]

    def ours(x, weight, bias, r):
        out = layer_norm(x, (6,), weight, bias, residual=r, return_sum=return_sum)
        return out[0] * out[1] if return_sum else out

    def torchs(x, weight, bias, r):
        norm = F.layer_norm(x + r, (6,), weight, bias)
        return norm * (x + r) if return_sum else norm

    for actual, expected in zip(gradients(ours), gradients(torchs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_layer_norm_leaves_the_rest_to_torch():
    x, r = torch.randn(4, 6), torch.randn(4, 6)
    for dtype in (torch.float64, torch.float16):
        assert_exact(layer_norm(x.to(dtype), (6,)), F.layer_norm(x.to(dtype), (6,)))
    norm, total = layer_norm(x.double(), (6,), residual=r.double(), return_sum=True)
    assert_exact(norm, F.layer_norm(x.double() + r.double(), (6,)))
    assert_exact(total, x.double() + r.double())
    assert layer_norm(x.to("meta"), (6,), residual=r.to("meta")).shape == (4, 6)


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (((7,),), {}, r"layer_norm: input is float32\[4, 6\], but must end in normalized_shape, float32\[7\]"),
        (((2, 4, 6),), {}, r"input is float32\[4, 6\], but must end in normalized_shape, float32\[2, 4, 6\]"),
        (((),), {}, "layer_norm: normalized_shape is empty"),
        (((6,), torch.ones(5)), {}, r"layer_norm: weight is float32\[5\], but must have the shape of the rows"),
        (((6,), None, torch.ones(2, 3)), {}, r"layer_norm: bias is float32\[2, 3\], but must have the shape"),
        (((6,),), {"return_sum": True}, "layer_norm: return_sum goes with a residual"),
    ],
)
def test_layer_norm_refuses_in_one_sentence(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(torch.randn(4, 6), *arguments, **options)


def test_layer_norm_op_refuses_what_the_function_does_not_pass():
    op, x = torch.ops.lamina.layer_norm, torch.randn(4, 6)
    with pytest.raises(ValueError, match="layer_norm: input is int32, but must be float32 or bfloat16"):
        op(x.int(), [6], None, None, 1e-5, None)
    with pytest.raises(ValueError, match="layer_norm: weight is float64, but must be float32 or bfloat16"):
        op(x, [6], torch.ones(6).double(), None, 1e-5, None)
    with pytest.raises(
        ValueError, match=r"residual is float32\[3, 6\], but must have the shape of input, float32\[4, 6"
    ):
        op(x, [6], None, None, 1e-5, x[:3])
    out = torch.empty(4, 6)
    with pytest.raises(ValueError, match="layer_norm: a sum is asked for, but there is no residual"):
        _C.layer_norm(x, [6], None, None, 1e-5, None, out, out)
    with pytest.raises(ValueError, match="layer_norm: out must be contiguous"):
        _C.layer_norm(x, [6], None, None, 1e-5, None, out.T.contiguous().T, None)
    with pytest.raises(ValueError, match=r"layer_norm: out is bfloat16\[4, 6\], but must have the shape"):
        _C.layer_norm(x, [6], None, None, 1e-5, None, out.bfloat16(), None)


def test_layer_norm_in_place():
    """The compiled function may write its output over an input."""
    x, r = torch.randn(2, 9, 100).unbind()
    expected = lamina.ops.layer_norm(x, (100,), residual=r)
    _C.layer_norm(x, [100], None, None, 1e-5, r, x, None)
    assert_exact(x, expected)


# -- panels of tokens


@pytest.mark.parametrize("size", [1, 2, 17, 130, 768, 5000])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none", "bfloat16"])
def test_panels_are_as_good_as_torch(isa, size, affine, generator):
    x = torch.randn(40, size, generator=generator) * 3 + 5
    weight = torch.randn(size, generator=generator) if affine in ("both", "weight", "bfloat16") else None
    bias = torch.randn(size, generator=generator) if affine in ("both", "bias", "bfloat16") else None
    if affine == "bfloat16":
        weight, bias = weight.bfloat16(), bias.bfloat16()
    out, *codes = layer_norm_panels(token_panels(x), weight, bias, 1e-5)
    widened = [t if t is None else t.float() for t in (weight, bias)]
    truth = reference(x.double(), (size,), *(t if t is None else t.double() for t in widened))
    assert_composite(token_rows(out, (40,)), F.layer_norm(x, (size,), *widened), truth)
    assert_exact(codes, quantize_panels(out))


@pytest.mark.parametrize("offset", [1e3, 1e5, -1e6])
def test_panels_far_from_zero_keep_their_digits(isa, offset, generator):
    x = torch.randn(33, 768, generator=generator) + offset
    out, *_ = layer_norm_panels(token_panels(x))
    truth = reference(x.double(), (768,))
    assert_composite(token_rows(out, (33,)), F.layer_norm(x, (768,)), truth)


@pytest.mark.parametrize("value", [0.0, -3.3, 12345.678, 1e30])
def test_a_constant_token_of_panels_is_the_bias(isa, value):
    bias = torch.arange(700.0)
    out, *_ = layer_norm_panels(torch.full((2, 700, 32), value), torch.ones(700), bias)
    assert_exact(out, bias[:, None].expand(2, 700, 32).contiguous())


def test_panels_keep_tokens_apart(isa, generator):
    x = torch.randn(64, 50, generator=generator)
    clean, *_ = layer_norm_panels(token_panels(x))
    x[3, 7], x[40, 0] = float("nan"), float("inf")
    out, _, scales = layer_norm_panels(token_panels(x))
    bad = torch.tensor([3, 40])
    kept = torch.ones(64, dtype=torch.bool).index_fill(0, bad, False)
    rows = token_rows(out, (64,))
    assert rows[bad].isnan().all()
    assert scales.flatten()[bad].isnan().all()
    assert_exact(rows[kept], token_rows(clean, (64,))[kept])


def test_panels_of_any_distance_and_thread_count(isa, generator):
    whole = torch.randn(9, 900, 32, generator=generator)
    part, weight = whole[:, 50:850], torch.randn(1600, generator=generator)[::2]
    torch.set_num_threads(1)
    alone = layer_norm_panels(part.contiguous(), weight.contiguous())
    torch.set_num_threads(2)
    assert_exact(layer_norm_panels(part, weight), alone)


def test_panels_opcheck(generator):
    x, weight = torch.randn(2, 10, 32, generator=generator), torch.ones(10)
    torch.library.opcheck(torch.ops.lamina.layer_norm.panels, (x, weight, None, 1e-5))


def test_panels_without_tokens():
    assert layer_norm_panels(torch.ones(0, 5, 32))[0].shape == (0, 5, 32)


def test_panels_that_do_not_fit():
    x = torch.ones(2, 10, 32)
    for arguments, message in (
        ((x[0],), r"layer_norm_panels: input has shape \[10, 32\], but must be \[panels, K, 32\]"),
        ((x[..., :16],), "layer_norm_panels: input has shape"),
        ((x.bfloat16(),), "layer_norm_panels: input is bfloat16"),
        ((x.mT.contiguous().mT,), "the features of input must lie one behind the other"),
        ((x, torch.ones(9)), "layer_norm_panels: weight has shape"),
        ((x, None, torch.ones(10).double()), "layer_norm_panels: bias is float64"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_norm_panels(*arguments)


# -- the codes as well


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_layer_norm_codes_are_quantize_rows_of_the_norm(dtype, with_residual):
    x = torch.randn(3, 5, 12).to(dtype)
    x[1, 2, 3] = math.nan
    residual = torch.randn(5, 12).to(dtype) if with_residual else None
    operands = (12,), torch.randn(12), torch.randn(12), 1e-5
    norm, total, codes, scales = layer_norm_codes(x, *operands, residual=residual)
    assert_exact(norm, layer_norm(x, *operands, residual=residual))
    assert_exact((codes, scales), quantize_rows(norm))
    if with_residual:
        assert_exact(total, x + residual)
    else:
        assert total.numel() == 0


def test_layer_norm_with_codes_passes_opcheck():
    op = torch.ops.lamina.layer_norm.with_codes
    x = torch.randn(3, 5, 12).transpose(0, 1)
    torch.library.opcheck(op, (x, [12], torch.randn(12), torch.randn(12), 1e-5, None))
    torch.library.opcheck(op, (x, [12], torch.randn(12), torch.randn(12), 1e-5, torch.randn(5, 3, 12)))
