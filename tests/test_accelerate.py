"""accelerate: never slower, accurate enough, the original untouched, and every decision explained.

Speed is given by a stand-in for the stopwatch: a test that depends on how fast this machine is could not be trusted.
"""

import copy
import dataclasses
import functools
import sys
from collections import OrderedDict, namedtuple

import pytest
import torch
from tolerances import INT8_MODEL_SQNR_DB, assert_exact, assert_lossy
from torch import nn

import lamina
from lamina.compile import choose
from lamina.models.attention import ScaledDotProductAttention as ReferenceAttention
from lamina.nn import Int8Linear

# The function of the same name hides the module from attribute access.
module = sys.modules["lamina.accelerate"]

LAYER, MODEL = "layer", "model"

# The compiled graph has tests of its own below; it takes a second to make.
accelerate = functools.partial(lamina.accelerate, compile=False)


class Stopwatch:
    """Takes the place of accelerate's timing. `ratio` says how much faster each replacement is."""

    def __init__(self):
        self.ratio = {LAYER: 2.0, MODEL: 2.0}
        self.calls = []

    def __call__(self, before, after, seconds, stopwatch):
        kind = LAYER if seconds < module._MODEL_SECONDS else MODEL
        before(), after()
        self.calls.append(kind)
        ratio = self.ratio[kind]
        return (ratio(len(self.calls)) if callable(ratio) else ratio), 1.0


@pytest.fixture(autouse=True)
def stopwatch(monkeypatch):
    watch = Stopwatch()
    monkeypatch.setattr(module, "_interleaved", watch)
    return watch


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 7)).eval()


def decision(fast: lamina.Accelerated, fqn: str) -> lamina.LayerDecision:
    return next(d for d in fast.report.decisions if d.fqn == fqn)


def int8_layers(model: nn.Module) -> list[str]:
    return [fqn for fqn, m in model.named_modules() if isinstance(m, Int8Linear)]


# -- what it gives


def test_replaces_what_is_faster_and_accurate():
    model, x = mlp(), torch.randn(16, 20)
    fast = accelerate(model, (x,))
    assert int8_layers(fast.model) == ["0", "2", "4"]
    assert_lossy(fast.model(x), model(x), min_sqnr_db=INT8_MODEL_SQNR_DB)
    for d in fast.report.decisions:
        assert d.speedup == 2.0
        assert 0 < d.error < 0.02
        assert d.now.startswith("Int8Linear")
        assert d.reason == "faster and accurate enough"


def test_report_of_the_model():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    x = torch.randn(4, 256)
    report = accelerate(model, (x,)).report
    assert report.speedup == 2.0
    assert (report.seconds_before, report.seconds_after) == (2.0, 1.0)
    assert 0 < report.error < 0.05
    assert report.threads == torch.get_num_threads()
    assert report.bytes_before == 4 * 2 * (256 * 256 + 256)
    assert report.bytes_after < 0.3 * report.bytes_before
    text = str(report)
    assert report.form == "swapped layers"
    (form,) = report.forms
    assert (form.name, form.speedup, form.error) == ("swapped layers", 2.0, report.error)
    assert 0 < form.seconds <= report.seconds
    for word in (
        "2 of 2 layers replaced",
        "(swapped layers)",
        "2.00x as fast",
        "threads",
        "speedup",
        "error",
        "why",
        "2.00x",
    ):
        assert word in text


def test_error_is_the_relative_error_of_the_outputs():
    model, x = mlp(), torch.randn(16, 20)
    fast = accelerate(model, (x,))
    with torch.no_grad():
        expected, actual = model(x).double(), fast.model(x).double()
    assert fast.report.error == pytest.approx(((actual - expected).norm() / expected.norm()).item(), rel=1e-6)


def test_decisions_are_in_the_order_of_the_model():
    model = nn.Sequential(OrderedDict(b=nn.Linear(4, 4), a=nn.Sequential(nn.Linear(4, 4)), c=nn.Linear(4, 4).double()))
    model.c.forward = lambda x: x
    report = accelerate(model, (torch.randn(2, 4),)).report
    assert [d.fqn for d in report.decisions] == ["b", "a.0", "c"]


def test_every_layer_and_the_model_are_timed(stopwatch):
    accelerate(mlp(), (torch.randn(2, 20),))
    assert stopwatch.calls == [LAYER] * 3 + [MODEL]


def test_progress_is_told():
    told = []
    accelerate(mlp(), (torch.randn(2, 20),), progress=lambda *what: told.append(what))
    assert [done for _, done, _ in told[1:]] == [0, 1, 2, 3]
    assert all(0 <= done <= total for _, done, total in told)
    assert all(isinstance(description, str) for description, _, _ in told)
    assert told[1][0] == "measuring 0"


