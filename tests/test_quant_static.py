"""Int8Static and calibration: one pass, every concerned layer, and what has no range is left alone with the reason."""

import copy
import math

import pytest
import torch
from tolerances import INT8_MODEL_SQNR_DB, assert_exact, assert_lossy, sqnr_db
from torch import nn

import lamina
from lamina import Int8Static, swap_
from lamina.nn import Int8Linear
from lamina.quant import Calibration, calibrate

INT8 = lamina.Int8Dynamic()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 7))


def batches(count: int = 4, width: int = 20) -> list[tuple[torch.Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(8, width),) for _ in range(count)]


def left_because(report: lamina.SwapReport, fqn: str, reason: str) -> None:
    found = next(d for d in report.decisions if d.fqn == fqn)
    assert found.now is None, found
    assert reason in found.reason
    assert "\n" not in found.reason


def scales(model: nn.Module) -> dict[str, float]:
    return {fqn: m.input_scale.item() for fqn, m in model.named_modules() if isinstance(m, Int8Linear)}


def untouched(model: nn.Module, before: nn.Module) -> None:
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert_exact(tensor, before.state_dict()[name], name)


# -- what it does


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_static_layers(observer):
    model, x = mlp(), batches()[0][0]
    expected = model(x)
    report = swap_(model, Int8Static(batches(), observer=observer))
    assert [d.fqn for d in report.swapped] == ["0", "2", "4"]
    assert report.left == ()
    assert all(layer.input_scale.dtype == torch.float32 for layer in model if isinstance(layer, Int8Linear))
    assert_lossy(model(x), expected, min_sqnr_db=INT8_MODEL_SQNR_DB)


def test_minmax_scales_are_the_largest_inputs():
    model, original = mlp(), mlp()
    original.load_state_dict(model.state_dict())
    swap_(model, Int8Static(batches()))
    x = torch.cat([batch[0] for batch in batches()])
    with torch.no_grad():
        for index in (0, 2, 4):
            largest = torch.stack([original[:index](part).abs().max() for part in x.split(8)]).max()
            assert scales(model)[str(index)] == pytest.approx(largest.item() / 127, rel=1e-6)


def test_percentile_clips():
    data = [(torch.cat((torch.randn(2000, 20), torch.full((1, 20), 50.0))),)]
    whole, clipped = mlp(), mlp()
    swap_(whole, Int8Static(data))
    swap_(clipped, Int8Static(data, observer="percentile", percentile=99.9))
    assert scales(clipped)["0"] < scales(whole)["0"] / 5


def test_a_generator_is_read_once_for_all_layers():
    reads = []

    def stream():
        for batch in batches():
            reads.append(1)
            yield batch

    swap_(mlp(), Int8Static(stream()))
    assert len(reads) == 4
    exhausted = Int8Static(stream())
    list(exhausted.calibration)
    with pytest.raises(ValueError, match="gave no inputs; it is empty, or a generator that was read before"):
        swap_(mlp(), exhausted)


def test_one_generator_for_several_configs_of_a_policy():
    reads = []

    def stream():
        for batch in batches():
            reads.append(1)
            yield batch

    data = stream()
    model = mlp()
    report = swap_(model, {"0": Int8Static(data), "2": Int8Static(data, observer="mse"), "_default": INT8})
    assert len(reads) == 4
    assert len(report.swapped) == 3
    assert model[0].input_scale is not None
    assert model[2].input_scale is not None
    assert model[4].input_scale is None


def test_policies_calibrate_only_what_they_name():
    model = mlp()
    report = swap_(model, {"re:[24]": Int8Static(batches()), "0": None})
    assert [d.fqn for d in report.swapped] == ["2", "4"]
    assert type(model[0]) is nn.Linear


def test_filter_fn():
    model = mlp()
    report = swap_(model, Int8Static(batches()), filter_fn=lambda module, fqn: fqn != "2")
    left_because(report, "2", "excluded by filter_fn")
    assert [d.fqn for d in report.swapped] == ["0", "4"]


def test_keyword_inputs():
    model = mlp()
    assert len(swap_(model, Int8Static([{"input": batch[0]} for batch in batches()])).swapped) == 3


def test_accelerate_takes_it(monkeypatch):
    import sys

    monkeypatch.setattr(
        sys.modules["lamina.accelerate"], "_interleaved", lambda before, after, seconds, stopwatch: (2.0, 1.0)
    )
    model, x = mlp(), batches()[0][0]
    fast = lamina.accelerate(model, (x,), Int8Static(batch for batch in batches()), max_error=0.1)
    assert [d.fqn for d in fast.report.swapped] == ["0", "2", "4"]
    assert fast.model[2].input_scale is not None
    assert type(model[0]) is nn.Linear


