"""FusedAttention on modules that call scaled_dot_product_attention themselves, in each of the ways people write it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional
from tolerances import assert_exact, assert_lossy
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

import lamina


class ByF(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x, *, causal=True):
        x = F.relu(self.project(x))
        return F.scaled_dot_product_attention(x, x, x, is_causal=causal)


class ByName(ByF):
    def forward(self, x):
        return scaled_dot_product_attention(x, self.project(x), x)


class ByTorch(ByF):
    def forward(self, x):
        return torch.relu(torch.nn.functional.scaled_dot_product_attention(x, x, x))


class ByNN(ByF):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, scale=0.3)


class ByMethod(ByF):
    def attend(self, x):
        return F.scaled_dot_product_attention(x, x, x)

    def forward(self, x):
        return self.attend(x)


def attend(x):
    return F.scaled_dot_product_attention(x, x, x)


class ByFunction(ByF):
    def forward(self, x):
        return attend(x) + x


class ByInner(ByF):
    def forward(self, x):
        return sum((lambda y: F.scaled_dot_product_attention(y, y, y))(part) for part in (x, -x))


class Inherited(ByF):
    pass


KINDS = [ByF, ByName, ByTorch, ByNN, ByMethod, ByFunction, ByInner, Inherited]


def x() -> torch.Tensor:
    return torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calls(monkeypatch):
    """How often torch's function was called."""
    counted = []
    original = torch._C._nn.scaled_dot_product_attention

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            counted.append(func) if func is original else None
            return func(*args, **(kwargs or {}))

    with Count():
        yield counted


@pytest.mark.parametrize("kind", KINDS)
def test_the_call_is_lamina_s(kind, calls):
    model, other = nn.Sequential(kind()).eval(), kind().eval()
    with torch.no_grad():
        expected = model(x())
        assert len(calls) > 0
        (decision,) = lamina.swap_(model, lamina.FusedAttention()).decisions
        assert (decision.fqn, decision.now) == ("0", f"{kind.__name__} calling lamina's attention")
        calls.clear()
        assert_lossy(model(x()), expected, min_sqnr_db=110)
        assert calls == []
        other(x())
        assert len(calls) > 0  # another instance of the class is as it was
    again = lamina.swap_(model, lamina.FusedAttention())
    assert [d.reason for d in again.left] == ["it already uses lamina's attention"]


@pytest.mark.parametrize("kind", KINDS)
def test_compile_export_copy_and_pickle(kind):
    model = kind().eval()
    original = copy.deepcopy(model)
    expected = model(x())
    lamina.swap_(model, lamina.FusedAttention())
    with torch.no_grad():
        torch._dynamo.reset()
        assert_lossy(torch.compile(model, backend="aot_eager", fullgraph=True)(x()), expected, min_sqnr_db=100)
        exported = torch.export.export(model, (x(),))
        assert "lamina.attention.default" in {str(node.target) for node in exported.graph.nodes}
        twin = copy.deepcopy(model)
        twin.project.weight.zero_()
        assert_lossy(model(x()), expected, min_sqnr_db=100)  # the copy's method is the copy's
        assert lamina.swap_(twin, lamina.FusedAttention()).left
        # A pickle holds names, not code: it comes back as the class has it.
        assert_exact(pickle.loads(pickle.dumps(model))(x()), original(x()))


def test_globals_stay_live():
    """Only the name that leads to the function is another; the method sees what its module holds today."""
    model = ByFunction().eval()
    lamina.swap_(model, lamina.FusedAttention())
    assert model.forward.__func__.__globals__ is globals()
    assert model.forward.__func__.__code__.co_names != ByFunction.forward.__code__.co_names


def test_modules_that_call_something_else_of_that_name():
    class Own(nn.Module):
        def scaled_dot_product_attention(self, x):
            return x

        def forward(self, x):
            return self.scaled_dot_product_attention(x)

    assert lamina.swap_(Own(), lamina.FusedAttention()).decisions == ()


class ImportsInside(nn.Module):
    def forward(self, x):
        import torch.nn.functional as inside

        return inside.scaled_dot_product_attention(x, x, x)


class CallsSuper(ByF):
    def forward(self, x):
        return super().forward(x)


class Decorated(ByF):
    @torch.no_grad()
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ImportsInside, "imports what it calls"),
        (CallsSuper, "by way of super()"),
        (Decorated, "wrapped by a decorator"),
    ],
)
def test_calls_that_cannot_be_followed_are_reported(kind, reason):
    model = kind()
    (decision,) = lamina.swap_(model, lamina.FusedAttention()).decisions
    assert decision.now is None
    assert reason in decision.reason
    assert "forward" not in vars(model)


def test_save_load_and_taking_back(tmp_path, monkeypatch):
    model = nn.Sequential(ByF(), nn.Linear(8, 3)).eval()
    lamina.swap_(model, [lamina.FusedAttention(), lamina.Int8Dynamic()])
    lamina.save(model, tmp_path / "m.safetensors")
    fresh = nn.Sequential(ByF(), nn.Linear(8, 3)).eval()
    lamina.load_(fresh, tmp_path / "m.safetensors")
    lamina.swap_(fresh, lamina.FusedAttention())
    with torch.no_grad():
        assert_exact(fresh(x()), model(x()))
    # accelerate takes it back where it is too slow.
    slow = lamina.accelerate(nn.Sequential(ByF()).eval(), (x(),), lamina.FusedAttention(), 1e9, compile=False)
    assert slow.report.swapped == ()
    assert "forward" not in vars(slow.model[0])


def test_gradients_and_dropout():
    model = ByF()
    expected = copy.deepcopy(model)
    lamina.swap_(model, lamina.FusedAttention())
    for module in (model, expected):
        module(x(), causal=False).sum().backward()
    assert_lossy(model.project.weight.grad, expected.project.weight.grad, min_sqnr_db=90)
