"""The benchmark's own arithmetic on a false clock: timing, gates, targets, comparisons, the page. No real times."""

import dataclasses
import gc
import json
import re
from pathlib import Path

import pytest
import torch

import lamina
from lamina.bench import compare, machine, peers, results, runner, targets, text, timing, workloads
from lamina.bench.break_even import break_evens
from lamina.bench.memory import peak_bytes
from lamina.bench.peers import PEERS
from lamina.bench.reporting import page, timeline
from lamina.bench.workloads import Gate, Workload

TARGETS = Path(__file__).parent.parent / "benchmarks" / "targets.toml"


class Clock:
    """A clock that only moves when a contender says so."""

    def __init__(self):
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, seconds):
        """A callable that takes `seconds` (a number, or a function of the clock) of this clock's time."""

        def call():
            self.calls.append(name)
            self.now += seconds(self) if callable(seconds) else seconds

        return call


def a_machine(**changes) -> machine.Machine:
    return dataclasses.replace(
        machine.Machine(
            cpu="Test CPU",
            cores=2,
            threads=2,
            memory=8 << 30,
            caches={"L2": 1 << 20, "L3": 32 << 20},
            flags=["avx2", "fma"],
            system="Linux, Python 3.11",
            versions={"lamina": "0.1.0", "torch": "2.13.0"},
            isa="avx2",
            peaks={"float32": {1: 100.0, 2: 200.0}, "bf16": {1: 0.0, 2: 0.0}, "int8": {1: 400.0, 2: 800.0}},
            bandwidth={"L3": {1: 70.0, 2: 90.0}, "DRAM": {1: 20.0, 2: 30.0}},
            scaling=0.95,
        ),
        **changes,
    )


def a_timing(seconds: float, noise: float = 0.01) -> timing.Timing:
    return timing.Timing(seconds * 0.98, seconds, seconds * 1.05, noise, 50)


def a_measurement(
    workload: str = "int8_linear/bert_base/128x768x768",
    *,
    lamina_seconds: float = 1e-3,
    noise: float = 0.01,
    gate: Gate | None = None,
    threads: int = 1,
    scaling: float = 1.0,
    flops: int = 200_000_000,
    dims: dict | None = None,
    **baselines: float,
) -> results.Measurement:
    gate = gate or Gate(True, 1e-7, 1e-6, "relative error 1.0e-07 within 1.0e-06")
    seconds = {"lamina": lamina_seconds, **baselines}
    op, _, shape = workload.split("/")
    return results.Measurement(
        workload=workload,
        op=op,
        shape=shape,
        dims=dims or {"M": 128, "K": 768, "N": 768},
        threads=threads,
        cache="warm",
        isa="avx2",
        precision="float32" if op == "attention" else "int8",
        flops=flops,
        bytes=1_000_000,
        gate=gate,
        times={name: a_timing(value, noise) for name, value in seconds.items()} if gate.ok else {},
        scaling=scaling,
    )


RED = Gate(False, 0.5, 1e-6, "relative error 5.0e-01 exceeds 1.0e-06")


def some_results(*measurements: results.Measurement, here: machine.Machine | None = None, **extra) -> results.Results:
    return results.Results(here or a_machine(), measurements, "2026-01-02T03:04:05+00:00", {"version": "0.1.0"}, extra)


# Timing


def test_contenders_take_turns_in_changing_order():
    clock = Clock()
    contenders = {name: clock.contender(name, 0.05) for name in ("a", "b", "c")}
    timing.measure(contenders, budget=0.0, min_rounds=4, clock=clock)
    # Two untimed calls each come first; calls this long get one sample a turn and none to warm up.
    turns = clock.calls[6:]
    assert turns == [*"abc", *"cba", *"abc", *"cba"]


def test_ratio_survives_a_machine_that_slows_down():
    clock = Clock()

    def slowing(seconds):
        return lambda clock: seconds * (1 + clock.now / 4)

    contenders = {"eager": clock.contender("e", slowing(0.03)), "lamina": clock.contender("l", slowing(0.01))}
    found = timing.measure(contenders, budget=5.0, max_rounds=60, clock=clock)
    assert found["eager"].q80 > 1.2 * found["eager"].q20, (
        "the machine of this test must slow down for it to say anything"
    )
    assert timing.speedup(found["eager"], found["lamina"]) == pytest.approx(3.0, rel=0.03)


def test_first_call_of_a_turn_is_not_timed():
    clock = Clock()

    def cold_after_other(name, seconds):
        return clock.contender(name, lambda clock: seconds * (10 if clock.calls[-2:-1] != [name] else 1))

    contenders = {"a": cold_after_other("a", 1e-3), "b": cold_after_other("b", 2e-3)}
    found = timing.measure(contenders, budget=1.0, clock=clock)
    assert found["a"].q80 == pytest.approx(1e-3)
    assert found["b"].q80 == pytest.approx(2e-3)


def test_data_that_takes_several_calls_to_be_cached_is_warm_when_timed():
    clock = Clock()

    def warming_up(clock):
        last = next((i for i, name in enumerate(reversed(clock.calls[:-1])) if name != "a"), 99)
        return 1e-3 if last < 5 else 4e-4

    found = timing.measure({"a": clock.contender("a", warming_up), "b": clock.contender("b", 1e-3)}, clock=clock)
    assert found["a"].q80 == pytest.approx(4e-4)


def test_cold_calls_are_flushed_outside_the_time():
    clock = Clock()
    flushed = []

    def flush():
        flushed.append(len(clock.calls))
        clock.now += 1.0

    found = timing.measure({"a": clock.contender("a", 1e-3)}, budget=0.0, min_rounds=5, flush=flush, clock=clock)
    assert found["a"].count == 5
    assert found["a"].q80 == pytest.approx(1e-3)
    assert flushed == [2, 3, 4, 5, 6], "every timed call is preceded by one flush"


def test_short_calls_are_timed_in_groups():
    clock = Clock()
    found = timing.measure({"a": clock.contender("a", 1e-6)}, budget=0.0, min_rounds=5, clock=clock)
    assert found["a"].q50 == pytest.approx(1e-6)
    assert len(clock.calls) >= found["a"].count * timing.SHORTEST_SAMPLE / 1e-6


def test_budget_and_settling_end_the_rounds():
    slow = Clock()
    assert timing.measure({"a": slow.contender("a", 0.1)}, budget=1.0, clock=slow)["a"].count <= 11
    steady = Clock()
    assert timing.measure({"a": steady.contender("a", 0.1)}, budget=1e9, clock=steady)["a"].count == 10


def test_quantiles_and_noise():
    found = timing.Timing.from_rounds([[1.0], [2.0], [3.0], [4.0], [5.0]])
    assert (found.q20, found.q50, found.q80, found.count) == (pytest.approx(1.8), 3.0, pytest.approx(4.2), 5)
    assert found.noise == pytest.approx((5 - 1) / 2 / 3), "five rounds: the interval is their whole range"
    assert timing.Timing.from_rounds([[2.0]] * 5).noise == 0
    with pytest.raises(ValueError, match="at least one sample"):
        timing.Timing.from_rounds([])


