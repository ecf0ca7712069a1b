"""Each pass on the smallest module that has its pattern: the result is eager's, and it was fused so often."""

import copy
import math
from functools import partial

import pytest
import torch
from tolerances import INT8_LAYER_SQNR_DB, assert_composite, assert_lossy
from torch import nn
from torch.nn import functional as F

import lamina
from lamina import _C
from lamina.compile import CompileReport, explain

EVERY = {"measure": False}
INT8 = {"measure": False, "config": lamina.Int8Dynamic()}


def check(module: nn.Module, *inputs: torch.Tensor, options=EVERY, factor: float = 2.0) -> CompileReport:
    """Float fusions agree with eager as well as eager with float64, but for a factor; returns what was fused."""
    module.eval()
    report = explain(module, inputs, options=options)
    compiled = torch.compile(module, backend="lamina", options=dict(options))
    with torch.no_grad():
        actual, eager = compiled(*inputs), module(*inputs)
    if "config" in options or any(isinstance(m, lamina.nn.Int8Linear) for m in module.modules()):
        assert_lossy(actual, eager, min_sqnr_db=INT8_LAYER_SQNR_DB - 3)
        return report
    with torch.no_grad():
        truth = copy.deepcopy(module).double()(*(t.double() if t.is_floating_point() else t for t in inputs))
    assert_composite(actual, eager, truth, factor=factor)
    return report


class Of(nn.Module):
    """A module of one function over some layers."""

    def __init__(self, function, **layers: nn.Module):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


# -- activations


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        (new_gelu, "gelu_tanh"),
        (lambda x: 0.5 * (x * (1 + (0.7978845608 * (x + 0.044715 * x**3)).tanh())), "gelu_tanh"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: x.sigmoid().mul(x), "silu"),
    ],
)
def test_activation_spelled_out(spelling, name):
    report = check(Of(lambda m, x: spelling(x * 2.0)), torch.randn(3, 70))
    assert report.fused == {f"{name} spelled out": 1}


def test_activation_whose_parts_are_used_elsewhere_stays():
    report = explain(Of(lambda m, x: (x * (gate := torch.sigmoid(x)), gate)), (torch.randn(4),), options=EVERY)
    assert not report.fused


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (F.relu, "relu"),
        (lambda x: x.relu(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (F.gelu, "gelu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (new_gelu, "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
        (torch.tanh, "tanh"),
    ],
)
def test_linear_and_activation(activation, name):
    report = check(Of(lambda m, x: activation(m.fc(x)), fc=nn.Linear(40, 70)), torch.randn(5, 40), options=INT8)
    assert report.fused[f"linear + {name}"] == 1
    assert report.eager == 0


# -- int8 linear layers


def test_linear_and_residual():
    module = Of(lambda m, x: x + m.fc(x), fc=nn.Linear(48, 48))
    assert check(module, torch.randn(2, 5, 48), options=INT8).fused["linear + residual"] == 1


@pytest.mark.parametrize("how", [lambda a, b: torch.add(a, b), lambda a, b: a.add(b), lambda a, b: b + a])
def test_linear_residual_and_activation(how):
    module = Of(lambda m, x: F.relu(how(m.fc(x), x)), fc=nn.Linear(48, 48))
    report = check(module, torch.randn(7, 48), options=INT8)
    assert (report.fused["linear + residual"], report.fused["linear + relu"]) == (1, 1)


def test_in_place_residual():
    def forward(m, x):
        y = m.fc(x)
        y += x
        return y

    report = check(Of(forward, fc=nn.Linear(48, 48)), torch.randn(7, 48), options=INT8)
    assert report.fused["linear + residual"] == 1


def test_broadcast_sum_is_no_residual():
    module = Of(lambda m, x: m.fc(x) + x[:1], fc=nn.Linear(48, 48))
    assert "linear + residual" not in check(module, torch.randn(7, 48), options=INT8).fused


def test_conv1d_of_gpt2_flattens_nothing():
    weight = nn.Parameter(torch.randn(48, 64) / 7)
    module = Of(lambda m, x: torch.addmm(m.bias, x.view(-1, 48), m.weight).view(*x.shape[:-1], 64))
    module.weight, module.bias = weight, nn.Parameter(torch.randn(64))
    report = check(module, torch.randn(2, 5, 48), options=INT8)
    assert report.fused == {"linear to int8": 1, "flattened rows": 1}
    assert report.eager == 0


def test_layers_that_were_swapped_before():
    module = Of(lambda m, x: F.gelu(m.fc(x)), fc=nn.Linear(40, 70))
    lamina.swap_(module, lamina.Int8Dynamic())
    assert check(module, torch.randn(5, 40)).fused == {"linear + gelu": 1}


# -- merging


def three(width: int = 64, bias: bool = True) -> Of:
    def forward(m, x):
        return m.a(x) * m.b(x) - m.c(x)

    return Of(forward, **{name: nn.Linear(64, width, bias=bias) for name in "abc"})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [EVERY, INT8], ids=["float", "int8"])
