"""lamina.nn.Conv2d: nn.Conv2d's drop-in, in torch's own samples, in swap_ and in accelerate."""

import copy

import pytest
import torch
from tolerances import assert_composite
from torch import nn
from torch.testing._internal.common_modules import module_db

import lamina

SAMPLES = next(info for info in module_db if info.module_cls is nn.Conv2d)


def drop_in(conv: nn.Conv2d, **options) -> lamina.nn.Conv2d:
    return lamina.nn.Conv2d.from_float(conv, **options)


@pytest.mark.parametrize("training", [False, True])
def test_torchs_own_samples(training):
    count = 0
    for sample in SAMPLES.module_inputs_func(
        SAMPLES, device="cpu", dtype=torch.float32, requires_grad=training, training=training
    ):
        made, call = sample.constructor_input, sample.forward_input
        torchs = nn.Conv2d(*made.args, **made.kwargs).train(training)
        if torchs.weight.is_complex() or any(isinstance(a, torch.Tensor) and a.is_complex() for a in call.args):
            continue
        ours = drop_in(torchs)
        assert ours.state_dict().keys() == torchs.state_dict().keys()
        with torch.set_grad_enabled(training):
            y, eager = ours(*call.args, **call.kwargs), torchs(*call.args, **call.kwargs)
        exact = copy.deepcopy(torchs).double()(*(a.detach().double() for a in call.args), **call.kwargs)
        assert_composite(y.detach(), eager.detach(), exact.detach())
        if training:
            grads = torch.autograd.grad(y.sum(), list(ours.parameters()))
            for ours_grad, grad in zip(grads, torch.autograd.grad(eager.sum(), list(torchs.parameters())), strict=True):
                torch.testing.assert_close(ours_grad, grad)
        count += 1
    assert count >= 4


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same"], ids=str)
def test_padding_modes(mode, padding, generator):
    conv = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode)
    x = torch.randn(2, 4, 7, 9, generator=generator)
    with torch.no_grad():
        assert_composite(drop_in(conv)(x), conv(x), copy.deepcopy(conv).double()(x.double()))


def test_state_dict_goes_both_ways(generator):
    one, other = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    ours = drop_in(one)
    assert ours.weight is one.weight
    ours.load_state_dict(other.state_dict())
    assert torch.equal(one.weight, other.weight)
    assert "winograd=4" in repr(drop_in(one, winograd=4))


@pytest.mark.parametrize(("shape", "tile"), [((1, 32, 24, 24), 4), ((1, 32, 7, 7), 2)])
def test_four_is_used_where_the_map_is_large(shape, tile, generator):
    x, conv = torch.randn(shape, generator=generator), nn.Conv2d(32, 32, 3, padding=1)
    with torch.no_grad():
        y = drop_in(conv, winograd=4)(x)
        assert torch.equal(y, lamina.ops.conv2d(x, conv.weight, conv.bias, padding=1, winograd=tile))


class Net(nn.Module):
    """Two convolutions, and a flattening that may or may not take channels_last."""

    def __init__(self, flatten) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.head, self.flatten = nn.Linear(32 * 64, 5), flatten

    def forward(self, x):
        return self.head(self.flatten(torch.relu(self.b(torch.relu(self.a(x))))))


def test_swap_reports_and_lays_out_channels_last(generator):
    net, x = Net(lambda t: t.flatten(1)).eval(), torch.randn(2, 3, 8, 8, generator=generator)
    with torch.no_grad():
        before, exact = net(x), copy.deepcopy(net).double()(x.double())
        report = lamina.swap_(net, lamina.FusedConv())
        assert [d.now for d in report.swapped] == ["lamina Conv2d(3, 32, 3x3)", "lamina Conv2d(32, 32, 3x3)"]
        assert_composite(net(x), before, exact)
        assert net.b(net.a(x)).is_contiguous(memory_format=torch.channels_last)
    assert lamina.swap_(net, lamina.FusedConv()).decisions == ()


def test_swap_leaves_what_is_not_plain():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    model = nn.Sequential(
        Own(3, 4, 3), nn.Conv2d(4, 4, 3).double(), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    )
    reasons = [d.reason for d in lamina.swap_(model, lamina.FusedConv()).left]
    assert len(reasons) == 3
    for reason, part in zip(reasons, ("subclass of nn.Conv2d", "torch.float64", "parametrized"), strict=True):
        assert part in reason


def test_accelerate_takes_back_what_the_model_cannot_run_with(generator):
    """`.view` refuses a channels_last tensor: the layers go back, and the report says why."""
    net, x = Net(lambda t: t.view(t.shape[0], -1)).eval(), torch.randn(2, 3, 8, 8, generator=generator)
    fast = lamina.accelerate(net, (x,), lamina.FusedConv(), min_speedup=0.0, compile=False)
    assert {d.fqn for d in fast.report.left} == {"a", "b"}
    assert all("the model does not run with it" in d.reason for d in fast.report.left)
    with torch.no_grad():
        assert torch.equal(fast.model(x), net(x))
    kept = lamina.accelerate(net, (x,), lamina.FusedConv(channels_last=False), min_speedup=0.0, compile=False)
    assert len(kept.report.swapped) == 2


def test_save_and_load(tmp_path, generator):
    net, x = Net(lambda t: t.flatten(1)).eval(), torch.randn(2, 3, 8, 8, generator=generator)
    other = Net(net.flatten).eval()
    lamina.swap_(net, lamina.FusedConv())
    lamina.save(net, tmp_path / "net.safetensors")
    lamina.load_(other, tmp_path / "net.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(other(x), net(x))


@pytest.mark.parametrize("backend", ["aot_eager", lamina.compile.backend], ids=["aot_eager", "lamina"])
def test_compiles_in_one_graph(backend, generator):
    net, x = Net(lambda t: t.flatten(1)).eval(), torch.randn(2, 3, 8, 8, generator=generator)
    lamina.swap_(net, lamina.FusedConv())
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(net, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), net(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"Conv2d: winograd is 3, but must be 0, 2 or 4"):
        lamina.nn.Conv2d(3, 4, 3, winograd=3)
    with pytest.raises(ValueError, match=r"FusedConv: winograd is 3, but must be 0, 2 or 4"):
        lamina.FusedConv(winograd=3)
    with pytest.raises(TypeError, match=r"expected nn\.Conv2d, got Conv1d"):
        drop_in(nn.Conv1d(3, 4, 3))
