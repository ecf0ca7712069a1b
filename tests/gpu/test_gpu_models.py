"""Modules, models and what takes them whole, on a GPU: moved there and back, captured, compiled, accelerated, saved."""

import copy

import pytest
import torch
from tolerances import assert_exact
from torch import nn

import lamina
from lamina.running import relative_error
from lamina.stopwatch import OnGPU

LINEARS = {
    "Int8Linear": lambda linear: lamina.nn.Int8Linear.from_float(linear, "gelu"),
    "static Int8Linear": lambda linear: lamina.nn.Int8Linear.from_float(linear, input_scale=0.03),
    "Int8WeightOnlyLinear": lamina.nn.Int8WeightOnlyLinear.from_float,
    "Int4WeightOnlyLinear": lamina.nn.Int4WeightOnlyLinear.from_float,
    "SparseLinear": lamina.nn.SparseLinear.from_float,
}
# A float16 or bfloat16 rounding of values, or products of tf32: what separates two devices, in parts of the output.
MOST_APART = 2e-3


pytestmark = pytest.mark.usefixtures("exact_products")


def of_gpu(build):
    torch.manual_seed(0)
    return build(nn.Linear(128, 192))


def apart(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return relative_error([actual.cpu()], [expected.cpu()])


@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_layer_moves_to_the_gpu_and_back(name):
    layer, x = of_gpu(LINEARS[name]), torch.randn(5, 128)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with torch.no_grad():
        expected = layer(x)
        moved = copy.deepcopy(layer).cuda()
        assert all(t.is_cuda for t in (*moved.buffers(), *moved.parameters()))
        assert moved.weight.is_cuda
        assert apart(moved(x.cuda()), expected) < MOST_APART
        state = moved.state_dict()
        for key, value in before.items():
            assert_exact(state[key].cpu(), value, key)
        # A state_dict of one device loads on the other.
        layer.load_state_dict(state)
        moved.load_state_dict(before)
        assert apart(moved(x.cuda()), expected) < MOST_APART
        assert_exact(moved.cpu()(x), expected)
        assert_exact(layer(x), expected)


@pytest.mark.parametrize("name", LINEARS)
def test_a_layer_of_a_linear_on_the_gpu_is_that_of_the_cpu(name):
    torch.manual_seed(0)
    linear = nn.Linear(128, 192)
    there, here = LINEARS[name](copy.deepcopy(linear).cuda()), LINEARS[name](linear)
    for key, value in here.state_dict().items():
        other = there.state_dict()[key].cpu()
        if name == "Int4WeightOnlyLinear":  # sums in another order decide, now and then, for another scale
            assert (other != value).float().mean() < 0.02, key
        else:
            assert_exact(other, value, key)


@pytest.mark.parametrize("kind", [lamina.nn.LSTM, lamina.nn.GRU, lamina.nn.Int8LSTM, lamina.nn.Int8GRU])
def test_recurrent_layers_run_on_cudnn(kind):
    torch.manual_seed(0)
    layer = kind.from_float(kind._torch(12, 20, num_layers=2, bidirectional=True)).eval()
    x = torch.randn(7, 3, 12)
    with torch.no_grad():
        expected, _ = layer(x) if kind in (lamina.nn.LSTM, lamina.nn.GRU) else layer.dequantized()(x)
        moved = layer.cuda()
        actual, _ = moved(x.cuda())
        assert apart(actual, expected) < MOST_APART
        assert_exact(moved(x.cuda())[0], actual)


def transformer() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, activation="gelu", batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return model.to("cuda", torch.bfloat16), torch.randn(4, 64, 256, device="cuda", dtype=torch.bfloat16)


CONFIGS = lamina.Int8Dynamic(), lamina.FusedAttention()


def test_a_rewritten_model_is_captured_in_a_graph():
    """No synchronisation and no memory but torch's: otherwise the capture would fail, or the replay see old values."""
    model, x = transformer()
    lamina.swap_(model, CONFIGS)
    assert any(isinstance(module, lamina.nn.Int8Linear) for module in model.modules())
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(x)
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert_exact(output, model(x))


def test_a_rewritten_model_is_compiled_by_inductor():
    model, x = transformer()
    lamina.swap_(model, CONFIGS)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert apart(compiled(x), model(x)) < 0.02


def test_the_backend_leaves_graphs_of_a_gpu_as_they_are():
    model, x = transformer()
    report = lamina.compile.explain(model, (x,))
    assert not report.fused
    assert all("fusions and plans are for the CPU" in graph.whole for graph in report.graphs)


def test_accelerate():
    model, x = transformer()
    fast = lamina.accelerate(model, (x,))
    assert fast.report.device == torch.cuda.get_device_name()
    assert fast.report.speedup >= 1.0
    assert fast.report.error <= 0.1
    with torch.no_grad():
        assert apart(fast.model(x), model(x)) <= 0.1
    (form,) = [form for form in fast.report.forms if form.name == "compiled"]
    assert form.reason == "not tried on cuda:0: fusions and plans are for the CPU"
    print(fast.report)


def test_a_saved_model_is_loaded_on_the_other_device(tmp_path):
    model, x = transformer()
    lamina.swap_(model, CONFIGS)
    with torch.no_grad():
        expected = model(x)
        lamina.save(model, tmp_path / "model.safetensors")
        fresh = transformer()[0].cpu()
        lamina.load_(fresh, tmp_path / "model.safetensors")
        assert apart(fresh(x.cpu()), expected) < 0.02
        assert apart(fresh.cuda()(x), expected) < 0.02


def test_the_stopwatch_sees_kernels_and_not_launches():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    timed = OnGPU(ahead=10_000_000)
    # The least of several: others may have the GPU in between.
    product = min(timed(lambda: x @ x, 5) for _ in range(5))
    assert 2 * 4096**3 / product > 2e13
    nothing = min(timed(lambda: None, 5) for _ in range(5))
    assert nothing < product / 10


def test_peaks_are_what_a_gpu_can_have():
    from lamina.bench import gpu

    here = gpu.describe()
    assert min(here.peaks.values()) > 2e13
    assert here.bandwidth > 2e11
    assert here.level(1 << 40) == "HBM"
