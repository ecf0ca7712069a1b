"""Float linear layers in a compiled graph: what they take in, and which weights are left alone."""

import copy
import importlib

import pytest
import torch
from test_fusions import EVERY, INT8, Of, check, three
from tolerances import assert_exact
from torch import nn
from torch.nn import functional as F

import lamina
from lamina.compile import explain

PACKED = "on a packed copy of its weight"


def new_weights() -> dict[str, nn.Linear]:
    return {"fc": nn.Linear(40, 70), "square": nn.Linear(40, 40, bias=False)}


CHAINS = {
    "linear": (lambda m, x: m.fc(x), "linear"),
    "relu": (lambda m, x: F.relu(m.fc(x)), "linear + relu"),
    "method": (lambda m, x: m.fc(x).tanh(), "linear + tanh"),
    "gelu": (lambda m, x: F.gelu(m.fc(x), approximate="tanh"), "linear + gelu_tanh"),
    "sum": (lambda m, x: x + m.square(x), "linear + residual"),
    "sum and activation": (lambda m, x: F.silu(m.square(x).add(x)), "linear + residual + silu"),
    "activation and sum": (lambda m, x: F.silu(m.square(x)) + x, "linear + silu"),
    "broadcast sum": (lambda m, x: m.square(x) + x[:1], "linear"),
    "used twice": (lambda m, x: (lambda y: F.relu(y) * y)(m.fc(x)), "linear"),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40), (40,)], ids=str)
def test_float_chain(name, shape):
    function, pattern = CHAINS[name]
    # Sums in the order of k have more rounding errors than several partial ones.
    report = check(Of(function, **new_weights()), torch.randn(shape), factor=4.0)
    assert report.fused == {f"{pattern} {PACKED}": 1}


def conv1d(flat: bool) -> Of:
    """GPT-2's layer: a weight [K, N], rows flattened around the product."""

    def forward(m, x):
        if not flat:
            return F.relu(torch.addmm(m.bias, x, m.weight))
        return F.relu(torch.addmm(m.bias, x.view(-1, 48), m.weight).view(*x.shape[:-1], 64))

    module = Of(forward)
    module.weight, module.bias = nn.Parameter(torch.randn(48, 64) / 7), nn.Parameter(torch.randn(64))
    return module


@pytest.mark.parametrize(("flat", "shape"), [(False, (5, 48)), (True, (2, 5, 48))])
def test_conv1d_of_gpt2(flat, shape):
    report = check(conv1d(flat), torch.randn(shape))
    assert report.fused == {f"linear + relu {PACKED}": 1}
    assert report.eager == 0


def test_merged_projections_are_packed_together():
    report = check(three(), torch.randn(2, 9, 64))
    assert report.fused == {"3 linear of one input": 1, f"linear {PACKED}": 1}


def test_int8_layers_are_not_packed_again():
    fused = check(Of(lambda m, x: m.fc(x), fc=nn.Linear(40, 70)), torch.randn(5, 40), options=INT8).fused
    assert fused == {"linear to int8": 1}


def tied(m, ids):
    return F.linear(F.embedding(ids, m.fc.weight), m.fc.weight)


@pytest.mark.parametrize(
    ("function", "x", "reason"),
    [
        (tied, torch.randint(0, 70, (5,)), "its weight is used elsewhere"),
        (lambda m, x: m.square(m.square(x)), torch.randn(5, 40), "its weight is used elsewhere"),
        (lambda m, x: F.linear(x, x), torch.randn(5, 40), "its weight is no parameter"),
        (lambda m, x: F.linear(x, m.fc.weight * 2.0), torch.randn(5, 40), "its weight is no parameter"),
        (lambda m, x: m.fc(x), torch.randn(5, 40).bfloat16(), "float linear layer is of float32"),
        (lambda m, x: m.fc(x), torch.randn(5, 40).double(), "float linear layer is of float32"),
    ],
    ids=["tied embedding", "called twice", "input", "computed", "bfloat16", "float64"],
)
def test_what_stays_torchs(function, x, reason):
    module = Of(function, **new_weights()).eval()
    if x.is_floating_point():
        module = module.to(x.dtype)
    report = explain(module, (x,), options=EVERY)
    assert not report.fused
    assert any(reason in why for graph in report.graphs for _, why, _ in graph.eager)