def test_calibration_in_advance_is_usable_again():
    model = mlp()
    before = copy.deepcopy(model)
    ranges = calibrate(model, (batch for batch in batches()), observer="mse")
    untouched(model, before)
    assert ranges.scales.keys() == {"0", "2", "4"}
    config, once = Int8Static(ranges), copy.deepcopy(model)
    for made in (once, model):
        assert len(swap_(made, config).swapped) == 3
        assert scales(made) == pytest.approx(dict(ranges.scales), rel=1e-6)
    direct = before
    swap_(direct, Int8Static(batches(), observer="mse"))
    assert scales(direct) == scales(model)
    assert calibrate(model, ranges) is ranges


def test_calibration_of_another_model():
    ranges = calibrate(nn.Sequential(nn.Linear(20, 30)), batches())
    left_because(swap_(mlp(), Int8Static(ranges)), "2", "the calibration does not know this layer")


def test_modules_used_twice_see_both_inputs():
    fc = nn.Linear(8, 8)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = fc

        def forward(self, x):
            return self.fc(self.fc(x) * 100)

    model, data = Twice(), batches(width=8)
    second = max((fc(x) * 100).abs().max().item() for (x,) in data)
    swap_(model, Int8Static(data))
    assert scales(model)["fc"] == pytest.approx(second / 127, rel=1e-6)


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.head = nn.Linear(16, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    model, tokens = Tied(), torch.arange(10)
    weight = model.embed.weight.detach().clone()
    report = swap_(model, Int8Static([(tokens,)]))
    assert [d.fqn for d in report.swapped] == ["head"]
    assert_exact(model.embed.weight.detach(), weight)


def test_zero_weight_rows():
    model = mlp()
    with torch.no_grad():
        model[2].weight[3] = 0
    x = batches()[0][0]
    expected = model[:3](x)[:, 3]
    swap_(model, Int8Static(batches()))
    assert_exact(model[:3](x)[:, 3], expected)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept_and_calibration_runs_in_eval_mode(training):
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(20), nn.Linear(20, 4)).train(training)
    mean = model[1].running_mean.clone()
    data = batches()
    swap_(model, Int8Static(data))
    assert [m.training for m in model.modules()] == [training] * 4
    assert_exact(model[1].running_mean, mean)
    largest = max(model[1].eval()(x).abs().max().item() for (x,) in data)
    assert scales(model)["2"] == pytest.approx(largest / 127, rel=1e-6)


def test_bfloat16_models():
    model = mlp().bfloat16()
    data = [(x.bfloat16(),) for (x,) in batches()]
    expected = model(*data[0])
    assert len(swap_(model, Int8Static(data)).swapped) == 3
    y = model(*data[0])
    assert y.dtype == torch.bfloat16
    assert_lossy(y, expected, min_sqnr_db=INT8_MODEL_SQNR_DB)


def test_transformers_model():
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)).eval()
    inputs = {"input_ids": torch.randint(0, 50, (2, 5))}
    expected = model(**inputs).last_hidden_state
    report = swap_(model, Int8Static([inputs]))
    assert len(report.swapped) == 4  # Conv1D, GPT-2's linear layers
    assert_lossy(model(**inputs).last_hidden_state, expected, min_sqnr_db=INT8_MODEL_SQNR_DB)


# -- what is left alone, and why


def test_layers_that_calibration_never_calls():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Idle()
    report = swap_(model, Int8Static([(torch.randn(2, 4),)]))
    left_because(report, "idle", "not called by the calibration inputs")
    assert isinstance(model.used, Int8Linear)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (math.nan, "its input has no static scale: NaN or infinity was observed"),
        (math.inf, "its input has no static scale: NaN or infinity was observed"),
        (0.0, "its input has no static scale: only zeros were observed"),
    ],
)
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_ranges_that_are_none(bad, reason, observer):
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.good(x) + self.bad(torch.full_like(x, bad))

    model = Poisoned()
    report = swap_(model, Int8Static([(torch.randn(2, 4),)] * 2, observer=observer))
    left_because(report, "bad", reason)
    assert [d.fqn for d in report.swapped] == ["good"]


def test_empty_batches():
    model = nn.Sequential(nn.Linear(4, 4))
    left_because(swap_(model, Int8Static([(torch.empty(0, 4),)])), "0", "no values were observed")


def test_float64_models():
    model = mlp().double()
    report = swap_(model, Int8Static([(x.double(),) for (x,) in batches()]))
    left_because(report, "0", "the weight is torch.float64")


def test_a_linear_without_a_place():
    model = nn.Linear(4, 4)
    left_because(swap_(model, Int8Static([(torch.randn(2, 4),)])), "", "it is the model itself")


# -- bad input