def test_threads_are_put_back_after_an_error():
    before = torch.get_num_threads()

    def fail():
        with timing.threads(1):
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before


# Running a workload


def a_workload(answer: float, calls: list, **changes) -> Workload:
    def prepare(inputs):
        def call():
            calls.append("lamina")
            return torch.tensor(answer)

        return call

    def prepare_eager(inputs):
        return lambda: calls.append("eager")

    return dataclasses.replace(
        Workload(
            id="made_up/test/1",
            op="made_up",
            shape="1",
            dims={},
            make_inputs=lambda: None,
            run=prepare,
            baselines={"eager": prepare_eager},
            check=lambda inputs, output: Gate.judge(abs(float(output) - 1.0), 1e-6, "error"),
            flops=lambda inputs: 1000,
            bytes=lambda inputs: 100,
            precision=lambda inputs: "float32",
        ),
        **changes,
    )


def rendered(table) -> str:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115  rich wants an open file
    console.print(table)
    return console.export_text()


def test_a_red_gate_has_no_number():
    calls = []
    (found,) = runner.run(a_workload(1.5, calls), None, [1], budget=0.0)
    assert not found.gate.ok
    assert found.times == {}
    assert calls == ["lamina"], "nothing may be timed once the answer is wrong"
    assert found.speedup("eager") is None
    assert found.peak_fraction(a_machine()) is None
    shown = rendered(text.bench_table([found], a_machine(), "made up"))
    assert "WRONG: error 5.0e-01 exceeds 1.0e-06" in shown
    assert not re.search(r"\d (s|ms|us)\b|FLOP/s|GB/s|\dx", shown)


@pytest.mark.parametrize("where", ["make_inputs", "run", "check"])
def test_a_candidate_that_raises_is_red_and_stops_nobody(where):
    def broken(*args):
        raise RuntimeError("kernel\nexploded")

    bad = a_workload(1.0, [], id="made_up/test/bad", **{where: broken})
    found, skipped = runner.run_all([bad, a_workload(1.0, [])], [1], budget=0.0)
    assert [item.gate.ok for item in found] == [False, True]
    assert found[0].gate.message == "RuntimeError: kernel exploded"
    assert not found[0].times
    assert not skipped


def test_a_noisy_run_is_repeated_once_and_the_steadier_one_kept(monkeypatch):
    noises = iter([0.5, 0.02])
    monkeypatch.setattr(runner, "measure", lambda *args, **kwargs: {"lamina": a_timing(1e-3, next(noises))})
    (found,) = runner.run(a_workload(1.0, []), None, [1])
    assert found.candidate.noise == 0.02
    assert next(noises, None) is None


class Cores:
    """A machine whose second core is gone for the first `gone` looks."""

    def __init__(self, monkeypatch, gone: int):
        self.gone = gone
        self.looks = 0
        monkeypatch.setattr(runner._C, "probe_peak", self.probe)
        monkeypatch.setattr(runner, "WAIT_SECONDS", 0.0)

    def probe(self, kind: str, threads: int, seconds: float) -> float:
        if threads == 1:
            return 100.0
        self.looks += 1
        return 100.0 if self.looks <= self.gone else 190.0


def test_a_core_that_comes_back_is_waited_for(monkeypatch):
    cores = Cores(monkeypatch, gone=1)
    seconds = iter([2e-3, 1e-3])

    def measure(contenders, between, **kwargs):
        between()
        return {"lamina": a_timing(next(seconds))}

    monkeypatch.setattr(runner, "measure", measure)
    (found,) = runner.run(a_workload(1.0, []), None, [2])
    assert found.scaling == pytest.approx(0.95)
    assert found.candidate.q50 == 1e-3
    assert cores.looks == 3, "one look at each measurement, and one while waiting"


def test_a_core_that_stays_away_marks_the_measurement(monkeypatch):
    cores = Cores(monkeypatch, gone=1000)
    calls = []
    (found,) = runner.run(a_workload(1.0, calls), None, [2], budget=0.0)
    assert found.scaling == pytest.approx(0.5)
    assert not found.scales
    assert found.times, "the times are kept, and marked"
    assert "2!" in rendered(text.bench_table([found], a_machine(), "made up"))
    spent = cores.looks
    runner.Patience(0.0).wait(2)
    assert cores.looks == spent + 1, "no patience is one look and no waiting"
    (one,) = runner.run(a_workload(1.0, calls), None, [1], budget=0.0)
    assert one.scales, "one thread has nothing to scale"


def test_numerics_are_never_retried(monkeypatch):
    Cores(monkeypatch, gone=1000)
    calls = []
    (found,) = runner.run(a_workload(1.5, calls), None, [2], budget=0.0)
    assert not found.gate.ok
    assert calls == ["lamina"]


def test_another_call_of_laminas_own_is_timed_beside_it():
    calls = []
    workload = a_workload(1.0, calls, variants={"plain": lambda inputs: lambda: calls.append("plain")})
    (found,) = runner.run(workload, None, [1], budget=0.0)
    assert set(found.times) == {"lamina", "lamina plain", "eager"}
    assert found.rivals == ["eager"]
    assert "plain" in calls


def test_progress_says_what_is_being_prepared():
    told = []
    runner.run_all([a_workload(1.0, [])], [1], budget=0.0, progress=lambda what, done, total: told.append(what))
    assert told == ["made_up/test/1: inputs", "made_up/test/1: preparing eager", "made_up/test/1: timing on 1 thread"]