def test_timing_calls_both_in_turn(monkeypatch):
    monkeypatch.undo()
    order = []
    before, after = module._interleaved(lambda: order.append("before"), lambda: order.append("after"), 0.0)
    assert order == ["before", "after"] * (module._MIN_ROUNDS + 1)  # one round to warm up
    assert before > 0
    assert after > 0


def test_timing_takes_the_lower_quartile(monkeypatch):
    """What disturbs a machine only ever adds time."""
    monkeypatch.undo()
    clock = [0.0]
    durations = {"before": iter([9, 1, 2, 3, 50, 4]), "after": iter([9, 5, 6, 5, 70, 50])}
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])

    def run(name):
        clock[0] += next(durations[name])

    assert module._interleaved(lambda: run("before"), lambda: run("after"), 0.0) == (2.0, 5.0)


class Blocks(nn.Module):
    """Three layers of one kind, and one that sees other rows."""

    def __init__(self):
        super().__init__()
        self.same = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.other = nn.Linear(16, 16)

    def forward(self, x):
        for layer in self.same:
            x = layer(x)
        return self.other(x[:2])


def test_layers_of_one_kind_are_timed_in_turn(monkeypatch, stopwatch):
    """Each meets its weight as cold as in a run of the model, and all get one answer."""
    called = []

    def watch(before, after, seconds, stopwatch):
        if seconds < module._MODEL_SECONDS:
            called.append([])
            forward = Int8Linear.forward
            monkeypatch.setattr(Int8Linear, "forward", lambda self, x: (called[-1].append(self), forward(self, x))[1])
            for _ in range(6):
                before(), after()
            monkeypatch.setattr(Int8Linear, "forward", forward)
        return 3.0, 2.0

    monkeypatch.setattr(module, "_interleaved", watch)
    fast = accelerate(Blocks(), (torch.randn(4, 16),))
    same, other = called
    layers = list(fast.model.same)
    assert [next(i for i, layer in enumerate(layers) if layer is c) for c in same] == [0, 1, 2, 0, 1, 2]
    assert all(layer is fast.model.other for layer in other)
    assert {d.speedup for d in fast.report.decisions} == {1.5}


# -- the original


