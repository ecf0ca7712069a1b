"""group_norm: groups that are hard on the arithmetic, formats, instance norm, gradients, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_composite, assert_exact

from lamina import _C
from lamina.ops import group_norm
from lamina.reference.group_norm import group_norm as reference

FORMATS = pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


@FORMATS
@pytest.mark.parametrize("offset", [0.0, 1e2, -1e4])
def test_group_norm_far_from_zero_is_as_good_as_torch(isa, form, offset):
    x = (torch.randn(2, 24, 17, 19) + offset).contiguous(memory_format=form)
    truth = reference(x.double(), 4)
    assert_composite(group_norm(x, 4), F.group_norm(x.contiguous(), 4), truth, factor=1.0, floor=1e-6)


@FORMATS
@pytest.mark.parametrize("value", [0.0, 1.0, -3.25])
def test_group_norm_of_a_constant_group_is_the_bias(isa, form, value):
    weight, bias = torch.randn(6), torch.randn(6)
    x = torch.full((2, 6, 5, 7), value).contiguous(memory_format=form)
    assert_exact(group_norm(x, 2, weight, bias).contiguous(), bias[:, None, None].expand(2, 6, 5, 7).contiguous())


@FORMATS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_group_norm_spreads_nan_over_its_group_only(isa, form, bad):
    x = torch.randn(2, 12, 5, 7).contiguous(memory_format=form)
    clean = group_norm(x, 3)
    x[1, 5, 2, 3] = bad
    out = group_norm(x, 3)
    assert out[1, 4:8].isnan().all()
    out[1, 4:8] = clean[1, 4:8]
    assert_exact(out, clean)


@FORMATS
def test_group_norm_keeps_the_format(form):
    x = torch.randn(2, 12, 5, 7).contiguous(memory_format=form)
    assert group_norm(x, 3).is_contiguous(memory_format=form)
    assert group_norm(x[:, :, ::2], 3).is_contiguous()
    video = torch.randn(2, 4, 3, 5, 7).contiguous(memory_format=torch.channels_last_3d)
    assert group_norm(video, 2).is_contiguous(memory_format=torch.channels_last_3d)
    assert_exact(group_norm(video, 2).contiguous(), group_norm(video.contiguous(), 2))


def test_group_norm_of_single_channels_is_instance_norm(isa):
    x, weight, bias = torch.randn(3, 10, 9, 8), torch.randn(10), torch.randn(10)
    truth = F.instance_norm(x.double(), weight=weight.double(), bias=bias.double())
    assert_composite(group_norm(x, 10, weight, bias), F.instance_norm(x, weight=weight, bias=bias), truth)


@FORMATS
def test_group_norm_activates(isa, form):
    x, weight, bias = torch.randn(2, 12, 5, 7).contiguous(memory_format=form), torch.randn(12), torch.randn(12)
    plain = group_norm(x, 3, weight, bias)
    for activation in ("relu", "relu6", "gelu", "gelu_tanh", "quick_gelu", "silu", "hardswish", "tanh"):
        expected = reference(x.double(), 3, weight.double(), bias.double(), activation=activation)
        out = group_norm(x, 3, weight, bias, activation=activation)
        assert_composite(out, expected.float(), expected, floor=1e-5)
    assert_exact(group_norm(x, 3, weight, bias, activation="relu"), plain.relu())


def test_group_norm_in_place():
    """The compiled function may write its output over its input."""
    for x in (torch.randn(2, 12, 5, 7), torch.randn(2, 5, 7, 12).permute(0, 3, 1, 2), torch.randn(2, 24, 5, 7)[:, ::2]):
        expected = group_norm(x, 3)
        _C.group_norm(x, 3, None, None, 1e-5, "none", x)
        assert_exact(x.contiguous(), expected.contiguous())


def test_group_norm_writes_any_strides():
    x = torch.randn(2, 12, 5, 7)
    for out in (torch.empty(2, 5, 7, 12).permute(0, 3, 1, 2), torch.full((2, 12, 5, 14), 5.0)[..., ::2]):
        _C.group_norm(x, 3, None, None, 1e-5, "silu", out)
        assert_exact(out.contiguous(), group_norm(x, 3, activation="silu"))


def test_group_norm_has_torchs_gradient():
    def gradients(function):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(s, generator=generator).requires_grad_() for s in ((2, 6, 5), (6,), (6,))]
        function(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    ours = gradients(lambda x, w, b: group_norm(x, 3, w, b, activation="silu"))
    torchs = gradients(lambda x, w, b: F.silu(F.group_norm(x, 3, w, b)))
    for actual, expected in zip(ours, torchs, strict=True):
        torch.testing.assert_close(actual, expected)


def test_group_norm_leaves_the_rest_to_torch():
    x = torch.randn(2, 6, 5)
    assert_exact(group_norm(x.double(), 3, activation="relu"), F.group_norm(x.double(), 3).relu())
    assert group_norm(x.to("meta"), 3).shape == (2, 6, 5)


def test_group_norm_compiles():
    x = torch.randn(2, 9, 12)
    compiled = torch.compile(lambda x: group_norm(x, 3) + 1, fullgraph=True, backend="aot_eager")
    assert_exact(compiled(x), group_norm(x, 3) + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4,), r"group_norm: num_groups is 4, but must divide the channels of float32\[2, 6, 5\]"),
        ((0,), "group_norm: num_groups is 0, but must divide"),
        ((3, torch.ones(5)), r"group_norm: weight has shape \[5\], but must be \[6\]"),
        ((3, None, torch.ones(2, 3)), r"group_norm: bias has shape \[2, 3\], but must be \[6\]"),
    ],
)
def test_group_norm_refuses_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_norm(torch.randn(2, 6, 5), *arguments)


def test_group_norm_op_refuses_what_the_function_does_not_pass():
    op, x = torch.ops.lamina.group_norm, torch.randn(2, 6, 5)
    with pytest.raises(ValueError, match="group_norm: x is int32, but must be float32 or bfloat16"):
        op(x.int(), 3, None, None, 1e-5, "none")
    with pytest.raises(ValueError, match=r"group_norm: x is float32\[5\], but must be \[N, C, ...\]"):
        op(x[0, 0], 1, None, None, 1e-5, "none")
    with pytest.raises(ValueError, match="group_norm: weight is float64, but must be float32 or bfloat16"):
        op(x, 3, torch.ones(6).double(), None, 1e-5, "none")
    with pytest.raises(ValueError, match="group_norm: activation 'elu' is unknown"):
        op(x, 3, None, None, 1e-5, "elu")
    with pytest.raises(ValueError, match=r"group_norm: out is bfloat16\[2, 6, 5\], but must be float32\[2, 6, 5\]"):
        _C.group_norm(x, 3, None, None, 1e-5, "none", x.bfloat16())