def test_the_memory_of_a_call_is_what_it_needs_at_once():
    size = 64 << 20

    def one():
        return torch.ones(size // 4)

    def one_after_the_other():
        one()
        return one()

    def both():
        return one() + one()  # and the sum

    single, turns, three = (peak_bytes(call) for call in (one, one_after_the_other, both))
    assert single == pytest.approx(size, rel=0.1)
    assert turns == pytest.approx(size, rel=0.1)
    assert three == pytest.approx(3 * size, rel=0.1)


def test_a_call_that_fails_while_its_memory_is_taken_fails_here():
    calls = []

    def second_time_lost():
        calls.append(torch.is_inference_mode_enabled())
        if len(calls) > 1:
            raise RuntimeError("lost")

    with torch.inference_mode(), pytest.raises(RuntimeError, match="lost"):
        peak_bytes(second_time_lost)
    assert calls == [True, True], "the mode of the thread that asks is that of the call"


def test_memory_is_asked_for_once_the_answer_is_right():
    asked = {"lamina": 1, "eager": 2}
    (found,) = runner.run(a_workload(1.0, [], memory=lambda inputs: asked), None, [1], budget=0.0)
    assert found.memory == asked
    assert found.memory_share("eager") == 0.5
    assert found.memory_share("ort") is None

    def never(inputs):
        raise AssertionError("the answer is wrong")

    (red,) = runner.run(a_workload(1.5, [], memory=never), None, [1], budget=0.0)
    assert "exceeds" in red.gate.message


def test_nan_is_red():
    assert not Gate.judge(float("nan"), 1.0, "error").ok


def test_a_failing_peer_is_reported_by_name():
    class Broken:
        name = "broken"
        quantizes = False

        def available(self):
            return None

        def prepare(self, module, example_inputs):
            raise TypeError("no such operator")

    class Absent(Broken):
        name = "absent"

        def available(self):
            return "absent is not installed"

    class Quantizer(Broken):
        name = "has no weights to work on"
        quantizes = True

    module = torch.nn.Identity()
    workload = a_workload(1.0, [], module=lambda inputs: (module, (torch.ones(1),)))
    (found,) = runner.run(workload, None, [1], peers=[Broken(), Absent(), Quantizer()], budget=0.0)
    assert found.failures == {
        "broken": "TypeError: no such operator",
        "absent": "absent is not installed",
    }
    assert set(found.times) == {"lamina", "eager"}
    assert "no time" in rendered(text.bench_table([found], a_machine(), "made up"))


@pytest.mark.parametrize("peer", PEERS.values(), ids=list(PEERS))
def test_every_peer_computes_the_same_model_or_says_why_not(peer):
    """torch.compile is left out: it takes a minute of compiling to show that it is itself."""
    if peer.name in ("torch.compile", "torchao int8"):
        assert peer.available() is None or "not installed" in peer.available()
        return
    if peer.available() is not None:
        assert "not installed (pip install lamina[peers])" in peer.available()
        return
    head = torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), *head).eval()
    x = torch.randn(4, 3, 6, 6)
    output = peer.prepare(model, (x,))()  # a tensor, ONNX Runtime's list or OpenVINO's mapping, of which 0 is a key too
    first = output if isinstance(output, torch.Tensor) else torch.as_tensor(output[0])
    with torch.inference_mode():
        error = workloads.relative_error(first, model(x))
    assert error < (0.1 if peer.quantizes else 1e-5)


def test_onnx_runtime_that_is_not_installed_leaves_its_targets_unjudged(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    module = torch.nn.Linear(4, 4)
    baselines = {"ort int8": lambda inputs: peers.convert(PEERS["ort int8"], module, (torch.ones(1, 4),))}
    (found,) = runner.run(a_workload(1.0, [], baselines=baselines), None, [1], budget=0.0)
    assert found.failures == {"ort int8": "onnxruntime is not installed (pip install lamina[peers])"}
    target = a_target(workloads="made_up/*", metric="speedup", baseline="ort int8", at_least={})
    (verdict,) = judged(target, found)
    assert verdict.status == "not judged"
    assert verdict.reason.endswith("onnxruntime is not installed (pip install lamina[peers])")


def test_onnx_runtime_exports_a_module_once(monkeypatch):
    peer = PEERS["ort int8"]
    if peer.available() is not None:
        assert "not installed" in peer.available()
        return
    exported, held = [], len(peers._exported)
    export = peers._export_onnx
    monkeypatch.setattr(peers, "_export_onnx", lambda *args: exported.append(args) or export(*args))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
    for batch, times in ((2, 1), (2, 1), (3, 2)):
        peer.prepare(model, (torch.ones(batch, 8),))()
        assert len(exported) == times, "once for each shape of the inputs"
    del model, exported[:]
    gc.collect()
    assert len(peers._exported) == held, "what was exported goes with the module"


def test_both_doors_of_a_model_are_timed_and_must_answer_right(monkeypatch):
    from lamina.bench.suite import model as suite

    monkeypatch.setattr(suite, "TWO_DOORS", ("vit_mnist",))
    model, example_inputs = suite.build("vit_mnist", 1)
    workload = suite.workload("vit_mnist", 1, lambda: None)
    assert set(workload.variants) == {"swapped", "compiled"}
    inputs = suite.Inputs(model, example_inputs, None, 0)
    with torch.inference_mode():
        for prepare in workload.variants.values():
            assert suite.check(inputs, prepare(inputs)()).ok
        monkeypatch.setattr(suite, "MAX_MODEL_ERROR", -1.0)  # which no answer keeps
        for prepare in workload.variants.values():
            with pytest.raises(ValueError, match=r"relative output error .* exceeds"):
                prepare(inputs)


def test_a_workload_without_its_packages_is_skipped_with_the_reason():
    found, skipped = runner.run_all([a_workload(1.0, [], requires=("no_such_package",))], [1])
    assert not found
    assert skipped == {"made_up/test/1": "needs no_such_package (pip install lamina[models])"}


# The registry


def test_every_shape_file_parses_into_unique_workloads():
    found = workloads.registry()
    assert {workload.op for workload in found.values()} >= {"int8_linear", "attention", "model"}
    for name, workload in found.items():
        assert name == workload.id
        assert re.fullmatch(rf"{workload.op}/[a-z0-9_]+/[A-Za-z0-9_-]+", name), name
        assert workload.baselines


def test_shape_files_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(workloads.resources, "files", lambda package: tmp_path)
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "x.txt").write_text("# comment\na 1 2\n\nb 3 # too few\n")
    with pytest.raises(ValueError, match=r"shapes/x.txt line 4 has 2 columns, expected 3"):
        list(workloads.read_shapes("x", columns=3))


@pytest.mark.parametrize("workload", workloads.select(tags=("op",)), ids=lambda workload: workload.id)
def test_op_inputs_build_and_small_answers_are_right(workload):
    inputs = workload.make_inputs()
    assert workload.flops(inputs) > 0 or workload.op in ("concatenate", "copy", "embedding")
    assert workload.bytes(inputs) > 0
    if workload.flops(inputs) < 1e8:
        with torch.inference_mode():
            gate = workload.check(inputs, workload.run(inputs)())
        assert gate.ok, gate.message


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_plans_of_small_models_answer_right_and_so_do_their_layers(name):
    from lamina.bench.suite import plan as plans

    workload = workloads.registry()[f"plan/{name}/b1"]
    assert set(workload.variants) == {"swapped"}
    inputs = workload.make_inputs()
    with torch.inference_mode():
        for prepare in (workload.run, *workload.variants.values()):
            gate = workload.check(inputs, prepare(inputs)())
            assert gate.ok, gate.message
        wrong = workload.run(inputs)() * 1.5
        assert not workload.check(inputs, wrong).ok
    assert workload.flops(inputs) > 0
    assert plans._memory(inputs)["lamina"] >= inputs.plan.arena_bytes
    again = plans.workload(name, 1, lambda: inputs, peer=False)
    assert (again.id, set(again.baselines)) == (workload.id, {"eager"})


def test_plans_are_held_against_the_promised_peers():
    found = {name: list(w.baselines) for name, w in workloads.registry().items() if w.op == "plan"}
    assert found["plan/lenet/b64"] == ["eager", "ort"]
    assert found["plan/bert_base/b1"] == ["eager", "ort int8"]
    assert found["plan/resnet50/b8-int8"] == ["eager", "openvino int8"]
    assert found["plan/bert_base_pruned/b1-4x4-90"] == ["eager"]
    weighed = [name for name, w in workloads.registry().items() if w.memory is not None]
    assert weighed == ["plan/resnet50/b8-int8"]


