"""The benchmark of GPUs without one: what is selected and judged, and the suites on small tensors of the CPU."""

import dataclasses
import importlib

import pytest
import torch
from test_bench import TARGETS, a_machine, a_measurement, some_results
from typer.testing import CliRunner

from lamina.bench import gpu, results, runner, targets, text, timing, workloads
from lamina.cli import app

GPU = gpu.Gpu(
    name="Test GPU",
    memory=140 << 30,
    multiprocessors=132,
    capability="9.0",
    l2=60 << 20,
    peaks={"bf16": 8e14, "int8": 1.5e15},
    bandwidth=4.3e12,
)
SUITES = (
    *("gpu_attention", "gpu_attention_backward", "gpu_attention_decode", "gpu_attention_varlen", "gpu_int8_conv2d"),
    *("gpu_int8_linear", "gpu_sparse_linear", "gpu_weight_only_linear"),
)
# (sizes as in the shape file): of every suite, small.
SMALL = {
    "gpu_attention": [(1, 2, 2, 64, 16, mask) for mask in ("none", "causal", "additive", "window1024")]
    + [(1, 4, 2, 70, 16, "causal")],
    "gpu_attention_backward": [(1, 4, 2, 40, 16, "causal"), (1, 2, 2, 40, 16, "none")],
    "gpu_attention_decode": [(2, 4, 2, 33, 16, "bfloat16"), (2, 2, 2, 33, 16, "int8")],
    "gpu_attention_varlen": [(3, 4, 2, 5, 30, 16)],
    "gpu_int8_conv2d": [(2, 8, 10, 12, 3, 2)],
    "gpu_int8_linear": [(9, 32, 24, "gelu"), (9, 32, 24, "none")],
    "gpu_sparse_linear": [(9, 32, 24, "4x1", 50)],
    "gpu_weight_only_linear": [(3, 64, 24, 2, "int8"), (3, 64, 24, 2, "int4")],
}


def a_gpu_measurement(workload: str, seconds: float = 1e-3, **changes) -> results.Measurement:
    baselines = changes.pop("baselines", {})
    made = a_measurement(workload, lamina_seconds=seconds, dims=changes.pop("dims", {"S": 8192}))
    times = made.times | {
        name: dataclasses.replace(made.times["lamina"], q50=value) for name, value in baselines.items()
    }
    return dataclasses.replace(made, device="cuda", precision="bf16", isa="sm_90", times=times, **changes)


# -- selection


def test_the_cpu_runs_no_workload_of_a_gpu():
    assert all(workload.device == "cpu" for workload in workloads.select())
    on_gpu = workloads.select(device="cuda")
    assert {w.op for w in on_gpu} >= {*SUITES, "gpu_model"}
    assert all(w.device == "cuda" and w.id.startswith("gpu_") for w in on_gpu)
    with pytest.raises(ValueError, match="no workload on a GPU matches 'conv1d'"):
        workloads.select("conv1d", device="cuda")


def test_a_workload_of_a_gpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert workloads.select(device="cuda")[0].missing() == "needs a GPU"


# -- suites