@pytest.mark.parametrize("width", [64, 61])
def test_projections_of_one_input(bias, options, width):
    kind = "int8_linear" if options is INT8 else "linear"
    module = three(width, bias)
    if kind == "int8_linear":
        assert check(copy.deepcopy(module), torch.randn(2, 9, 64), options=options).fused[f"3 {kind} of one input"] == 1
        lamina.swap_(module, lamina.Int8Dynamic())
        options = EVERY
    assert check(module, torch.randn(2, 9, 64), options=options).fused[f"3 {kind} of one input"] == 1


def test_layers_that_stay_apart_quantize_their_input_once():
    module = Of(lambda m, x: F.silu(m.gate(x)) * m.up(x), gate=nn.Linear(64, 96), up=nn.Linear(64, 96))
    report = check(module, torch.randn(2, 9, 64), options=INT8)
    assert report.fused["rows quantized once for 2 layers"] == report.fused["linear + silu"] == 1


def test_merged_parameters_keep_one_copy_and_their_meaning():
    module, x = three().eval(), torch.randn(9, 64)
    names = list(module.state_dict())
    compiled = torch.compile(module, backend="lamina", options=EVERY)
    with torch.no_grad():
        compiled(x)
        assert module.b.weight.data_ptr() == module.a.weight.data_ptr() + module.a.weight.nbytes
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters())  # none keeps the others alive
        assert_close(copy.deepcopy(module)(x), module(x))
        module.b.weight.mul_(2.0)  # in place: the merged weight has it
        assert_close(compiled(x), module(x))
        module.c.weight = nn.Parameter(torch.randn(64, 64))  # another parameter
        assert_close(compiled(x), module(x))
        module.a.bias.data = torch.randn(64)  # other memory
        assert_close(compiled(x), module(x))
    assert list(module.state_dict()) == names


def test_int8_layers_that_load_another_state():
    module, x = three().eval(), torch.randn(9, 64)
    lamina.swap_(module, lamina.Int8Dynamic())
    other = three()
    compiled = torch.compile(module, backend="lamina", options=EVERY)
    with torch.no_grad():
        assert_close(compiled(x), module(x))
        module.load_state_dict(other.state_dict())
        assert_close(compiled(x), module(x))


def test_layers_with_one_static_scale_are_merged():
    module, x = three().eval(), torch.randn(9, 64)
    lamina.swap_(module, lamina.Int8Static([(x,)]))
    assert check(copy.deepcopy(module), x).fused["3 int8_linear of one input"] == 1
    compiled = torch.compile(module, backend="lamina", options=EVERY)
    with torch.no_grad():
        assert_close(compiled(x), module(x))
        for layer in (module.a, module.b, module.c):
            layer.input_scale.mul_(2.0)
        assert_close(compiled(x), module(x))
        module.b.input_scale.mul_(2.0)
        with pytest.raises(RuntimeError, match="shared one input scale now have several; compile the model again"):
            compiled(x)
    # Compiled anew, what differs stays apart, and nothing is fused.
    torch.compiler.reset()
    assert check(module, x).fused["3 int8_linear of one input"] == 0


def test_parameters_that_share_memory_are_not_moved():
    module, x = three().eval(), torch.randn(9, 64)
    alias = module.a.weight.detach()
    compiled = torch.compile(module, backend="lamina", options=EVERY)
    with torch.no_grad():
        compiled(x)
        alias.zero_()
        assert (module.a.weight == 0).all()
        assert_close(compiled(x), module(x))


def test_a_view_that_merging_forbids():
    """The columns of a merged result cannot be flattened without a copy: the layers stay apart."""
    module = Of(lambda m, x: m.a(x).view(-1) * m.b(x).view(-1), a=nn.Linear(64, 64), b=nn.Linear(64, 64))
    report = check(module, torch.randn(9, 64))
    assert report.fused == {"linear on a packed copy of its weight": 2}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# -- norms


@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.RMSNorm(32, eps=1e-6)], ids=["layer_norm", "rms_norm"])
def test_norm_of_a_sum(norm):
    name = "layer_norm" if isinstance(norm, nn.LayerNorm) else "rms_norm"
    x, y = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    assert check(Of(lambda m, x, y: m.norm(x + y), norm=norm), x, y).fused == {f"add + {name}": 1}
    kept = check(Of(lambda m, x, y: m.norm(s := x + y) * s, norm=norm), x, y)
    assert kept.fused == {f"add + {name}, sum kept": 1}
    assert check(Of(lambda m, x: m.norm(x), norm=norm), x).fused == {name: 1}


def test_sum_used_before_its_norm():
    module = Of(lambda m, x, y: (s := x + y) * 2 + m.norm(s), norm=nn.LayerNorm(32))
    assert check(module, torch.randn(6, 32), torch.randn(6, 32)).fused == {"add + layer_norm, sum kept": 1}


class LlamaNorm(nn.Module):
    def __init__(self, cast: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32))
        self.cast = cast

    def forward(self, x):
        dtype = x.dtype
        h = x.to(torch.float32) if self.cast else x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(dtype)