def test_a_model_without_a_plan_says_why():
    from lamina.bench.suite import model as suite
    from lamina.bench.suite import plan as plans

    class Branching(torch.nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    model, x = Branching().eval(), torch.ones(3)
    accelerated = lamina.Accelerated(model, lamina.accelerate(torch.nn.Linear(3, 3), (x,), compile=False).report)
    workload = plans.workload("branching", 1, lambda: plans.planned(suite.Inputs(model, (x,), accelerated, 1)))
    (found,), _ = runner.run_all([workload], [1], budget=0.0)
    assert not found.gate.ok
    assert re.match("(CaptureError|PlanError): ", found.gate.message)


@pytest.mark.parametrize(
    ("name", "config"),
    [("lenet", "auto"), ("lenet", "int8"), ("lenet", "float"), ("lstm", "auto"), ("vit_mnist", "auto")],
)
def test_small_models_answer_right(name, config):
    from lamina.bench.suite import model as suite

    workload = suite.workload(name, 1, lambda: suite.prepare(name, *suite.build(name, 1), config=config), config=config)
    assert workload.id == f"model/{name}/b1" + ("" if config == "auto" else f"-{config}")
    inputs = workload.make_inputs()
    with torch.inference_mode():
        gate = workload.check(inputs, workload.run(inputs)())
    assert gate.ok, gate.message
    assert workload.flops(inputs) > 0


def test_a_wrong_answer_is_caught_by_every_op_gate():
    for prefix in ("int8_linear/minilm/1x384x384", "attention/minilm/1x12x32x32-float32"):
        workload = workloads.registry()[prefix]
        inputs = workload.make_inputs()
        with torch.inference_mode():
            answer = workload.run(inputs)()
        assert not workload.check(inputs, answer * 1.01).ok


def test_recurrent_attention_and_fused_layers_are_counted():
    from lamina.bench.modules import count_flops

    lstm = torch.nn.LSTM(28, 128, num_layers=2, batch_first=True)
    per_step = 2 * 4 * 128 * ((28 + 128) + (128 + 128))
    assert count_flops(lstm, (torch.randn(4, 10, 28),)) == 4 * 10 * per_step
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    products = 2 * 2 * 16 * (4 * 64 * 64 + 2 * 64 * 128)
    assert count_flops(layer, (torch.randn(2, 16, 64),)) == products + 2 * 2 * 2 * 16 * 16 * 64


# Targets

GOOD = 'id = "t"\nworkloads = "int8_linear/*"\nmetric = "peak"\nminimum = 0.5\nthreads = [1, "all"]\nwhy = "because"\n'


def test_the_repository_targets_parse_and_each_names_a_workload():
    promised = targets.parse(TARGETS)
    for target in promised:
        assert any(target.selects(workload.id, workload.dims) for workload in workloads.registry().values()), target.id


@pytest.mark.parametrize(
    ("text_of_file", "message"),
    [
        ("[[target]", "is not TOML"),
        ("x = 1\n", r"has no \[\[target\]\] entry"),
        ("[[target]]\n" + GOOD.replace('why = "because"\n', ""), "'t' .* lacks why"),
        ("[[target]]\n" + GOOD + "speed = 3\n", "has the unknown key speed"),
        (
            "[[target]]\n" + GOOD.replace('"peak"', '"joy"'),
            "metric 'joy'; the metrics are peak, bandwidth, speedup, overhead, memory",
        ),
        ("[[target]]\n" + GOOD.replace('"peak"', '"speedup"'), "speedup, overhead, memory need a baseline"),
        ("[[target]]\n" + GOOD.replace('"peak"', '"overhead"') + 'baseline = "eager"\n', "'t' .* lacks maximum"),
        ("[[target]]\n" + GOOD.replace('"peak"', '"memory"') + 'baseline = "eager"\n', "'t' .* lacks maximum"),
        ("[[target]]\n" + GOOD + "maximum = 0.9\n", "overhead and memory take a maximum, the others a minimum"),
        ("[[target]]\n" + GOOD + 'at_most = { M = "few" }\n', "at_most .* which is not a table of whole numbers"),
        ("[[target]]\n" + GOOD.replace("0.5", '"half"'), "minimum 'half', which is not a positive number"),
        ("[[target]]\n" + GOOD.replace("0.5", "nan"), "which is not a positive number"),
        ("[[target]]\n" + GOOD.replace('[1, "all"]', "[0]"), "which is not a list of counts"),
        ("[[target]]\n" + GOOD + "[[target]]\n" + GOOD, "two targets called t"),
    ],
)
def test_bad_targets_files_are_one_sentence(tmp_path, text_of_file, message):
    path = tmp_path / "targets.toml"
    path.write_text(text_of_file)
    with pytest.raises(ValueError, match=message):
        targets.parse(path)


def test_missing_targets_file(tmp_path):
    with pytest.raises(ValueError, match="can't be read: No such file"):
        targets.parse(tmp_path / "none.toml")


def a_target(**changes) -> targets.Target:
    good = targets.Target("t", "int8_linear/*", "peak", [1], "because", minimum=0.5, at_least={"M": 128})
    return dataclasses.replace(good, **changes)


def judged(target: targets.Target, *measurements: results.Measurement, here: machine.Machine | None = None):
    return targets.judge([target], measurements, here or a_machine())


def test_a_target_is_as_good_as_its_worst_workload():
    good = a_measurement("int8_linear/a/1", lamina_seconds=1e-3, flops=300_000_000)  # 300 of 400 GOP/s
    bad = a_measurement("int8_linear/b/1", lamina_seconds=1e-3, flops=120_000_000)  # 120 of 400 GOP/s
    small = a_measurement("int8_linear/c/1", lamina_seconds=1.0, dims={"M": 1})
    (verdict,) = judged(a_target(), good, small)
    assert (verdict.status, verdict.total) == ("met", 1)
    assert verdict.value == pytest.approx(0.75)
    (verdict,) = judged(a_target(), good, bad, small)
    assert (verdict.status, verdict.met, verdict.total) == ("missed", 1, 2)
    assert verdict.workload == "int8_linear/b/1"
    assert verdict.value == pytest.approx(0.3)


def test_speedup_targets_use_their_baseline():
    target = a_target(metric="speedup", baseline="eager", minimum=2.0, at_least={})
    (verdict,) = judged(target, a_measurement(eager=2.5e-3, other=1e-4))
    assert verdict.status == "met"
    assert verdict.value == pytest.approx(2.5)
    (verdict,) = judged(target, a_measurement(other=1e-4))
    assert verdict.status == "not judged"
    assert "eager was not timed" in verdict.reason


def test_a_busy_machine_is_not_judged():
    (verdict,) = judged(a_target(), a_measurement(noise=0.5))
    assert verdict.status == "not judged"
    assert "the machine was busy: ±71%" in verdict.reason
    # A miss elsewhere that is beyond doubt counts all the same.
    slow = a_measurement("int8_linear/slow/1", flops=1_000_000)
    (verdict,) = judged(a_target(), a_measurement(noise=0.5), slow)
    assert (verdict.status, verdict.workload, verdict.in_doubt) == ("missed", "int8_linear/slow/1", 1)


def test_a_workload_whose_second_core_was_busy_is_not_judged():
    target = a_target(threads=[1, "all"], minimum=0.2)
    one, two = a_measurement(threads=1), a_measurement(threads=2, scaling=0.5)
    first, second = judged(target, one, two)
    assert (first.status, second.status) == ("met", "not judged")
    assert second.reason == "the second core was busy at int8_linear/bert_base/128x768x768 (1 of 1 in doubt)"
    assert a_measurement(threads=4, scaling=0.5).doubt("lamina").startswith("not all 4 cores were free")


def test_one_workload_in_doubt_among_many_does_not_hide_the_others():
    many = [a_measurement(f"int8_linear/a/{i}", threads=2, scaling=0.5 if i == 0 else 1.0) for i in range(10)]
    (verdict,) = judged(a_target(threads=["all"], minimum=0.2), *many)
    assert (verdict.status, verdict.met, verdict.in_doubt) == ("met", 9, 1)
    assert "9 of 10 reach it, 1 in doubt" in rendered(text.target_table([verdict]))
    (verdict,) = judged(a_target(threads=["all"], minimum=0.2), *many[:5])
    assert verdict.status == "not judged", "one of five is too many"


def test_overhead_is_judged_by_the_most_it_may_be():
    target = a_target(metric="overhead", minimum=None, maximum=0.06, baseline="lamina plain")
    cheap, dear = (
        a_measurement(f"int8_linear/a/{name}", lamina_seconds=seconds, **{"lamina plain": 1e-3})
        for name, seconds in (("cheap", 1.02e-3), ("dear", 1.2e-3))
    )
    (verdict,) = judged(target, cheap)
    assert verdict.status == "met"
    assert verdict.value == pytest.approx(0.02)
    (verdict,) = judged(target, cheap, dear)
    assert (verdict.status, verdict.workload, verdict.met) == ("missed", "int8_linear/a/dear", 1)
    assert (text.metric(verdict, verdict.value), text.bound(verdict)) == ("+20% time", "at most +6% time")
    assert not cheap.rivals, "another call of lamina's own is nobody to win or lose against"


def test_memory_is_judged_as_a_share_of_the_baselines():
    target = a_target(metric="memory", minimum=None, maximum=0.6, baseline="eager")
    # Not in doubt, however busy the machine was.
    small, large = (
        dataclasses.replace(
            a_measurement(f"int8_linear/a/{own}", noise=0.9), memory={"lamina": own * 1_000_000, "eager": 100_000_000}
        )
        for own in (40, 70)
    )
    (verdict,) = judged(target, small)
    assert (verdict.status, verdict.value) == ("met", pytest.approx(0.4))
    assert (text.metric(verdict, verdict.value), text.bound(verdict)) == (
        "40% of eager's memory",
        "at most 60% of eager's memory",
    )
    (verdict,) = judged(target, small, large)
    assert (verdict.status, verdict.workload) == ("missed", "int8_linear/a/70")
    assert "70.0 MB, eager 100 MB" in rendered(text.bench_table([large], a_machine(), "made up"))
    (verdict,) = judged(target, a_measurement())
    assert verdict.status == "not judged"
    assert verdict.reason.startswith("no memory of eager was measured at")


def test_bandwidth_is_that_of_the_level_the_data_sits_in():
    here = a_machine()
    assert [here.level(size, 1) for size in (500_000, 900_000, 20 << 20, 30 << 20)] == ["L3", "L3", "L3", "DRAM"]
    private = a_machine(bandwidth={"L2": {1: 100.0, 2: 200.0}} | dict(here.bandwidth))
    assert [private.level(900_000, threads) for threads in (1, 2)] == ["L3", "L2"]
    # 1 MB in 20 us is 50 GB/s: of 70 from L3, but of 20 from memory when 64 MB of weights take turns.
    warm = a_measurement(lamina_seconds=20e-6)
    turns, cold = dataclasses.replace(warm, resident=64 << 20), dataclasses.replace(warm, cache="cold")
    assert warm.bandwidth_fraction(here) == pytest.approx(50 / 70)
    assert turns.bandwidth_fraction(here) == cold.bandwidth_fraction(here) == pytest.approx(50 / 20)
    target = a_target(metric="bandwidth", minimum=0.7)
    assert judged(target, warm)[0].status == "met"
    assert text.reads(warm, here) == "71% L3"


def test_targets_select_by_sizes_and_ids():
    few = a_target(at_least={}, at_most={"M": 4}, except_for="*bfloat16*")
    assert few.selects("int8_linear/a/1x2x3", {"M": 1})
    assert not few.selects("int8_linear/a/8x2x3", {"M": 8})
    assert not few.selects("int8_linear/a/1x2x3-bfloat16", {"M": 1})
    assert not few.selects("int8_linear/a/b1", {"B": 1}), "a workload without that size is not meant"


def test_a_peer_that_is_not_installed_is_why_a_target_is_not_judged():
    target = a_target(metric="speedup", baseline="ort int8", minimum=1.2)
    absent = dataclasses.replace(a_measurement(eager=2e-3), failures={"ort int8": "onnxruntime is not installed"})
    (verdict,) = judged(target, absent)
    assert verdict.status == "not judged"
    assert "onnxruntime is not installed" in verdict.reason


def test_wrong_answers_and_missing_runs_never_meet_a_target():
    (verdict,) = judged(a_target(), a_measurement(gate=RED))
    assert verdict.status == "missed"
    assert "wrong answer" in verdict.reason
    (verdict,) = judged(a_target())
    assert verdict.status == "not judged"
    (verdict,) = judged(
        a_target(), a_measurement(), here=a_machine(peaks=a_machine().peaks | {"int8": {1: 0.0, 2: 0.0}})
    )
    assert verdict.status == "not judged", "a CPU without the instruction has no peak to judge by"


# Files and comparison


def test_results_survive_the_file(tmp_path):
    weighed = dataclasses.replace(a_measurement(eager=2e-3), memory={"lamina": 1, "eager": 2})
    before = some_results(weighed, a_measurement("attention/a/b", gate=RED), note="kept")
    before.save(tmp_path / "deep" / "results.json")
    after = results.load(tmp_path / "deep" / "results.json")
    assert after.machine == before.machine
    assert list(after.measurements) == list(before.measurements)
    assert after.extra == {"note": "kept"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "is not complete JSON"),
        (lambda content: '{"schema": "other"}', "is not a lamina results file"),
        (lambda content: "[1, 2]", "is not a lamina results file"),
        (lambda content: content.replace('"version": 1', '"version": 99', 1), "has results version 99"),
        (lambda content: content.replace('"q50"', '"q51"'), "is a damaged lamina results file"),
        (lambda content: content.replace('"machine"', '"engine"'), "is a damaged lamina results file"),
        (lambda content: "\x00\xff", "is not complete JSON"),
    ],
)
def test_foreign_and_truncated_files_are_refused(tmp_path, damage, message):
    path = tmp_path / "results.json"
    some_results(a_measurement()).save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(lamina.FormatError, match=message):
        results.load(path)