class Everything(nn.Module):
    """Parameters, buffers, hooks, modes and a cache that is filled on the first call."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.norm = nn.BatchNorm1d(12)
        self.hooked = nn.Linear(12, 12)
        self.hooked.register_forward_hook(lambda m, args, out: out * 2)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(12.0)
        return self.frozen(self.hooked(self.norm(self.fc(x))) + self.table)


@pytest.mark.parametrize("training", [True, False])
def test_the_original_is_untouched(training):
    model = Everything().train(training)
    model.hooked.train(not training)
    x = torch.randn(5, 12)
    state = copy.deepcopy(model.state_dict())
    modules = [
        (fqn, m, m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for fqn, m in model.named_modules()
    ]
    needs_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    fast = accelerate(model, (x,))
    assert int8_layers(fast.model) == ["fc", "frozen"]
    after = [
        (fqn, m, m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for fqn, m in model.named_modules()
    ]
    assert after == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needs_grad
    for name, tensor in model.state_dict().items():
        assert_exact(tensor, state[name], name)
    theirs = {id(t) for t in [*fast.model.parameters(), *fast.model.buffers()]}
    assert not theirs & {id(t) for t in [*model.parameters(), *model.buffers()]}


def test_the_original_can_still_be_trained():
    """What a model caches during the measurement must not be an inference tensor, which autograd refuses."""
    model = Everything().eval()
    x = torch.randn(5, 12)
    accelerate(model, (x,))
    model.train()(x).square().sum().backward()
    assert model.fc.weight.grad is not None


def test_the_copy_is_an_ordinary_model():
    """It can be loaded into, moved, copied and trained through."""
    model, x = mlp(), torch.randn(4, 20)
    fast = accelerate(model, (x,)).model
    assert not any(t.is_inference() for t in [*fast.parameters(), *fast.buffers()])
    y = fast(x)
    fast.load_state_dict(model.state_dict())
    assert_exact(copy.deepcopy(fast)(x), y)
    x.requires_grad_()
    fast(x).sum().backward()
    assert x.grad.abs().sum() > 0
    fast.bfloat16()(x.detach().bfloat16())


def test_the_copy_is_in_eval_mode():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    fast = accelerate(model, (torch.randn(4, 8),))
    assert not any(m.training for m in fast.model.modules())
    assert model.training
    assert model[1].training


def test_example_inputs_are_untouched():
    x = torch.randn(4, 20)
    before = x.clone()
    accelerate(mlp(), (x,))
    assert_exact(x, before)


def test_a_model_that_writes_into_its_inputs():
    """Each run must see the inputs as given, or the outputs of two runs could not be compared."""

    class AddsInPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            x += 1
            return self.fc(x)

    x = torch.randn(4, 16)
    before = x.clone()
    fast = accelerate(AddsInPlace(), (x,))
    assert int8_layers(fast.model) == ["fc"]
    assert_exact(x, before)


def test_random_state_is_untouched():
    model = mlp()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    accelerate(model, (torch.ones(2, 20),))
    assert_exact(torch.rand(2), expected)


def test_threads_and_isa_are_untouched():
    torch.set_num_threads(1)
    with lamina.force_isa("generic"):
        accelerate(mlp(), (torch.ones(2, 20),))
        assert lamina.info()["isa"] == "generic"
    assert torch.get_num_threads() == 1


# -- what it leaves


def unchanged(fast: lamina.Accelerated, model: nn.Module, *inputs) -> None:
    assert int8_layers(fast.model) == []
    assert fast.report.swapped == ()
    with torch.no_grad():
        assert_exact(fast.model(*inputs), model(*inputs))


def test_max_error_zero_leaves_everything():
    model, x = mlp(), torch.randn(4, 20)
    fast = accelerate(model, (x,), max_error=0)
    unchanged(fast, model, x)
    for d in fast.report.left:
        assert "is above max_error 0" in d.reason
        assert d.error > 0
    assert fast.report.error == 0.0


def test_min_speedup_leaves_everything():
    model, x = mlp(), torch.randn(4, 20)
    fast = accelerate(model, (x,), min_speedup=1000)
    unchanged(fast, model, x)
    assert [d.reason for d in fast.report.left] == ["2.00x on its inputs is below min_speedup 1000"] * 3
    assert [d.speedup for d in fast.report.left] == [2.0] * 3


def test_slower_layers_are_left(stopwatch):
    stopwatch.ratio[LAYER] = lambda call: 0.5 if call in (2, 3) else 1.5
    fast = accelerate(mlp(), (torch.randn(4, 20),))
    assert len(int8_layers(fast.model)) == 2
    (left,) = fast.report.left
    assert left.reason == "0.50x on its inputs is below min_speedup 1"


def test_a_noisy_moment_does_not_decide_against_a_layer(stopwatch):
    """What comes out slower is timed again, longer."""
    stopwatch.ratio[LAYER] = lambda call: 0.5 if call == 2 else 1.5
    fast = accelerate(mlp(), (torch.randn(4, 20),))
    assert stopwatch.calls == [LAYER] * 4 + [MODEL]
    assert [d.speedup for d in fast.report.swapped] == [1.5] * 3


def test_equal_speed_is_not_slower(stopwatch):
    stopwatch.ratio = {LAYER: 1.0, MODEL: 1.0}
    assert len(accelerate(mlp(), (torch.randn(4, 20),)).report.swapped) == 3


def test_a_slower_model_is_not_kept(stopwatch):
    """Every layer faster by itself, but the whole not: all go back."""
    stopwatch.ratio[MODEL] = 0.9
    model, x = mlp(), torch.randn(4, 20)
    fast = accelerate(model, (x,))
    unchanged(fast, model, x)
    for d in fast.report.left:
        assert d.reason == "faster by itself, but the whole model came out at 0.90x"
        assert d.speedup == 2.0
    assert fast.report.speedup == 1.0
    assert fast.report.error == 0.0
    assert fast.report.bytes_after == fast.report.bytes_before
    assert fast.report.form == "original"
    assert [(f.speedup, f.reason) for f in fast.report.forms] == [(0.9, "below min_speedup 1")]


def test_one_slow_moment_takes_nothing_back(stopwatch):
    """The whole model is timed again before everything goes back, and the second time counts."""
    looks = iter([0.9, 2.0])
    stopwatch.ratio[MODEL] = lambda calls: next(looks)
    fast = accelerate(mlp(), (torch.randn(4, 20),))
    assert int8_layers(fast.model) == ["0", "2", "4"]
    assert fast.report.speedup == 2.0


class Cancels(nn.Module):
    """Two large numbers whose difference is small: a small error of a layer is a large one of the model."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.b.weight.copy_(self.a.weight * (1 + 1e-4))
            self.b.bias.copy_(self.a.bias)

    def forward(self, x):
        return self.a(x) - self.b(x + 1e-3)