def test_broadcast_bias_stays_torchs():
    module = Of(lambda m, x: torch.addmm(m.bias, x, m.weight))
    module.weight, module.bias = nn.Parameter(torch.randn(40, 70)), nn.Parameter(torch.randn(1, 70))
    report = explain(module.eval(), (torch.randn(5, 40),), options=EVERY)
    assert not report.fused


def test_the_faster_one_is_taken(monkeypatch):
    module, x = Of(lambda m, x: F.relu(m.fc(x)), **new_weights()).eval(), torch.randn(5, 40)
    asked = []

    def fastest(key, candidates):
        asked.append(key[0])
        first, second = (run() for run in candidates.values())
        torch.testing.assert_close(first, second)
        return answer

    monkeypatch.setattr("lamina.compile.choose.fastest", fastest)
    answer = "torch"
    assert not explain(module, (x,)).fused
    answer = "lamina"
    assert explain(module, (x,)).fused == {f"linear + relu {PACKED}": 1}
    assert asked == ["linear", "linear"]


def test_conv1d_is_measured_as_it_is(monkeypatch):
    def fastest(key, candidates):
        first, second = (run() for run in candidates.values())
        torch.testing.assert_close(first, second)
        return "lamina"

    monkeypatch.setattr("lamina.compile.choose.fastest", fastest)
    assert explain(conv1d(True).eval(), (torch.randn(2, 5, 48),)).fused == {f"linear + relu {PACKED}": 1}


def test_packed_weights_follow_their_parameters():
    module, x = Of(lambda m, x: F.relu(m.fc(x)), **new_weights()).eval(), torch.randn(5, 40)
    fast = torch.compile(module, backend="lamina", options=EVERY)

    def packed() -> torch.Tensor:
        weight = lamina.ops.pack_linear_weight(module.fc.weight)
        return lamina.ops.linear(x, weight, module.fc.bias, activation="relu")

    with torch.no_grad():
        assert_exact(fast(x), packed())
        module.fc.weight.mul_(-2.0)  # in place
        module.fc.bias.zero_()
        assert_exact(fast(x), packed())
        module.fc.weight = nn.Parameter(torch.randn(70, 40))  # another parameter
        assert_exact(fast(x), packed())
        module.fc.weight.data = torch.randn(70, 40)  # other memory
        assert_exact(fast(x), packed())


def test_graphs_share_a_packed_weight(monkeypatch):
    module, packed = Of(lambda m, x: F.relu(m.fc(x)), **new_weights()).eval(), []

    def pack(weight):
        packed.append(weight)
        return lamina.ops.pack_linear_weight(weight)

    monkeypatch.setattr(importlib.import_module("lamina.compile.fuse.linear"), "pack_linear_weight", pack)
    fast = torch.compile(module, backend="lamina", options=EVERY, dynamic=False)
    with torch.no_grad():
        for rows in (5, 9):
            fast(torch.randn(rows, 40))
        assert len(packed) == 1
        module.fc.weight.mul_(2.0)
        for rows in (5, 9):
            x = torch.randn(rows, 40)
            torch.testing.assert_close(fast(x), module(x))
        assert len(packed) == 2


def test_gradients_are_eagers():
    module, x = Of(lambda m, x: F.relu(m.fc(x)), **new_weights()), torch.randn(5, 40)
    expected = copy.deepcopy(module)
    torch.compile(module, backend="lamina", options=EVERY)(x).sum().backward()
    expected(x).sum().backward()
    torch.testing.assert_close(module.fc.weight.grad, expected.fc.weight.grad)