def changes_of(old: results.Measurement | None, new: results.Measurement | None) -> compare.Change:
    before, after = (some_results(*([item] if item else [])) for item in (old, new))
    (change,) = compare.compare(before, after)
    return change


def test_a_regression_is_found_and_noise_is_not():
    base = a_measurement(lamina_seconds=1e-3, eager=4e-3)
    slower = changes_of(base, a_measurement(lamina_seconds=1.3e-3, eager=4e-3))
    assert slower.verdict == "slower"
    assert slower.adjusted == pytest.approx(1 / 1.3)
    assert slower.fails(0.9)
    assert not slower.fails(0.7)
    assert changes_of(base, a_measurement(lamina_seconds=1.02e-3, eager=4e-3)).verdict == "same"
    assert changes_of(base, a_measurement(lamina_seconds=0.7e-3, eager=4e-3)).verdict == "faster"
    noisy = a_measurement(lamina_seconds=1.3e-3, eager=4e-3, noise=0.3)
    assert changes_of(base, noisy).verdict == "same"


def test_a_slower_machine_is_not_a_slower_kernel():
    change = changes_of(a_measurement(lamina_seconds=1e-3, eager=4e-3), a_measurement(lamina_seconds=2e-3, eager=8e-3))
    assert change.ratio == pytest.approx(0.5)
    assert change.drift == pytest.approx(0.5)
    assert change.verdict == "same"


