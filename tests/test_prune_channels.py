"""Whole channels go from every layer that hangs on them, and what is left computes what the zeroed model does."""

import copy

import pytest
import torch
from torch import nn

from lamina import models, prune


def zeroed(model, fqn, kept):
    """The model with all but the kept output channels of a layer silenced."""
    masked = copy.deepcopy(model)
    layer = masked.get_submodule(fqn)
    gone = [channel for channel in range(len(layer.weight)) if channel not in kept]
    with torch.no_grad():
        layer.weight[gone] = 0
        layer.bias[gone] = 0
    return masked


def test_the_smallest_channels_go_and_the_rest_computes_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()
    with torch.no_grad():
        model[0].weight[[1, 4, 6]] *= 0.01
        model[0].bias[[1, 4, 6]] = 0
    x = torch.rand(2, 1, 10, 10)
    expected = zeroed(model, "0", [0, 2, 3, 5, 7])(x)
    report = prune.channels_(model, (x,), {"0": 3 / 8})
    assert model[0].weight.shape == (5, 1, 3, 3)
    assert model[2].weight.shape == (4, 5, 3, 3)
    torch.testing.assert_close(model(x), expected)
    decisions = {d.fqn: (d.was, d.now, d.reason) for d in report.decisions}
    assert decisions["0"][:2] == ("Conv2d(1, 8, 3x3)", "Conv2d(1, 5, 3x3)")
    assert decisions["2"] == ("Conv2d(8, 4, 3x3)", None, "the sparsities do not name it")
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert "1 of 3 layers lost channels" in str(report)


def test_a_residual_network_shrinks_and_trains_on():
    shape = {"width": 8, "num_classes": 10, "in_channels": 1}
    model = models.create("resnet18", **shape)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
    model.stem[0].weight.requires_grad_(False)
    x = models.example_inputs("resnet18", 2, **shape)
    report = prune.channels_(model, x, 0.5, round_to=4, filter_fn=lambda module, fqn: fqn != "stages.3.1.body.3")
    assert report.parameters_after < 0.5 * report.parameters_before
    left = {d.fqn: d.reason for d in report.left}
    assert left == {
        "head": "its channels are the model's output",
        "stages.3.1.body.3": "excluded by filter_fn",
        # Their outputs are added to those of the excluded layer.
        "stages.3.0.body.3": "its channels go with those of stages.3.1.body.3: excluded by filter_fn",
        "stages.3.0.shortcut.0": "its channels go with those of stages.3.1.body.3: excluded by filter_fn",
    }
    assert model.training
    assert not model.stem[0].weight.requires_grad
    assert model.stages[0][0].body[0].weight.shape == (4, 4, 3, 3)
    model(*x).sum().backward()
    assert model.stages[0][0].body[0].weight.grad is not None


def test_attention_norms_and_embeddings_keep_their_channels():
    torch.manual_seed(0)
    model = models.create("vit_mnist", dim=32, layers=1, ffn=64).eval()
    before = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    report = prune.channels_(model, models.example_inputs("vit_mnist", 2), 0.5)
    assert [d.fqn for d in report.swapped] == ["layers.0.ffn.0"]
    reasons = {d.fqn: d.reason for d in report.left}
    assert "position_embedding" in reasons["patch_embedding"]
    assert "does not compute what it does with them set to zero" in reasons["layers.0.attention.value"]
    assert "LayerNorm" in reasons["layers.0.attention.out"]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "ffn" not in name:
            assert module.weight.shape == before[name]
    assert model.layers[0].ffn[0].weight.shape == (32, 32)


def test_masks_must_come_off_first():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.magnitude_(model, {"0": 0.5})
    prune.hold_(model)
    report = prune.channels_(model, (torch.ones(1, 8),), 0.5)
    assert report.left[0].reason == "its weight has a mask; take it off with lamina.prune.bake_ first"


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.used(x))


def test_bad_input_changes_nothing(monkeypatch):
    model = Branches()
    shapes = [parameter.shape for parameter in model.parameters()]
    x = (torch.ones(1, 4),)
    with pytest.raises(ValueError, match="sparsity is 1, but a layer needs at least one channel"):
        prune.channels_(model, x, 1.0)
    with pytest.raises(ValueError, match="sparsity is -1, but must be between 0 and 1"):
        prune.channels_(model, x, -1.0)
    with pytest.raises(ValueError, match="round_to is 0"):
        prune.channels_(model, x, round_to=0)
    with pytest.raises(ValueError, match="the model cannot be traced: mat1 and mat2"):
        prune.channels_(model, (torch.ones(1, 5),))
    with pytest.raises(TypeError, match="example_inputs must be a tuple of positional or a dict of keyword arguments"):
        prune.channels_(model, torch.ones(1, 4))
    assert [parameter.shape for parameter in model.parameters()] == shapes
    report = prune.channels_(model, {"x": x[0]}, 0.2, round_to=2)
    assert {d.fqn: d.reason for d in report.left} == {
        "used": "6 channels cannot become fewer at this sparsity and round_to",
        "unused": "not called by the example inputs",
        "out": "2 channels cannot become fewer at this sparsity and round_to",
    }
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torch_pruning":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install lamina\[prune\]"):
        prune.channels_(model, x)
