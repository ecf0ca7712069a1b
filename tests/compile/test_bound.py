"""A bound call is the compiled module's call, whatever happens to the module in between."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_exact
from torch import nn

import lamina
from lamina.compile import compile_
from lamina.compile.bound import Bound
from lamina.nn import Int8Linear


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = Int8Linear.from_float(nn.Linear(6, 8)), nn.Linear(8, 4)
        self.inner = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
        self.config = SimpleNamespace(scale=2.0, deep={"offset": 1.0})
        self.slope = 3.0
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x, flag=True):
        y = self.last(self.inner(self.first(x))) * self.config.scale + self.config.deep["offset"]
        return {"y": y * self.slope + self.shift, "flag": flag, "x": [x]}


def bound(module: nn.Module, *example) -> Bound:
    """The call of a compiled copy, which is `_module`."""
    module = copy.deepcopy(module).eval()
    compile_(module, example, options={"measure": False})
    call = Bound(module, module._compiled_call_impl)
    with torch.no_grad():
        call(*example)
    return call


def is_bound(call: Bound) -> bool:
    return call._state is not None and not call._state.changed()


def same(call: Bound, *args) -> None:
    """Bit for bit what Dynamo gives for the module as it is."""
    with torch.no_grad():
        actual, expected = call(*args), call._compiled(*args)
    assert type(actual) is type(expected)
    assert_exact(actual["y"], expected["y"])
    assert actual["flag"] is expected["flag"]
    assert actual["x"][0] is expected["x"][0] is args[0]


CHANGES = {
    "weight written": (lambda m: m.first._scale.mul_(2.0), True),
    "data replaced": (lambda m: setattr(m.last.weight, "data", torch.ones(4, 8)), True),
    "parameter replaced": (lambda m: setattr(m.last, "weight", nn.Parameter(torch.ones(4, 8))), False),
    "layer inside a container": (lambda m: m.inner.__setitem__(0, nn.Tanh()), False),
    "mode": (lambda m: m.inner[1].train(), False),
    "attribute": (lambda m: setattr(m, "slope", 5.0), False),
    "item of a config's dict": (lambda m: m.config.deep.update(offset=5.0), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    x = torch.randn(3, 6)
    call = bound(Layers(), x)
    assert is_bound(call)
    same(call, torch.randn(3, 6))
    alter, stays = CHANGES[change]
    with torch.no_grad():
        alter(call._module)
    assert is_bound(call) is stays
    with torch.no_grad():
        for _ in range(2):
            torch.manual_seed(0)
            actual = call(x)["y"]
            torch.manual_seed(0)
            assert_exact(actual, call._compiled(x)["y"])


def test_keyword_arguments():
    x = torch.randn(3, 6)
    call = bound(Layers(), x)
    with torch.no_grad():
        first = Bound(call._module, call._compiled)
        for images in (x, x, torch.randn(3, 6)):
            result = first(x=images, flag=None)
            assert_exact(result["y"], call(images)["y"])
            assert result["flag"] is None
            assert result["x"][0] is images
    assert is_bound(first)


class Remembers(Layers):
    def forward(self, x):
        self.seen = x
        return super().forward(x)


class Breaks(Layers):
    def forward(self, x):
        y = super().forward(x)
        torch._dynamo.graph_break()
        return y


class Opaque(Layers):
    def forward(self, x):
        return SimpleNamespace(**super().forward(x))


@pytest.mark.parametrize("kind", [Remembers, Breaks, Opaque])
def test_what_does_more_than_one_graph_is_not_bound(kind):
    x = torch.randn(3, 6)
    call = bound(kind(), x)
    assert call._state is None
    with torch.no_grad():
        result, expected = (c(x) for c in (call, call._compiled))
    result, expected = (r.y if kind is Opaque else r["y"] for r in (result, expected))
    assert_exact(result, expected)


def test_an_accelerated_model_is_bound(monkeypatch):
    monkeypatch.setattr(
        sys.modules["lamina.accelerate"],
        "_interleaved",
        lambda before, after, seconds, stopwatch: (before(), after(), (2.0, 1.0))[2],
    )
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(3, 6)
    fast = lamina.accelerate(model, (x,)).model
    with torch.no_grad():
        for images in (x, torch.randn(3, 6)):
            assert_exact(fast(images), fast._call_impl(images))
        assert is_bound(fast._compiled_call_impl._compiled)
        fast[2] = nn.Linear(8, 2)
        assert fast(x).shape == (3, 2)