def test_threads_that_do_not_scale_are_not_compared():
    slower = [a_measurement(lamina_seconds=s, eager=4e-3, threads=2, scaling=s * 500) for s in (1e-3, 2e-3)]
    change = changes_of(*slower)
    assert change.verdict == "not judged"
    assert not change.fails(0.9)


def test_a_probe_that_met_a_busy_core_shows_as_not_scaling():
    assert a_machine().scales
    assert not a_machine(peaks={"float32": {1: 100.0, 2: 100.0}}).scales
    quiet, busy = a_machine(), a_machine(peaks={"float32": {1: 100.0, 2: 90.0}}, bandwidth={}, scaling=0.6)
    both = machine.combine(busy, quiet)
    assert both.peaks["float32"] == {1: 100.0, 2: 200.0}
    assert both.scaling == 0.6


def test_broken_answers_fail_and_missing_ones_are_named():
    broke = changes_of(a_measurement(), a_measurement(gate=RED))
    assert broke.verdict == "broke"
    assert broke.fails(0.01)
    assert changes_of(a_measurement(gate=RED), a_measurement()).verdict == "fixed"
    assert changes_of(a_measurement(), None).verdict == "gone"
    assert changes_of(None, a_measurement()).verdict == "added"


# The page

SECTIONS = [
    "glance",
    "speed",
    "floors",
    "quality",
    "roofline",
    "memory",
    "plans",
    "targets",
    "ranking",
    "losses",
    "layers",
    "ops",
    "machine",
    "method",
]


def a_section(name: str, title: str, **changes) -> dict:
    section = {
        "name": name,
        "title": title,
        "what": "a model",
        "unit": "image",
        "main": f"model/{name}/b64",
        "others": [f"model/{name}/b1"],
        "parameters": 12345,
        "quality": {
            "metric": "accuracy",
            "before": 0.98,
            "after": 0.979,
            "torch_int8": 0.97,
            "precisions": {"static int8": 0.9765},
            "ok": True,
            "note": "1,000 test images",
        },
        "decisions": [
            {"fqn": "a", "was": "Linear", "now": "Int8Linear", "reason": "2.00x", "speedup": 2.0, "error": 0.01},
            {"fqn": "b", "was": "LSTM", "now": None, "reason": "no <kernel> yet", "speedup": None, "error": None},
        ],
        "untouched": {"Conv2d": 2},
        "output_error": 0.01,
        "bytes_before": 4_000_000,
        "bytes_after": 1_000_000,
        "accelerate_seconds": 1.5,
        "form": "swapped layers, compiled",
        "forms": [
            {"name": "swapped layers", "speedup": 3.0, "error": 0.01, "seconds": 1.0, "reason": "<layers>"},
            {"name": "swapped layers, compiled", "speedup": 3.5, "error": 0.01, "seconds": 4.0, "reason": "2 x linear"},
        ],
        "training": {"epochs": 3, "seconds": 4.0, "seed": 0},
        "ranking": None,
    }
    return section | changes


def a_step(op: str = "int8_linear", module: str = "layers.0", seconds: float = 1e-6, **changes) -> dict:
    step = {
        "op": op,
        "module": module,
        "what": "[1, 8] -> [1, 4]",
        "seconds": seconds,
        "isa": "avx2",
        "flops": 64,
        "bytes": 80,
        "of_peak": 0.5,
    }
    return step | changes


def some_plans() -> list[dict]:
    lenet = {
        "name": "lenet",
        "title": "LeNet",
        "batch": 1,
        "unit": "image",
        "workload": "plan/lenet/b1",
        "refused": "",
        "threads": 2,
        "seconds": 5e-6,
        "arena_bytes": 23_600,
        "covered": [0.67, 0.75],
        "left": {"aten.cumsum": [1, 0.25, "lamina has no op for it"]},
        "steps": [
            a_step("conv2d", "features.<0>", 2e-6),
            a_step("aten.cumsum", "", 1e-6, isa="", of_peak=0.0),
            a_step("linear", "head", 1e-6, of_peak=0.25),
        ],
    }
    refused = lenet | {"title": "MiniLM", "refused": "MiniLM is not <one> graph", "steps": [], "left": {}}
    return [lenet, refused | {"workload": "plan/minilm/b16", "batch": 16, "unit": "sentence"}]


