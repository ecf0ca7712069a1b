"""quant.report: the layer that costs most comes first, and the model stays as it is."""

import copy

import pytest
import torch
from tolerances import assert_exact
from torch import nn

import lamina
from lamina.quant import LayerError, QuantizationReport, report
from lamina.running import relative_error

INT8 = lamina.Int8Dynamic()


def mlp() -> nn.Sequential:
    """The middle layer has an outlier in every row of its weight, for an input that is always 0: int8 hurts it most."""
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 7))
    with torch.no_grad():
        model[2].weight[:, 4] += 20
        model[0].weight[4] = 0
        model[0].bias[4] = -1
    return model


def test_the_worst_layer_comes_first():
    model, x = mlp(), torch.randn(16, 20)
    ranked = report(model, (x,))
    assert ranked.layers[0].fqn == "2"
    assert {layer.fqn for layer in ranked.layers} == {"0", "2", "4"}
    errors = [layer.model_error for layer in ranked.layers]
    assert errors == sorted(errors, reverse=True)
    assert ranked.layers[0].was == "Linear(30, 30)"
    assert ranked.layers[0].now == "Int8Linear(30, 30)"


def test_the_numbers_are_what_swapping_one_layer_gives():
    model, x = mlp(), torch.randn(16, 20)
    ranked = report(model, [(x[:9],), (x[9:],)])
    with torch.no_grad():
        expected = model(x)
        for layer in ranked.layers:
            alone = copy.deepcopy(model)
            lamina.swap_(alone, {layer.fqn: INT8})
            assert layer.model_error == pytest.approx(relative_error([alone(x)], [expected]), rel=1e-3)
            index = int(layer.fqn)
            seen = model[:index](x)
            own = relative_error([alone[index](seen)], [model[index](seen)])
            assert layer.layer_error == pytest.approx(own, rel=1e-3)
        whole = copy.deepcopy(model)
        lamina.swap_(whole, INT8)
        assert ranked.error == pytest.approx(relative_error([whole(x)], [expected]), rel=1e-3)


def test_leaving_out_the_worst_helps():
    model, x = mlp(), torch.randn(16, 20)
    ranked = report(model, (x,))
    policy = {ranked.layers[0].fqn: None, "_default": INT8}
    assert report(model, (x,), policy).error < ranked.error / 2


@pytest.mark.parametrize("kind", ["tuple", "dict", "list", "generator", "list_of_dicts"])
def test_inputs_of_every_kind(kind):
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)
    inputs = {
        "tuple": (x,),
        "dict": {"input": x},
        "list": [(x,)],
        "generator": ((x,) for _ in range(2)),
        "list_of_dicts": [{"input": x}],
    }[kind]
    assert report(model, inputs).layers[0].layer_error > 0


def test_sorting():
    ranked = report(mlp(), (torch.randn(5, 20),))
    by_name = ranked.sorted("fqn", reverse=False)
    assert [layer.fqn for layer in by_name.layers] == ["0", "2", "4"]
    assert by_name.error == ranked.error
    own = [layer.layer_error for layer in ranked.sorted("layer_error").layers]
    assert own == sorted(own, reverse=True)
    with pytest.raises(ValueError, match="'speed' is no field of LayerError; use one of fqn, was, now"):
        ranked.sorted("speed")


def test_layers_that_are_not_called_come_last():
    layers = (LayerError("a", "x", "y", None, 0.5), LayerError("b", "x", "y", 0.1, 0.1))
    ranked = QuantizationReport(layers, (), 0.5)
    assert [layer.fqn for layer in ranked.sorted("layer_error").layers] == ["b", "a"]
    assert "not called" in str(ranked)

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    found = {layer.fqn: layer for layer in report(Idle(), (torch.randn(2, 4),)).layers}
    assert found["idle"].layer_error is None
    assert found["idle"].model_error == 0.0


def test_a_layer_used_twice_counts_both_uses():
    fc = nn.Linear(6, 6)
    model, x = nn.Sequential(fc, nn.Tanh(), fc), torch.randn(3, 6)
    (layer,) = report(model, (x,)).layers
    int8 = lamina.nn.Int8Linear.from_float(fc)
    inputs = [x, fc(x).tanh()]
    expected = relative_error([int8(i) for i in inputs], [fc(i) for i in inputs])
    assert layer.layer_error == pytest.approx(expected, rel=1e-3)


def test_nothing_is_changed():
    model = mlp().train()
    model[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    report(model, (torch.randn(2, 20),))
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    for name, tensor in model.state_dict().items():
        assert_exact(tensor, before[name])


def test_what_is_left_alone_is_said():
    class Shouting(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Shouting(4, 4))
    ranked = report(model, (torch.randn(2, 4),), filter_fn=lambda module, fqn: True)
    assert [d.fqn for d in ranked.left] == ["1"]
    text = str(ranked)
    assert text.startswith("1 layers, all replaced at once: output error ")
    for word in ("Int8Linear(4, 4)", "Shouting is a subclass", "model's error", "why"):
        assert word in text
    assert report(model, (torch.randn(2, 4),), filter_fn=lambda module, fqn: False).layers == ()


def test_progress():
    calls = []
    report(mlp(), [(torch.randn(2, 20),)] * 2, progress=lambda *call: calls.append(call))
    assert calls[0] == ("input 1: 0", 0, 3)
    assert ("input 2: 4", 2, 3) in calls
    assert calls[-1] == ("done", 3, 3)


def test_other_configs():
    model, x = mlp(), torch.randn(32, 20)
    ranked = report(model, (x,), lamina.Int8Static([(x,)]))
    assert len(ranked.layers) == 3
    assert all(layer.layer_error > 0 for layer in ranked.layers)


def test_bad_input():
    model = mlp()
    with pytest.raises(TypeError, match="report: inputs is a Tensor, but must be an iterable of example inputs"):
        report(model, torch.randn(2, 20))
    with pytest.raises(TypeError, match="report: inputs must be a tuple of positional or a dict of keyword arguments"):
        report(model, [torch.randn(2, 20)])
    with pytest.raises(ValueError, match="report: there are no inputs; the iterable is empty, or a generator"):
        report(model, [])
    with pytest.raises(TypeError, match="give the example inputs themselves"):
        report(model, lamina.quant.calibrate(model, [(torch.randn(2, 20),)]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        report(model, (torch.randn(2, 21),))
    with pytest.raises(ValueError, match="config 'int8' is unknown"):
        report(model, (torch.randn(2, 20),), "int8")

    class Integers(nn.Module):
        def forward(self, x):
            return x.argmax()

    with pytest.raises(ValueError, match="report: the model gives no floating-point output"):
        report(Integers(), (torch.randn(3),))


def test_float64_models_have_nothing_to_rank():
    ranked = report(mlp().double(), (torch.randn(2, 20).double(),))
    assert ranked.layers == ()
    assert ranked.error == 0.0
    assert "float64" in ranked.left[0].reason