@pytest.mark.parametrize("bad", [5, None, math.sin, object()])
def test_what_cannot_be_iterated(bad):
    with pytest.raises(TypeError, match=r"Int8Static: calibration is a .*, but must be an iterable of example inputs"):
        Int8Static(bad)


@pytest.mark.parametrize("bad", [torch.randn(3, 4), {"x": torch.randn(3, 4)}, "data"])
def test_a_single_input_is_not_a_calibration(bad):
    with pytest.raises(TypeError, match=r"wrap a single one as \[\(x,\)\]"):
        Int8Static(bad)


def test_wrong_observers():
    with pytest.raises(ValueError, match="observer 'max' is unknown; use one of minmax, percentile, mse"):
        Int8Static(batches(), observer="max")
    with pytest.raises(ValueError, match="percentile is 0, but must be above 0 and at most 100"):
        Int8Static(batches(), observer="percentile", percentile=0)


@pytest.mark.parametrize("empty", [[], (), iter(())])
def test_no_data(empty):
    model = mlp()
    before = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match="Int8Static: calibration gave no inputs; it is empty, or a generator that was"
    ):
        swap_(model, Int8Static(empty))
    with pytest.raises(ValueError, match="calibrate: calibration gave no inputs"):
        calibrate(model, [])
    untouched(model, before)


def test_inputs_that_are_no_inputs():
    model = mlp().train()
    before = copy.deepcopy(model)
    for bad in ([torch.randn(8, 20)], [[torch.randn(8, 20)]], [(torch.randn(8, 20),), None]):
        with pytest.raises(
            TypeError, match="Int8Static: an input of calibration must be a tuple of positional or a dict"
        ):
            swap_(model, Int8Static(bad))
    untouched(model, before)


def test_inputs_of_another_shape_and_models_that_raise():
    """The model's own error passes through; nothing is half changed and no hook stays."""
    model = mlp().train()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        swap_(model, Int8Static([*batches(), (torch.randn(8, 21),)]))
    untouched(model, before)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        swap_(model, Int8Static([{"y": torch.randn(8, 20)}]))
    untouched(model, before)

    def broken():
        yield batches()[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        swap_(model, Int8Static(broken()))
    untouched(model, before)


def test_inputs_are_not_overwritten():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x.mul_(0))

    x = torch.randn(2, 4)
    kept = x.clone()
    swap_(Overwrites(), Int8Static([(x,)]))
    assert_exact(x, kept)


def test_the_users_generator_is_left_alone():
    """Data that is drawn while calibration runs is the caller's, and torch's generator is where the caller left it."""

    def stream():
        for _ in range(2):
            yield (torch.randn(8, 20),)

    torch.manual_seed(7)
    expected = [x for (x,) in stream()]
    after = torch.rand(3)
    seen = []

    def recorded():
        for (x,) in stream():
            seen.append(x)
            yield (x,)

    model = nn.Sequential(nn.Dropout(), mlp()).train()
    torch.manual_seed(7)
    swap_(model, Int8Static(recorded()))
    assert_exact(torch.rand(3), after)
    for actual, wanted in zip(seen, expected, strict=True):
        assert_exact(actual, wanted)


def test_configs_are_compared_by_identity():
    """Data has no equality, and a policy must not take two calibrations for one."""
    a, b = Int8Static(batches()), Int8Static(batches())
    assert a == a
    assert a != b
    assert len({a, b}) == 2
    assert "tensor" not in repr(a)
    with pytest.raises(AttributeError):
        a.observer = "mse"
    assert Calibration({"a": 1.0}) == Calibration({"a": 1.0})


# -- files


def test_round_trip(tmp_path):
    path = tmp_path / "model.safetensors"
    model, x = mlp(), batches()[0][0]
    swap_(model, {"0": Int8Static(batches()), "2": INT8})
    lamina.save(model, path)
    for fresh in (mlp(), copy.deepcopy(model)):
        lamina.load_(fresh, path)
        assert_exact(fresh(x), model(x))
        assert_exact(fresh[0].input_scale, model[0].input_scale)
        assert fresh[2].input_scale is None
    dynamic = mlp()
    swap_(dynamic, {"0": INT8, "2": INT8})
    lamina.load_(dynamic, path)
    assert_exact(dynamic(x), model(x))


def test_static_is_as_good_as_dynamic_on_data_like_the_calibration():
    model, x = mlp(), torch.randn(64, 20)
    expected = model(x)
    static, dynamic = copy.deepcopy(model), copy.deepcopy(model)
    swap_(static, Int8Static(batches(16), observer="mse"))
    swap_(dynamic, INT8)
    # One scale for all rows loses some of what a scale per row keeps: 6 dB are one bit.
    assert sqnr_db(static(x), expected) > sqnr_db(dynamic(x), expected) - 6