def test_rms_norm_spelled_out():
    report = check(Of(lambda m, x, y: m.norm(x + y), norm=LlamaNorm(False)), torch.randn(6, 32), torch.randn(6, 32))
    assert report.fused["rms_norm spelled out"] == report.fused["add + rms_norm"] == 1
    assert report.eager == 0


def test_rms_norm_in_bfloat16():
    module, x = LlamaNorm(True).bfloat16(), torch.randn(6, 32).bfloat16()
    report = explain(module, (x,), options=EVERY)
    assert report.fused["rms_norm"] == 1
    with torch.no_grad():
        actual = torch.compile(module, backend="lamina", options=EVERY)(x)
        assert_composite(actual, module(x), copy.deepcopy(module).double()(x.double()))


# -- attention


def spelled_out(m, q, k, v, mask=None, scale=0.25, cast=False):
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) if cast else scores.softmax(-1)
    return weights @ v


@pytest.mark.parametrize(
    "function",
    [
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1),
        spelled_out,
        lambda m, q, k, v: torch.matmul(torch.softmax(torch.matmul(q / 4, k.transpose(2, 3)), -1), v),
    ],
)
def test_attention(function):
    q, k, v = (torch.randn(2, 3, 9, 16) for _ in range(3))
    report = check(Of(function), q, k, v)
    assert {pattern.partition(" spelled")[0] for pattern in report.fused} == {"attention"}


@pytest.mark.parametrize("kind", ["added", "filled", "where"])
def test_attention_spelled_out_with_a_mask(kind):
    q, k, v = (torch.randn(2, 3, 9, 16) for _ in range(3))
    keep = torch.rand(2, 1, 9, 9) > 0.3
    keep[..., 0] = True

    def forward(m, q, k, v):
        scores = q @ k.transpose(-2, -1) / 4.0
        if kind == "added":
            scores = scores + torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, -1e9)
        elif kind == "filled":
            scores = scores.masked_fill(~keep, float("-inf"))
        else:
            scores = torch.where(keep, scores, torch.finfo(scores.dtype).min)
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    assert check_float(Of(forward), q, k, v).fused["attention spelled out"] == 1


def check_float(module, *inputs) -> CompileReport:
    """Without a float64 run, for what casts to float32 inside."""
    report = explain(module, inputs, options=EVERY)
    with torch.no_grad():
        actual = torch.compile(module, backend="lamina", options=EVERY)(*inputs)
        torch.testing.assert_close(actual, module(*inputs), rtol=1e-4, atol=1e-5)
    return report


def test_attention_whose_weights_are_returned_stays():
    def forward(m, q, k, v):
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v, weights

    report = explain(Of(forward), tuple(torch.randn(2, 3, 9, 16) for _ in range(3)), options=EVERY)
    assert not report.fused
    assert any("used elsewhere" in reason for graph in report.graphs for _, reason, _ in graph.eager)


def attend(m, x, attention=F.scaled_dot_product_attention):
    q, k, v = (layer(x).unflatten(-1, (2, 32)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return m.out(attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("attention", [F.scaled_dot_product_attention, lamina.ops.attention])
def test_attention_between_int8_layers(isa, attention):
    """In bfloat16 where the processor multiplies it, and only between layers that round to eight bits anyway."""
    _C.force_isa(isa)
    layers = {name: nn.Linear(64, 64) for name in ("q", "k", "v", "out")}
    module, x = Of(partial(attend, attention=attention), **layers).eval(), torch.randn(2, 9, 64)
    assert "attention in bfloat16" not in explain(module, (x,), options=EVERY).fused
    with torch.no_grad():
        truth = module(x)
        lamina.swap_(module, lamina.Int8Dynamic())
        report = explain(module, (x,), options=EVERY)
        actual = torch.compile(module, backend="lamina", options=EVERY)(x)
    assert report.fused["attention in bfloat16"] == int(isa == "avx512bf16")
    assert actual.dtype == torch.float32
    assert_lossy(actual, truth, min_sqnr_db=INT8_LAYER_SQNR_DB - 3)


def test_attention_whose_keys_are_returned_stays_in_float32():
    def forward(m, x):
        return attend(m, x), m.k(x)

    module = Of(forward, **{name: nn.Linear(64, 64) for name in ("q", "k", "v", "out")})
    lamina.swap_(module, lamina.Int8Dynamic())
    with torch.no_grad():
        out, keys = torch.compile(module.eval(), backend="lamina", options=EVERY)(torch.randn(2, 9, 64))
    assert out.dtype == keys.dtype == torch.float32


def test_attention_with_dropout_stays():
    def forward(m, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    report = explain(Of(forward), tuple(torch.randn(2, 3, 9, 16) for _ in range(3)), options=EVERY)
    assert not report.fused
    assert report.graphs[0].eager[0][1] == "it drops weights at random"


# -- what computes nothing


def test_calls_that_compute_nothing_are_removed():
    module = Of(lambda m, x: m.drop(x.float().contiguous()) * 2, drop=nn.Dropout(0.5))
    report = check(module, torch.randn(4, 5))
    assert sum(report.fused.values()) == 3
    assert report.eager == 1