def a_report(**machine_changes) -> results.Results:
    here = a_machine(**machine_changes)
    measurements = [a_measurement(eager=3e-3, quantize_dynamic=0.5e-3, threads=threads) for threads in (1, 2)] + [
        a_measurement("attention/a/1x2", gate=RED),
        *(a_measurement(f"model/lenet/b{batch}", threads=t, eager=4e-3) for batch in (64, 1) for t in (1, 2)),
        *(a_measurement(f"model/minilm/b{batch}", threads=t, eager=0.5e-3) for batch in (64, 1) for t in (1, 2)),
        a_measurement(
            "plan/lenet/b1", lamina_seconds=5e-6, eager=60e-6, ort=10e-6, **{"lamina swapped": 20e-6}, threads=2
        ),
    ]
    ranking = {
        "sentences": ["A dog barks.", "Snow falls & melts."],
        "topics": ["animals", "weather"],
        "min_cosine": 0.9987,
        "mean_cosine": 0.999,
        "best": 2,
        "same_best": 1,
        "same_order": 0,
        "widest_swap": 0.5,
        "queries": [
            {
                "topic": "weather",
                "query": "Is it cold?",
                "order_before": [1, 0],
                "order_after": [0, 1],
                "scores_before": [0.1, 0.6],
                "scores_after": [0.61, 0.6],
            }
        ],
    }
    verdicts = targets.judge([a_target(), a_target(id="u", minimum=0.9)], measurements, here)
    sections = [a_section("lenet", "LeNet"), a_section("minilm", "MiniLM", ranking=ranking, training=None)]
    return some_results(
        *measurements,
        here=here,
        models=sections,
        plans=some_plans(),
        targets=[dataclasses.asdict(verdict) for verdict in verdicts],
        seconds=12.0,
    )


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    # By way of the file, as a later reader of results.json would make it.
    path = tmp_path_factory.mktemp("page") / "results.json"
    a_report().save(path)
    return page.render(results.load(path))


def test_the_page_has_every_section(html):
    for section in SECTIONS:
        assert f'id="{section}"' in html


def test_the_page_loads_nothing(html):
    assert not re.search(r"https?:|src=|url\((?!#)|@import|<script|<link", html)
    assert html.count("<svg") >= 2
    assert "#01" not in html, "a plot colour was not replaced by its CSS variable"


def test_the_page_shows_wins_losses_and_wrong_answers(html):
    assert "LeNet runs 4.0x as fast as in eager PyTorch" in html
    assert "MiniLM became slower (0.50x)" in html
    assert "Wrong answers, therefore without times:</b>\n<code>attention/a/1x2</code> (relative error" in html
    assert "relative error 5.0e-01 exceeds 1.0e-06" in html
    losses = html[html.index('id="losses"') : html.index('id="layers"')]
    assert "<b>quantize_dynamic</b> in 2 of 2" in losses
    assert "was no. 2" in html, "a sentence that changed its place says where it was"


def section_of(html: str, name: str, following: str) -> str:
    return html[html.index(f'id="{name}"') : html.index(f'id="{following}"')]


def test_the_page_shows_the_answers_in_each_precision(html):
    assert "all in static int8 97.65%" in section_of(html, "glance", "speed")


def test_the_page_holds_models_against_everyone_and_their_floor(html):
    shown = section_of(html, "floors", "quality")
    # 200 million operations at 400 GOP/s take 0.5 ms; lamina takes 1 ms, eager 4.
    assert re.search(r"<b>1.00 ms</b>.*?4.00 ms.*?4.00x.*?500 us.*?<b>50%</b>", shown, re.DOTALL)


def test_the_page_says_which_contender_has_no_time_and_why():
    report = a_report()
    absent = [
        dataclasses.replace(item, failures={"ort int8": "onnxruntime is not installed"}) if item.op == "model" else item
        for item in report.measurements
    ]
    shown = page.render(dataclasses.replace(report, measurements=absent))
    assert section_of(shown, "floors", "quality").count("Not timed: ort int8: onnxruntime is not installed.") == 1


def test_the_page_shows_row_counts_side_by_side():
    rows = [
        a_measurement(
            f"int8_linear/{model}/{m}x768x768", dims={"M": m, "K": 768, "N": 768}, threads=2, eager=4e-3, other=1e-3 * f
        )
        for model, m, f in (("a", 1, 3.0), ("a", 16, 2.0), ("b", 197, 1.5), ("a", 128, 0.5))
    ]
    shown = section_of(page.render(some_results(*rows, seconds=1.0)), "ops", "machine")
    assert "times as fast as other" in shown, "the strongest rival"
    grid = re.sub(r"<[^>]*>|\s+", " ", shown[shown.index('class="grid"') : shown.index("<details>")])
    assert "1 row 16 rows 128 rows 197 rows" in re.sub(" +", " ", grid)
    assert re.search(r"768x768 +a and b +3.00x .*2.00x .*0.50x .*1.50x", grid)


def test_the_page_says_how_the_whole_model_runs(html):
    layers = section_of(html, "layers", "ops")
    assert "&lt;layers&gt;" in layers
    assert re.search(r"swapped layers, compiled</b>.*?3\.50x.*?2 x linear", layers, re.DOTALL)


def test_what_only_moves_values_has_no_rate():
    moved = a_measurement("copy/a/b", flops=0, eager=2e-3)
    assert moved.rate() is None
    assert moved.peak_fraction(a_machine()) is None
    shown = page.render(some_results(moved, a_measurement(), seconds=1.0))
    assert "NaN" not in shown
    assert "GFLOP/s" in section_of(shown, "ops", "machine")


def test_the_page_shows_plans(html):
    shown = section_of(html, "plans", "targets")
    row = re.sub(r"(<[^>]*>|\s|&ensp;)+", " ", shown[shown.index("<tbody>") : shown.index("</tbody>")])
    assert "LeNet 1 image 5.00 us 60.0 us 12.0x 20.0 us 4.00x 10.0 us 2.00x ort 3 67% of steps 75% of time" in row
    assert "MiniLM 16 sentences MiniLM is not &lt;one&gt; graph" in row
    assert "leaves to PyTorch: 1 × <code>aten.cumsum</code> (25.0% of the time; lamina has no op for it)." in shown
    assert "features.&lt;0&gt;" in shown
    assert '<details class="plan" open>' in shown
    assert "plan/lenet" not in section_of(html, "ops", "machine"), "a plan is no single op"
    without = a_report()
    without.extra.pop("plans")
    assert 'id="plans"' not in page.render(without), "results of earlier runs have none"