def test_an_inaccurate_model_is_not_kept():
    model, x = Cancels(), torch.randn(4, 16)
    fast = accelerate(model, (x,))
    unchanged(fast, model, x)
    for d in fast.report.left:
        assert "taken back: the model's error was" in d.reason
        assert "above max_model_error 0.1" in d.reason
    assert fast.report.error == 0.0


def test_only_the_worst_layers_are_taken_back():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.good = nn.ModuleList(nn.Linear(16, 16) for _ in range(7))
            self.bad = nn.Linear(16, 16)
            with torch.no_grad():
                self.bad.weight[:, 0] = 100.0  # one large weight takes the range of all others

        def forward(self, x):
            x = torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], dim=1)
            return sum(layer(x) for layer in self.good) / 20 + self.bad(x)

    fast = accelerate(Both(), (torch.randn(8, 16),), max_error=10.0, max_model_error=0.02)
    assert decision(fast, "bad").now is None
    assert len(fast.report.swapped) >= 5
    assert 0 < fast.report.error <= 0.02


def test_a_model_error_can_be_asked_for():
    model, x = mlp(), torch.randn(4, 20)
    fast = accelerate(model, (x,), max_model_error=0.0)
    unchanged(fast, model, x)
    assert "above max_model_error 0" in fast.report.left[0].reason


def test_layers_that_are_not_called():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    fast = accelerate(Unused(), (torch.randn(2, 4),))
    assert decision(fast, "unused") == lamina.LayerDecision(
        "unused", "Linear(4, 4)", None, "not called by the example inputs"
    )
    assert int8_layers(fast.model) == ["used"]


def test_weights_that_are_read_and_not_called():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(x, self.fc.weight, self.fc.bias)

    model, x = Reads(), torch.randn(2, 4)
    fast = accelerate(model, (x,))
    unchanged(fast, model, x)
    assert "not called" in decision(fast, "fc").reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_are_left(dtype):
    model, x = mlp().to(dtype), torch.randn(2, 20, dtype=dtype)
    fast = accelerate(model, (x,))
    unchanged(fast, model, x)
    assert all("int8 kernels take float32 and bfloat16" in d.reason for d in fast.report.left)


def test_bfloat16_models():
    model, x = mlp().bfloat16(), torch.randn(8, 20, dtype=torch.bfloat16)
    fast = accelerate(model, (x,), max_error=0.05)
    assert int8_layers(fast.model) == ["0", "2", "4"]
    assert fast.model(x).dtype == torch.bfloat16