@pytest.mark.parametrize(("suite", "sizes"), [(name, sizes) for name in SMALL for sizes in SMALL[name]])
def test_suites(suite, sizes, monkeypatch):
    """Inputs, lamina's call, the gate and the baselines of every suite, on the CPU."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    workload = importlib.import_module(f"lamina.bench.suite.{suite}")._workload("small", *sizes)
    assert workload.id == f"{suite}/small/{workload.shape}"
    inputs = workload.make_inputs()
    with torch.inference_mode():
        output = workload.run(inputs)()
        gate = workload.check(inputs, output)
    assert gate.ok, gate.message
    assert workload.flops(inputs) > 0
    assert workload.bytes(inputs) > 0
    for name, prepare in workload.baselines.items():
        if name in ("flex", "int_mm", "sdpa cudnn", "sdpa efficient", "sdpa flash"):
            continue  # what compiles for a minute, or is for GPUs
        with torch.inference_mode():
            prepare(inputs)()


def test_a_wrong_answer_is_seen(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    for suite in SUITES:
        workload = importlib.import_module(f"lamina.bench.suite.{suite}")._workload("small", *SMALL[suite][0])
        inputs = workload.make_inputs()
        with torch.inference_mode():
            output = workload.run(inputs)()
            wrong = tuple(t + 0.1 for t in output) if isinstance(output, tuple) else output + 0.1
            assert not workload.check(inputs, wrong).ok, suite


def test_the_model_suite(monkeypatch):
    """A small BERT, rewritten: of what the CPU has kernels for, as the GPU has."""
    module = importlib.import_module("lamina.bench.suite.gpu_model")
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(module, "SIZES", {"dim": 32, "layers": 1, "heads": 2, "ffn": 64, "positions": 16})
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(module, "TOKENS", 16)
    workload = next(module.workloads())
    inputs = workload.make_inputs()
    assert any(type(layer).__name__ == "Int8Linear" for layer in inputs.rewritten.modules())
    gate = workload.check(inputs, workload.run(inputs)())
    assert gate.ok, gate.message
    assert workload.flops(inputs) > 1e5
    assert workload.bytes(inputs) > 1e3
    workload.baselines["eager"](inputs)()


def test_scores_of_masks():
    from lamina.bench.suite.gpu_attention import scores_of

    assert scores_of(4, "none") == 16
    assert scores_of(4, "causal") == 10
    assert scores_of(5, "window1") == 1 + 2 * 4


# -- running, on a false GPU


def test_contenders_on_a_gpu_are_timed_by_its_stopwatch(monkeypatch):
    seen = []

    def stopwatch(call, calls):
        seen.append(calls)
        call()
        return {"ours": 1e-4, "theirs": 2e-4}[call()]

    found = timing.measure({"a": lambda: "ours", "b": lambda: "theirs"}, budget=0.0, stopwatch=stopwatch)
    assert found["a"].q50 == 1e-4
    assert timing.speedup(found["b"], found["a"]) == 2.0
    assert max(seen) == 5  # of 100 us each: half a millisecond


def test_a_run_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "stopwatch", lambda: lambda call, calls: (call(), 1e-3)[1])
    monkeypatch.setattr(gpu, "architecture", lambda: "sm_90")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    module = importlib.import_module("lamina.bench.suite.gpu_attention_varlen")
    workload = module._workload("small", *SMALL["gpu_attention_varlen"][0])
    (found,) = runner.run(workload, workload.make_inputs(), [1, 2], budget=0.0)
    assert found.gate.ok, found.gate.message
    assert (found.device, found.isa, found.threads) == ("cuda", "sm_90", 1)
    assert found.speedup("sdpa padded") == 1.0


# -- numbers


def test_measurements_are_held_against_the_gpu():
    here = a_machine(gpu=GPU)
    item = a_gpu_measurement("gpu_attention/a/b", flops=4 * 10**11, bytes=2_150_000_000)
    assert item.peak_fraction(here) == pytest.approx(0.5)
    assert item.level(here) == "HBM"
    assert item.bandwidth_fraction(here) == pytest.approx(0.5)
    small = dataclasses.replace(item, bytes=1 << 20)
    assert small.level(here) == "L2"
    assert small.bandwidth_fraction(here) is None, "nobody measured how fast the L2 cache is"
    assert item.peak_fraction(a_machine()) is None


def test_the_fastest_of_several_baselines_is_the_rival():
    baselines = {"sdpa flash": 2e-3, "sdpa cudnn": 1.5e-3, "eager": 0.5e-3}
    item = a_gpu_measurement("gpu_attention/a/b", baselines=baselines)
    assert item.rival("sdpa *") == "sdpa cudnn"
    assert item.rival("eager") == "eager"
    assert item.rival("nobody *") == "nobody *"
    target = targets.Target("t", "gpu_*", "speedup", [1], "why", minimum=1.6, baseline="sdpa *", device="cuda")
    assert target.value(item, a_machine(gpu=GPU)) == pytest.approx(1.5)
    (verdict,) = targets.judge([target], [item, a_measurement("gpu_attention/a/cpu")], a_machine(gpu=GPU))
    assert (verdict.status, verdict.total) == ("missed", 1)


def test_targets_of_a_gpu_are_not_the_cpus():
    promised = targets.parse(TARGETS)
    on_gpu = [target for target in promised if target.device == "cuda"]
    assert on_gpu
    known = [w for w in workloads.registry().values() if w.device == "cuda"]
    for target in on_gpu:
        assert any(target.selects(w.id, w.dims) for w in known), target.id
        assert target.threads == [1]
    for target in promised:
        if target.device == "cpu":
            assert not any(target.selects(w.id, w.dims) for w in known), target.id


def test_machine_with_a_gpu_survives_the_file(tmp_path):
    found = some_results(a_gpu_measurement("gpu_attention/a/b"), here=a_machine(gpu=GPU))
    found.save(tmp_path / "results.json")
    again = results.load(tmp_path / "results.json")
    assert again.machine.gpu == GPU
    assert again.measurements[0].device == "cuda"


def test_gpu_lines():
    lines = dict(text.machine_lines(a_machine(gpu=GPU)))
    assert lines["GPU"] == "Test GPU, 132 multiprocessors, compute capability 9.0"
    assert lines["GPU bf16 peak"] == "800 TOP/s"
    assert lines["GPU copy"] == "4300 GB/s, read and written"
    assert text.rate(8e14) == "800 TFLOP/s"
    assert text.rate(4.2e11) == "420 GFLOP/s"


def test_the_higher_peaks_of_two_probes_count():
    later = dataclasses.replace(GPU, peaks={"bf16": 9e14, "int8": 1e15}, bandwidth=4.0e12)
    both = gpu.combine(GPU, later)
    assert both.peaks == {"bf16": 9e14, "int8": 1.5e15}
    assert both.bandwidth == 4.3e12
    assert gpu.combine(None, GPU) is GPU
    assert gpu.combine(None, None) is None


# -- the command


def test_the_command_lists_and_refuses(monkeypatch):
    runner = CliRunner()
    listed = runner.invoke(app, ["bench", "--device", "cuda", "--list", "--quick", "--filter", "gpu_model"])
    assert listed.exit_code == 0
    assert listed.output.split() == ["gpu_model/bert_large/b32x512"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = runner.invoke(app, ["bench", "--device", "cuda"])
    assert refused.exit_code == 2
    assert "--device cuda needs a GPU, and torch sees none here" in refused.output
    unknown = runner.invoke(app, ["bench", "--device", "tpu"])
    assert "--device is 'tpu', but must be cpu or cuda" in unknown.output


def test_no_workload_is_begun_when_the_time_is_over():
    chosen = workloads.select("softmax/*")[:2]
    found, skipped = runner.run_all(chosen, [1], end=0.0)
    assert found == []
    assert skipped == {workload.id: "left out: the time is over" for workload in chosen}