def widths(svg: str) -> list[float]:
    return [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"[^>]*opacity', svg)]


def test_a_timeline_is_to_scale():
    steps = [a_step(module="a", seconds=3e-6), a_step("attention", "b", 1e-6), a_step("copy", "b", 2e-6)]
    svg = timeline.draw(steps)
    found = widths(svg)
    assert len(found) == 6, "each step once in the strip and once in its row"
    # Between neighbours is a gap of one unit.
    strip, rows = [width + 1 for width in found[:3]], [width + 1 for width in found[3:]]
    room = timeline.WIDTH - timeline.LABELS - timeline.TOTALS
    assert sum(strip) == pytest.approx(room, abs=0.1)
    assert strip[0] / strip[1] == pytest.approx(3, rel=0.01)
    assert rows == [pytest.approx(width * 2, rel=0.01) for width in strip], "the longest row fills the width"
    filled = re.findall(r'height="([\d.]+)" fill="var\(--accent\)"/>', svg)
    assert [float(height) for height in filled] == [timeline.BAR / 2] * 2, "half of the peak"
    assert ">50%</text>" in svg, "a row's share of the time"
    assert "int8_linear a\n[1, 8] -&gt; [1, 4]\n3.00 us, 50% of peak, avx2" in svg


def test_a_timeline_has_a_row_a_block_where_there_are_many_modules():
    steps = [a_step(module=f"encoder.layers.{i}.{name}") for i in range(10) for name in ("attention", "ffn.0", "ffn.1")]
    rows = timeline._rows([a_step(module="embedding"), a_step(module=""), *steps])
    assert [name for name, _ in rows] == ["embedding", *(f"encoder.layers.{i}" for i in range(10))]
    assert [len(members) for _, members in rows] == [2, *[3] * 10]


def test_the_kinds_of_a_plans_steps():
    ops = ["sparse_int8_linear", "int8_conv2d", "attention", "int8_lstm", "layer_norm", "softmax", "pool2d", "reduce"]
    kinds = [timeline.kind(a_step(op)) for op in ops]
    assert kinds[:4] == ["matrix product", "convolution", "attention", "recurrent layer"]
    assert kinds[4:] == ["norm or softmax", "norm or softmax", timeline.MOVING, timeline.MOVING]
    assert timeline.kind(a_step("aten.linear", isa="")) == timeline.TORCH
    shares = timeline.shares([a_step(seconds=3.0), a_step("copy", seconds=1.0)])
    assert shares == [("matrix product", "accent", 0.75), (timeline.MOVING, "even", 0.25)]
    assert timeline.draw([a_step(seconds=0.0)]), "a clock that did not move draws no bars, but no error"


def test_batches_are_counted_in_words():
    assert page._batch_label("model/a/b1", "text of 128 tokens") == "1 text of 128 tokens"
    assert page._batch_label("model/a/b8", "text of 128 tokens") == "8 texts of 128 tokens"


def test_the_page_escapes_what_it_is_told(html):
    assert "no &lt;kernel&gt; yet" in html
    assert "Snow falls &amp; melts." in html


def test_the_page_leaves_threads_alone_that_do_not_scale():
    report = a_report()
    busy = [dataclasses.replace(item, scaling=0.5) for item in report.measurements]
    shown = page.render(dataclasses.replace(report, measurements=busy))
    assert "During 6 of the measurements on several threads\nthe second core was busy" in shown
    assert "on 1 thread of this CPU" in shown
    one = [
        dataclasses.replace(item, scaling=0.5 if item.workload.endswith("b1") else 1.0) for item in report.measurements
    ]
    shown = page.render(dataclasses.replace(report, measurements=one))
    assert "During 3 of the measurements" in shown
    assert "on 2 threads of this CPU" in shown


def test_the_page_makes_no_headline_of_noise():
    report = a_report()
    noisy = [
        dataclasses.replace(item, times={name: a_timing(t.q50, 0.5) for name, t in item.times.items()})
        for item in report.measurements
    ]
    shown = page.render(dataclasses.replace(report, measurements=noisy))
    assert "No model became faster than in eager PyTorch" in shown
    assert "too busy to tell for LeNet and MiniLM" in shown
    assert "±71%" in shown


def test_results_json_is_strict_json(tmp_path):
    some_results(a_measurement(), oddity=float("nan")).save(tmp_path / "results.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert content["oddity"] is None


def test_the_main_job_from_end_to_end(tmp_path, monkeypatch):
    """With a small encoder in place of BERT-base, one op, and no training; MiniLM is the real one."""
    from lamina.bench.reporting import job
    from lamina.bench.suite import model as suite

    build = suite.build
    monkeypatch.setattr(suite, "build", lambda name, batch: build("bert_tiny", batch))
    monkeypatch.setattr(job, "DIGITS", ())
    monkeypatch.setattr(job.workloads, "select", lambda tags: [workloads.registry()["int8_linear/minilm/1x384x384"]])
    monkeypatch.setattr(job, "MODEL_SECONDS", 0.0)
    monkeypatch.setattr(job, "OP_SECONDS", 0.0)
    monkeypatch.setattr(machine, "PROBE_SECONDS", 1e-3)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # conftest.py puts it back
    job.run("out", targets_file=TARGETS)

    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert written == ["out/index.html", "out/results.json"]
    found = results.load(tmp_path / "out" / "results.json")
    assert all(item.gate.ok for item in found.measurements), [item.gate for item in found.measurements]
    sections = {section["name"]: section for section in found.extra["models"]}
    assert set(sections) == {"minilm", "bert_base"}
    assert sections["minilm"]["quality"]["ok"], sections["minilm"]["quality"]
    plans = {section["name"]: section for section in found.extra["plans"]}
    assert set(plans) == {"minilm", "bert_base"}
    assert plans["bert_base"]["steps"]
    assert all(section["steps"] or section["refused"] for section in plans.values())
    assert sections["minilm"]["bytes_after"] <= sections["minilm"]["bytes_before"]
    assert len(found.extra["targets"]) >= 4
    shown = (tmp_path / "out" / "index.html").read_text()
    assert "MiniLM finds the same best 4 of 24 sentences for each of 6 questions." in shown


# Break-even of sparse kernels


def sparse_measurements(*points: tuple[int, float], threads: int = 1) -> list[results.Measurement]:
    """4x1 at (percent of zeros, milliseconds), against 10 ms."""
    return [
        a_measurement(
            f"sparse_linear/bert_base/128x3072x768-4x1-{zeros}",
            lamina_seconds=milliseconds * 1e-3,
            dims={"M": 128, "K": 3072, "N": 768, "zeros": zeros},
            threads=threads,
            eager=10e-3,
        )
        for zeros, milliseconds in points
    ]


def test_break_even_is_where_the_line_meets_the_dense_layer():
    # 1 ms and 18 ms for all values: 10 ms at half of them.
    (found,) = break_evens(sparse_measurements((80, 4.6), (90, 2.8), (95, 1.9)))
    assert found.work == "sparse_linear/bert_base/128x3072x768-4x1"
    assert found.density == pytest.approx(0.5)
    assert found.points == {80: pytest.approx(10 / 4.6), 90: pytest.approx(10 / 2.8), 95: pytest.approx(10 / 1.9)}


def test_break_even_lies_between_the_densities_around_it():
    """Not on the line through all: dense values need not cost what those beyond the break-even do."""
    (found,) = break_evens(sparse_measurements((10, 30.0), (50, 12.0), (60, 8.0), (90, 2.8)))
    assert found.density == pytest.approx(0.45)


def test_break_even_needs_two_densities_and_has_bounds():
    assert break_evens([*sparse_measurements((90, 2.8)), a_measurement(eager=1e-3)]) == []
    always, never = break_evens(
        [*sparse_measurements((80, 0.2), (90, 0.15)), *sparse_measurements((80, 60), (90, 59), threads=2)]
    )
    assert (always.density, never.density, never.threads) == (1.0, 0.0, 2)


def test_break_even_is_printed():
    found = sparse_measurements((80, 4.6), (90, 2.8))
    table = text.break_even_table(break_evens(found))
    assert [list(column.cells) for column in table.columns][2] == ["50%"]
    html = page.render(some_results(*found, seconds=1.0))
    assert "How many zeros a sparse layer needs" in html
    assert "How many zeros a sparse layer needs" not in page.render(
        some_results(a_measurement(eager=1e-3), seconds=1.0)
    )