def test_inputs_the_replacement_does_not_take():
    """A float32 layer that autocast or a caller feeds with float64 fails before and after; the rest goes on."""

    class Guarded(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            try:
                x = self.fc(x.half())
            except RuntimeError:
                x = x + 1
            return self.other(x)

    fast = accelerate(Guarded(), (torch.randn(2, 4),))
    assert decision(fast, "fc").reason.startswith("the replacement does not take these inputs: ")
    assert int8_layers(fast.model) == ["other"]


def test_nan_weights_are_left():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    fast = accelerate(model, (torch.randn(2, 20),))
    assert "NaN or infinite weight" in decision(fast, "2").reason


def test_a_model_that_is_a_linear():
    model, x = nn.Linear(6, 5), torch.randn(3, 6)
    fast = accelerate(model, (x,))
    unchanged(fast, model, x)
    assert "it is the model itself" in fast.report.left[0].reason


def test_filter_fn_and_policies():
    x = torch.randn(4, 20)
    fast = accelerate(mlp(), (x,), filter_fn=lambda m, fqn: fqn != "2")
    assert int8_layers(fast.model) == ["0", "4"]
    assert decision(fast, "2").reason == "excluded by filter_fn"
    assert int8_layers(accelerate(mlp(), (x,), config={"re:[24]": lamina.Int8Dynamic()}).model) == ["2", "4"]
    assert accelerate(mlp(), (x,), config=lamina.FusedAttention()).report.decisions == ()


def test_accelerating_twice():
    model, x = mlp(), torch.randn(4, 20)
    once = accelerate(model, (x,)).model
    twice = accelerate(once, (x,))
    assert twice.report.decisions == ()
    assert_exact(twice.model(x), once(x))


# -- models of many kinds


def test_a_layer_used_twice_with_different_shapes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.alias = self.fc

        def forward(self, x):
            return self.alias(self.fc(x)[:2])

    fast = accelerate(Twice(), (torch.randn(6, 8),))
    assert isinstance(fast.model.fc, Int8Linear)
    assert fast.model.fc is fast.model.alias
    assert len(fast.report.decisions) == 1


def test_in_place_relu_after_a_layer():
    model = nn.Sequential(nn.Linear(10, 12), nn.ReLU(inplace=True), nn.Linear(12, 4), nn.ReLU(inplace=True)).eval()
    x = torch.randn(5, 10)
    fast = accelerate(model, (x,))
    assert int8_layers(fast.model) == ["0", "2"]
    assert_lossy(fast.model(x), model(x), min_sqnr_db=INT8_MODEL_SQNR_DB)


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    aux: dict


Pair = namedtuple("Pair", "first second")

OUTPUTS = {
    "tuple": lambda y: (y, y * 2),
    "list": lambda y: [y, [y]],
    "dict": lambda y: {"logits": y, "ids": y.argmax(1)},
    "ordered": lambda y: OrderedDict(logits=y),
    "namedtuple": lambda y: Pair(y, None),
    "dataclass": lambda y: Answer(y, {"again": y}),
    "nested": lambda y: ({"a": [y]}, 3, None, "text", y.long()),
}


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.fc, self.wrap = nn.Linear(16, 16), wrap

    def forward(self, x):
        return self.wrap(self.fc(x))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_every_kind(kind):
    fast = accelerate(Wrapped(OUTPUTS[kind]), (torch.randn(4, 16),))
    assert int8_layers(fast.model) == ["fc"]
    assert 0 < fast.report.error < 0.02


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_outputs_of_every_kind_are_checked(kind):
    fast = accelerate(Wrapped(OUTPUTS[kind]), (torch.randn(4, 16),), max_model_error=1e-9)
    assert int8_layers(fast.model) == []


def test_outputs_with_nan_and_infinity_in_the_same_places():
    model = Wrapped(
        lambda y: torch.where(torch.arange(16) == 3, float("-inf"), y).masked_fill(torch.arange(16) == 5, float("nan"))
    )
    fast = accelerate(model, (torch.randn(4, 16),))
    assert int8_layers(fast.model) == ["fc"]
    assert 0 < fast.report.error < 0.02


def test_randomness_in_the_model():
    """Both runs are seeded alike, so noise is no error."""
    fast = accelerate(Wrapped(lambda y: y + torch.rand_like(y)), (torch.randn(4, 16),))
    assert int8_layers(fast.model) == ["fc"]
    assert fast.report.error < 0.02


def test_dict_example_inputs():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, *, left, right=None):
            return self.fc(left) + right

    fast = accelerate(Named(), {"left": torch.randn(2, 8), "right": torch.randn(2, 8)})
    assert int8_layers(fast.model) == ["fc"]


def test_layers_called_with_keywords():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(input=x)

    assert int8_layers(accelerate(Keywords(), (torch.randn(2, 8),)).model) == ["fc"]


def test_reference_attention_joins_in():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.attention = nn.Linear(32, 96), ReferenceAttention()

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.attention(q, k, v).transpose(1, 2).flatten(2)

    fast = accelerate(Block(), (torch.randn(2, 9, 32),))
    assert {d.fqn: d.now for d in fast.report.swapped} == {
        "qkv": "Int8Linear(32, 96)",
        "attention": "ScaledDotProductAttention",
    }
    assert decision(fast, "attention").error < 1e-5


def test_inside_the_users_own_inference_mode():
    model, x = mlp(), torch.randn(4, 20)
    with torch.inference_mode():
        fast = accelerate(model, (x,))
        assert int8_layers(fast.model) == ["0", "2", "4"]


# -- the compiled graph


class Fused(nn.Module):
    """Something for every kind of size: a mask that may be missing, a flag, two outputs."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32)

    def forward(self, x, mask=None, double=False):
        y = self.down(nn.functional.gelu(self.up(x)))
        if mask is not None:
            y = y * mask
        return self.norm(y + x) * (2 if double else 1), y


@pytest.fixture
def race(monkeypatch):
    """Says how fast each form is. None of the clocks of the whole model runs."""
    torch._dynamo.reset()
    speed = {"original": 1.0, "swapped layers": 2.0, "compiled": 1.5, "swapped layers, compiled": 3.0}

    def form_of(work, graph):
        parts = [*(["swapped layers"] if int8_layers(work) else []), *(["compiled"] if graph else [])]
        return ", ".join(parts) or "original"

    def graph(self):
        return self.work._compiled_call_impl is not None

    # Nor does the one that decides whether a fusion pays, or there would at times be nothing to compile.
    monkeypatch.setattr(choose, "fastest", lambda key, candidates: list(candidates)[-1])
    monkeypatch.setattr(module._Race, "_against_original", lambda s: (speed[form_of(s.work, graph(s))], 1.0))
    monkeypatch.setattr(
        module._Race, "_against_layers", lambda s: speed[form_of(s.work, True)] / speed[form_of(s.work, False)]
    )
    return speed


def runs_a_graph(model, *args, **kwargs) -> bool:
    """Whether a call goes through the compiled graph."""
    compiled, calls = model._compiled_call_impl._compiled, []

    class Counting:
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return compiled(*args, **kwargs)

        def quick(self, args):
            result = compiled.quick(args)
            calls.extend([] if result is None else [1])
            return result

    model._compiled_call_impl._compiled = Counting()
    model(*args, **kwargs)
    model._compiled_call_impl._compiled = compiled
    return bool(calls)


def forms(report) -> list[tuple[str, float]]:
    return [(form.name, form.speedup) for form in report.forms]


def test_the_fastest_form_wins(race):
    model, x = Fused().eval(), torch.randn(4, 32)
    fast = lamina.accelerate(model, (x,))
    assert forms(fast.report) == [("swapped layers", 2.0), ("swapped layers, compiled", 3.0)]
    assert (fast.report.form, fast.report.speedup) == ("swapped layers, compiled", 3.0)
    assert "gelu" in fast.report.forms[1].reason
    assert all(form.seconds > 0 for form in fast.report.forms)
    assert "* swapped layers, compiled" in str(fast.report)
    with torch.no_grad():
        for actual, expected in zip(fast.model(x), model(x), strict=True):
            assert_lossy(actual, expected, min_sqnr_db=INT8_MODEL_SQNR_DB)
        assert runs_a_graph(fast.model, x)


@pytest.mark.parametrize(
    ("change", "form", "left"),
    [
        ({"swapped layers, compiled": 2.02}, "swapped layers", 0),
        ({"swapped layers, compiled": 0.5}, "swapped layers", 0),
        ({"swapped layers": 0.9, "swapped layers, compiled": 9.0}, "compiled", 2),
        ({"swapped layers": 0.9, "compiled": 1.01}, "original", 2),
        ({"swapped layers": 1.1, "swapped layers, compiled": 1.0}, "compiled", 2),
        ({"swapped layers": 1.2, "swapped layers, compiled": 1.0, "compiled": 1.21}, "swapped layers", 0),
        ({"swapped layers": 1.2, "swapped layers, compiled": 1.4, "compiled": 2.0}, "swapped layers, compiled", 0),
    ],
)
def test_every_outcome(race, change, form, left):
    race.update(change)
    model, x = Fused().eval(), torch.randn(4, 32)
    fast = lamina.accelerate(model, (x,))
    assert fast.report.form == form
    assert fast.report.speedup == race[form]
    assert len(fast.report.left) == left
    assert bool(int8_layers(fast.model)) == form.startswith("swapped")
    assert (fast.model._compiled_call_impl is not None) == form.endswith("compiled")
    for other in fast.report.forms:
        assert (other.name == form) or "below" in other.reason or other.name == "swapped layers"
    if form == "original":
        assert fast.report.error == 0.0
    with torch.no_grad():
        assert_lossy(fast.model(x)[0], model(x)[0], min_sqnr_db=INT8_MODEL_SQNR_DB)


@pytest.mark.parametrize("gain", [3.0, 0.5])
def test_static_layers_that_only_pay_in_a_graph(race, stopwatch, gain):
    """Slower by themselves, faster as soon as codes go from one to the next; or not even then."""
    race["swapped layers, compiled"], race["compiled"] = gain, 0.5
    stopwatch.ratio[LAYER] = 0.9
    model, x = mlp(), torch.randn(4, 20)
    fast = lamina.accelerate(model, (x,), lamina.Int8Static([(x,)]))
    kept = gain > 1
    assert fast.report.form == ("all int8 layers, compiled" if kept else "original")
    assert len(int8_layers(fast.model)) == len(fast.report.swapped) == (3 if kept else 0)
    words = "faster between layers that hand it codes" if kept else "0.90x on its inputs is below min_speedup 1"
    assert all(words in d.reason for d in fast.report.decisions)
    with torch.no_grad():
        assert_lossy(fast.model(x), model(x), min_sqnr_db=INT8_MODEL_SQNR_DB)


def test_an_inaccurate_graph_is_not_kept(race, monkeypatch):
    right = module.compile_

    def wrong(work, inputs, **options):
        report = right(work, inputs, **options)
        graph = work._compiled_call_impl
        work._compiled_call_impl = lambda *args, **kwargs: tuple(2 * y for y in graph(*args, **kwargs))
        return report

    monkeypatch.setattr(module, "compile_", wrong)
    fast = lamina.accelerate(Fused().eval(), (torch.randn(4, 32),))
    assert fast.report.form == "swapped layers"
    assert "is above max_model_error 0.1" in fast.report.forms[1].reason
    assert fast.report.error < 0.05


def test_a_model_that_cannot_be_captured_keeps_its_layers(race):
    class Uncaptured(Fused):
        @torch._dynamo.disable
        def forward(self, x):
            return super().forward(x)

    fast = lamina.accelerate(Uncaptured().eval(), (torch.randn(4, 32),))
    assert fast.report.form == "swapped layers"
    assert "cannot be compiled" in fast.report.forms[1].reason
    assert "\n" not in fast.report.forms[1].reason


def test_compile_false_compiles_nothing(race, monkeypatch):
    monkeypatch.setattr(module, "compile_", lambda *args, **options: pytest.fail("compiled"))
    fast = lamina.accelerate(Fused().eval(), (torch.randn(4, 32),), compile=False)
    assert forms(fast.report) == [("swapped layers", 2.0)]
    assert fast.model._compiled_call_impl is None


def test_other_calls_than_the_example_run_the_layers(race):
    """No call waits for a compiler, and none is wrong."""
    model, x = Fused().eval(), torch.randn(4, 32)
    fast = lamina.accelerate(model, {"x": x, "mask": None}).model
    mask = torch.rand(4, 32)
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        assert compiles > 0
        assert runs_a_graph(fast, x)
        assert runs_a_graph(fast, x=torch.randn(4, 32))
        for args, kwargs in [
            ((torch.randn(5, 32),), {}),
            ((torch.randn(2, 3, 32),), {}),
            ((x[:, :], mask), {}),
            ((x,), {"double": True}),
            ((torch.randn(32, 4).t(),), {}),
            ((x,), {"mask": mask, "double": True}),
        ]:
            assert not runs_a_graph(fast, *args, **kwargs)
            for actual, expected in zip(fast(*args, **kwargs), model(*args, **kwargs), strict=True):
                assert_lossy(actual, expected, min_sqnr_db=INT8_MODEL_SQNR_DB)
    assert not runs_a_graph(fast, x)  # gradients are asked for
    assert compiles == torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_inference_mode_runs_the_same_graph(race):
    x = torch.randn(4, 32)
    fast = lamina.accelerate(Fused().eval(), (x,)).model
    with torch.no_grad():
        expected = fast(x)[0]
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        assert runs_a_graph(fast, x)
        assert_exact(fast(x)[0], expected)
        assert_exact(fast(x.clone())[0], expected)
        inside = x.clone()
    with torch.no_grad():
        assert_exact(fast(inside)[0], expected)
    assert compiles == torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_the_graph_serves_any_number_of_threads_and_no_other_state(race):
    x = torch.randn(4, 32)
    fast = lamina.accelerate(Fused().eval(), (x,)).model
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        expected = fast(x)[0]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert runs_a_graph(fast, x)
            assert_exact(fast(x)[0], expected)
        with torch.autocast("cpu"):
            assert not runs_a_graph(fast, x)
        torch.use_deterministic_algorithms(True)
        try:
            assert not runs_a_graph(fast, x)
        finally:
            torch.use_deterministic_algorithms(False)
    assert compiles == torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_compiled_model_is_an_ordinary_model(race, tmp_path):
    x = torch.randn(4, 32)
    model, other = Fused().eval(), Fused().eval()
    fast = lamina.accelerate(model, (x,)).model
    assert type(fast) is Fused
    with torch.no_grad():
        expected = fast(x)[0]
        assert_exact(copy.deepcopy(fast)(x)[0], fast._call_impl(x)[0])
        assert_lossy(copy.deepcopy(fast)(x)[0], expected, min_sqnr_db=60)
        lamina.save(fast, tmp_path / "fast.safetensors")
        lamina.load_(other, tmp_path / "fast.safetensors")
        assert_lossy(other(x)[0], expected, min_sqnr_db=60)
        # What is loaded into it is what it computes, through the graph as well.
        changed = {k: v * 2 if v.is_floating_point() else v for k, v in fast.state_dict().items()}
        fast.load_state_dict(changed)
        other.load_state_dict(changed)
        assert runs_a_graph(fast, x)
        assert_lossy(fast(x)[0], other(x)[0], min_sqnr_db=60)
        fast.norm.weight.zero_()
        fast.norm.bias.fill_(3.0)
        assert_exact(fast(x)[0], torch.full_like(x, 3.0))
    again = lamina.accelerate(fast, (x,))
    assert again.report.error < 0.05


def test_models_of_one_class_do_not_use_up_each_others_graphs(race):
    """Dynamo keeps eight graphs for a piece of code; each model brings a frame of its own."""
    x = torch.randn(4, 32)
    kept = [lamina.accelerate(Fused().eval(), (x,)) for _ in range(10)]
    assert {fast.report.form for fast in kept} == {"swapped layers, compiled"}
    with torch.no_grad():
        assert all(runs_a_graph(fast.model, x) for fast in kept)


def test_a_model_that_is_torchs_own_container(race):
    model, x = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).eval(), torch.randn(4, 16)
    fast = lamina.accelerate(model, (x,))
    assert fast.report.form == "swapped layers, compiled"
    with torch.no_grad():
        assert_lossy(fast.model(x), model(x), min_sqnr_db=INT8_MODEL_SQNR_DB)


def test_a_graph_with_nothing_fused_is_not_kept(race):
    """It could only win by chance."""
    fast = lamina.accelerate(nn.Sequential(nn.Linear(16, 16)).eval(), (torch.randn(4, 16),))
    assert fast.report.form == "swapped layers"
    assert fast.report.forms[1].reason.startswith("nothing in it to fuse; 1 graph")


def test_a_model_that_was_compiled_in_place(race):
    """The copy starts without a graph; the original keeps its own."""
    model, x = Fused().eval(), torch.randn(4, 32)
    model.compile(backend="eager")
    graph = model._compiled_call_impl
    fast = lamina.accelerate(model, (x,))
    assert fast.report.form == "swapped layers, compiled"
    assert model._compiled_call_impl is graph


def test_a_wrapped_model_is_refused():
    with pytest.raises(ValueError, match=r"wrapped by torch\.compile; give the one inside, model\._orig_mod"):
        lamina.accelerate(torch.compile(mlp(), backend="eager"), (torch.randn(4, 20),))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripted_models_stay_as_they_are(race):
    model, x = torch.jit.script(mlp()), torch.randn(4, 20)
    fast = lamina.accelerate(model, (x,))
    assert (fast.report.form, fast.report.decisions) == ("original", ())
    assert "it is TorchScript, which Dynamo does not read" in fast.report.forms[0].reason
    assert_exact(fast.model(x), model(x))


def test_models_on_meta_are_refused():
    with pytest.raises(ValueError, match="the model is on meta and has no values to compute with; load its weights"):
        accelerate(mlp().to("meta"), (torch.randn(4, 20, device="meta"),))


def test_layers_with_a_row_of_zeros():
    model, x = mlp(), torch.randn(16, 20)
    with torch.no_grad():
        model[2].weight[4] = 0
        model[2].weight[:, 7] = 0
    fast = accelerate(model, (x,))
    assert int8_layers(fast.model) == ["0", "2", "4"]
    with torch.no_grad():
        assert_lossy(fast.model(x), model(x), min_sqnr_db=INT8_MODEL_SQNR_DB)


def test_the_original_is_not_compiled(race):
    model = Fused().eval()
    lamina.accelerate(model, (torch.randn(4, 32),))
    assert model._compiled_call_impl is None


# -- what bad input gets


@pytest.mark.parametrize(
    "inputs", [torch.randn(4, 20), [torch.randn(4, 20)], None, 3, iter([])], ids=lambda i: type(i).__name__
)
def test_example_inputs_must_be_a_tuple_or_a_dict(inputs):
    with pytest.raises(
        TypeError, match="example_inputs must be a tuple of positional or a dict of keyword arguments"
    ) as error:
        accelerate(mlp(), inputs)
    assert f"got {type(inputs).__name__}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_floating_point_outputs():
    with pytest.raises(ValueError, match="the model gives no floating-point output for the example inputs"):
        accelerate(Wrapped(lambda y: y.argmax()), (torch.randn(4, 16),))


def test_errors_of_the_model_pass_through():
    model = mlp()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        accelerate(model, (torch.randn(4, 21),))
    with pytest.raises(TypeError, match="unexpected keyword"):
        accelerate(model, {"nonsense": 1})
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("config", ["fast", 3, [None]])
def test_a_wrong_config_is_refused(config):
    with pytest.raises((TypeError, ValueError), match="config"):
        accelerate(mlp(), (torch.randn(4, 20),), config=config)


def test_compile_is_auto_or_false():
    with pytest.raises(ValueError, match="compile is 'always'; use 'auto' or False"):
        lamina.accelerate(mlp(), (torch.randn(4, 20),), compile="always")


def test_an_accelerated_model_is_explained_and_compiled_by_its_layers():
    model, x = Fused().eval(), torch.randn(4, 32)
    fast = lamina.accelerate(model, (x,)).model
    lamina.compile.compile_(fast, (x,), options={"measure": False})
    assert lamina.compile.explain(fast, (x,), options={"measure": False}).fused
    with torch.no_grad():
        for actual, expected in zip(torch.compile(fast, backend="eager")(x), fast(x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
