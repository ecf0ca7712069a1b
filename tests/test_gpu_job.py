"""`make gpu` without a GPU: parts and budgets, the page of a synthetic run, and the tuning sweep on false tiles."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from test_bench import TARGETS, a_machine, some_results
from test_bench_gpu import GPU, a_gpu_measurement

from lamina.bench import gpu, targets, tune
from lamina.bench.reporting import gpu as page

ROOT = Path(__file__).parents[1]


@pytest.fixture
def job():
    spec = importlib.util.spec_from_file_location("gpu_job", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_job"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_job"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_parts_that_fail_or_hang_lose_nothing_of_the_others(job, tmp_path, capsys):
    def unavailable(budget):
        raise job.Unavailable("it is not installed")

    def broken(budget):
        raise KeyError("oops")

    parts = [
        job.Part("good", 30.0, lambda budget: [python("print('fine')")]),
        job.Part(
            "bad one", 30.0, lambda budget: [python("import sys; print('what was wrong'); sys.exit(3)"), ["never"]]
        ),
        job.Part("slow", 1.0, lambda budget: [python("import time; time.sleep(60)")]),
        job.Part("slow but partial", 1.0, lambda budget: [python("import time; time.sleep(60)")], partial=True),
        job.Part(
            "slow and wrong",
            3.0,
            lambda budget: [python("import time; print('[gw0] FAILED tests/x', flush=True); time.sleep(60)")],
            partial=True,
            wrong=r"\bFAILED tests/",
        ),
        job.Part("absent", 30.0, unavailable),
        job.Part("broken", 30.0, broken),
        job.Part("good too", 30.0, lambda budget: [python("pass"), python("pass")]),
    ]
    run = job.Job(tmp_path, 200.0)
    run.run(parts)
    found = {outcome.name: (outcome.outcome, outcome.note) for outcome in run.outcomes}
    assert found == {
        "good": ("done", ""),
        "bad one": ("failed", "exit status 3; see logs/bad-one.log"),
        "slow": ("failed", "stopped after 1 s"),
        "slow but partial": ("left out", "stopped after 1 s, with nothing wrong so far"),
        "slow and wrong": ("failed", "stopped after 3 s; [gw0] FAILED tests/x"),
        "absent": ("left out", "it is not installed"),
        "broken": ("failed", "KeyError: 'oops'"),
        "good too": ("done", ""),
    }
    assert "what was wrong" in capsys.readouterr().out
    assert [row["name"] for row in json.loads((tmp_path / "parts" / "parts.json").read_text())] == list(found)


def test_parts_that_are_run_later_are_added(job, tmp_path):
    parts = [job.Part(name, 30.0, lambda budget: [python("pass")]) for name in ("a", "b")]
    job.Job(tmp_path, 100.0).run(parts)
    job.Job(tmp_path, 100.0, goes_on=True).run([*parts[1:], job.Part("c", 30.0, lambda budget: [python("pass")])])
    assert [row["name"] for row in json.loads((tmp_path / "parts" / "parts.json").read_text())] == ["a", "b", "c"]
    job.Job(tmp_path, 100.0).run(parts[:1])
    assert [row["name"] for row in json.loads((tmp_path / "parts" / "parts.json").read_text())] == ["a"]


def test_without_the_build_nothing_else_is_tried(job, tmp_path):
    parts = [
        job.Part("build", 30.0, lambda budget: [python("raise SystemExit(1)")], needed=True),
        job.Part("tests", 30.0, lambda budget: [python("pass")]),
    ]
    run = job.Job(tmp_path, 100.0)
    run.run(parts)
    assert [outcome.outcome for outcome in run.outcomes] == ["failed", "left out"]
    assert run.outcomes[1].note == "without build it cannot run"


def test_a_machine_without_a_gpu_is_told_so(job, tmp_path, monkeypatch):
    def unavailable(code):
        raise job.Unavailable("AssertionError: Torch not compiled with CUDA enabled")

    monkeypatch.setattr(job, "asked", unavailable)
    run = job.Job(tmp_path, 100.0)
    run.run(job.parts_of(tmp_path))
    build, *others = run.outcomes
    assert (build.outcome, build.note) == ("failed", "AssertionError: Torch not compiled with CUDA enabled")
    assert {outcome.outcome for outcome in others} == {"left out"}


def test_what_no_time_is_left_for_is_named(job, tmp_path):
    now = [0.0]

    def takes(seconds):
        def commands(budget):
            now[0] += seconds
            return []

        return commands

    run = job.Job(tmp_path, 100.0, clock=lambda: now[0])
    run.run([job.Part("a", 50.0, takes(40.0)), job.Part("b", 50.0, takes(40.0)), job.Part("c", 50.0, takes(1.0))])
    assert [(o.outcome, o.budget) for o in run.outcomes] == [("done", 50.0), ("done", 45.0), ("left out", 50.0)]
    assert run.outcomes[2].note == "no time was left"


def test_every_workload_of_a_gpu_has_a_part(job):
    from lamina.bench.workloads import registry

    assert set(job.OPS) == {workload.op for workload in registry().values() if workload.device == "cuda"}
    budgets = [part.budget for part in job.parts_of(Path("out"))]
    assert sum(budgets) < 2 * 480, "most of it fits where the build takes what it should"


def test_commands(job, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "asked", lambda code: "9.0" if "capability" in code else "True")
    install, check = job.build(100.0)
    assert "cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real" in install
    assert {"--no-build-isolation", "--no-deps", "--no-index", "--target"} <= set(install)
    assert check[-1] == "import lamina; print(lamina.info())"
    assert [job.architecture(c) for c in ("8.0", "8.6", "9.0", "10.0")] == [
        "80-real",
        "86-real",
        "90a-real",
        "100-real",
    ]
    monkeypatch.setenv("LAMINA_CUTLASS_DIR", "there")
    assert f"cmake.define.LAMINA_CUTLASS_DIR={Path('there').resolve()}" in job.build(100.0)[0]
    assert [command[-1] for command in job.compiled(tmp_path)(20.0)][-1].endswith("bench-compiled-3.json")
    (command,) = job.bench("gpu_model", tmp_path)(20.0)
    assert command[1:4] == ["-m", "lamina.cli", "bench"]
    assert command[command.index("--seconds") + 1] == "15.0"
    assert job.environment()["PYTHONPATH"].startswith(str(job.WORK / "site"))


# -- the page


def a_run():
    attention = a_gpu_measurement(
        "gpu_attention/llama_8k/2x32x8192x128-causal",
        2e-3,
        dims={"S": 8192, "D": 128},
        flops=10**12,
        bytes=10**9,
        baselines={"sdpa flash": 2.2e-3, "sdpa cudnn": 1.9e-3},
        failures={"sdpa efficient": "RuntimeError: No available kernel. <Aborting> execution."},
    )
    decode = a_gpu_measurement("gpu_attention_decode/mha/16x32", 3e-4, bytes=10**9, flops=0, baselines={"sdpa": 5e-4})
    parts = [
        {"name": "build", "outcome": "done", "seconds": 70.2, "budget": 200.0, "note": ""},
        {"name": "tests", "outcome": "failed", "seconds": 30.0, "budget": 110.0, "note": "exit status 1"},
        {"name": "sanitizer", "outcome": "left out", "seconds": 0.0, "budget": 60.0, "note": "no time was left"},
    ]
    tuning = [
        {
            "name": "int8_linear 4096x4096x4096",
            "chosen": "Tile(128, 128)",
            "chosen_seconds": 1e-4,
            "best": "Tile(128, 256)",
            "best_seconds": 8e-5,
            "tried": 20,
            "left_out": 4,
            "gain": 1.25,
        }
    ]
    return some_results(attention, decode, here=a_machine(gpu=GPU), parts=parts, tuning=tuning)


def test_a_run_becomes_a_page(tmp_path, capsys):
    folder = tmp_path / "gpu-report"
    found = a_run()
    found.save(folder / "parts" / "bench-gpu_attention.json")
    for name in ("parts", "tuning"):
        where = folder / "parts" if name == "parts" else folder
        (where / f"{name}.json").write_text(json.dumps(found.extra[name]))
    assert page.main([str(folder), "--targets", str(TARGETS)]) == 0
    html = (folder / "index.html").read_text("utf-8")
    assert "2 of 2 workloads give right answers on one Test GPU" in html
    assert "<b>Not all of it ran.</b> tests: failed; sanitizer: left out." in html
    assert "sdpa efficient has no time: RuntimeError: No available kernel. &lt;Aborting&gt; execution." in html
    assert "Tile(128, 256)" in html
    assert "GPU causal attention of 8192 tokens or more" in html
    told = capsys.readouterr().out
    assert "missed     GPU attention against the best of torch's backends: 0.95x sdpa's best" in told
    assert "met        GPU causal attention of 8192 tokens or more: 62% of peak" in told
    written = json.loads((folder / "results.json").read_text())
    assert written["machine"]["gpu"]["name"] == "Test GPU"
    assert {verdict["status"] for verdict in written["targets"]} == {"met", "missed", "not judged"}


def test_a_page_of_nothing(tmp_path):
    """The build failed: there is a page all the same, which says so."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "parts.json").write_text(json.dumps(a_run().extra["parts"]))
    assert page.main([str(tmp_path), "--targets", str(TARGETS)]) == 0
    html = (tmp_path / "index.html").read_text("utf-8")
    assert "Nothing was measured on this machine." in html
    assert "Not all of it ran" in html


def test_wrong_answers_make_the_job_fail(tmp_path):
    import dataclasses

    from test_bench import RED

    wrong = dataclasses.replace(a_gpu_measurement("gpu_attention/a/b"), gate=RED, times={})
    some_results(wrong, here=a_machine(gpu=GPU)).save(tmp_path / "parts" / "bench-x.json")
    assert page.main([str(tmp_path)]) == 1
    assert "Wrong answers, therefore without times" in (tmp_path / "index.html").read_text("utf-8")


def test_targets_of_the_cpu_are_not_on_the_page(tmp_path):
    promised = [target for target in targets.parse(TARGETS) if target.device == "cuda"]
    a_run().save(tmp_path / "parts" / "bench-x.json")
    found = page.gather(tmp_path, promised)
    assert len(found.extra["targets"]) == len(promised)


# -- the tuning sweep

Tile = namedtuple("Tile", "seconds")


def test_a_sweep_finds_the_fastest_tile(tmp_path, monkeypatch):
    now = []
    tiles = [Tile(3e-3), Tile(5e-3), Tile(1e-3), Tile(0.5e-3), Tile(0.1e-3)]

    def run(tile):
        now.append(tile)
        return (torch.full((3,), 2.0 if tile.seconds == 0.1e-3 else 1.0),)

    monkeypatch.setattr(tune, "SWEEPS", (("_false", ()), ("_missing", ())))
    monkeypatch.setattr(tune, "_false", lambda: tune.Sweep("false kernel", tiles, run), raising=False)

    def missing():
        raise AttributeError("module 'tuning' has no attribute 'candidates'")

    monkeypatch.setattr(tune, "_missing", missing, raising=False)
    monkeypatch.setattr(gpu, "stopwatch", lambda: lambda call, calls: (call(), now[-1].seconds)[1])
    told = []
    # The fourth tile is not compiled in time, the last one gives another result.
    (outcome,) = tune.sweep_all(tmp_path, 2.0, compiled=lambda *_: {0: [1, 2, 4]}, tell=told.append)
    assert (outcome.chosen_seconds, outcome.best, outcome.best_seconds) == (3e-3, str(Tile(1e-3)), 1e-3)
    assert (outcome.tried, outcome.left_out) == (3, 2)
    assert told[0].startswith("left out _missing(): AttributeError")
    rows = json.loads((tmp_path / "tuning.json").read_text())
    assert rows[0]["gain"] == pytest.approx(3.0)
    assert "| `Tile(seconds=0.001)` | 1.00 ms |" in (tmp_path / "tuning.md").read_text()


def test_the_fastest_tile_of_attention_is_used_where_its_file_is_named(tmp_path, monkeypatch):
    """`python -m lamina.bench.tune FOLDER`, and then LAMINA_GPU_TUNING=FOLDER/tuned.json."""
    from lamina.kernels.tuning import attention as tuning

    monkeypatch.setattr(tuning, "_chosen", {})
    shape = tuning.AttentionShape("forward", 128, 2, False, 90)
    table, *others = tuning.candidates(shape)
    fastest = others[1]
    now = []

    def run(tile):
        now.append(tile)
        return (torch.ones(3),)

    sweep = tune.Sweep("attention", [table, *others], run, lambda tile: tuning.choose(shape, tile))
    monkeypatch.setattr(tune, "SWEEPS", (("_false", ()),))
    monkeypatch.setattr(tune, "_false", lambda: sweep, raising=False)
    monkeypatch.setattr(gpu, "stopwatch", lambda: lambda call, calls: (call(), 2.0 - (now[-1] == fastest))[1])
    tune.sweep_all(tmp_path, 2.0, compiled=lambda *_: {0: [1, 2, 3]}, tell=lambda line: None)
    monkeypatch.setattr(tuning, "_chosen", {})
    assert tuning.attention_tiles(shape) == table
    tuning.load(tmp_path / "tuned.json")
    assert tuning.attention_tiles(shape) == fastest
    # In a process of its own, by the variable.
    ask = (
        "import lamina; from lamina.kernels.tuning.attention import *; "
        "print(attention_tiles(AttentionShape('forward', 128, 2, False, 90)))"
    )
    environment = {**os.environ, "LAMINA_GPU_TUNING": str(tmp_path / "tuned.json")}
    printed = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str(fastest)
    environment["LAMINA_GPU_TUNING"] = str(tmp_path / "tuning.json")
    refused = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=False)
    assert "LAMINA_GPU_TUNING: " in refused.stderr
    assert "is not a file of tuned block shapes" in refused.stderr


def test_candidates_are_drawn_the_same_way_in_every_process(monkeypatch):
    tiles = [Tile(float(i)) for i in range(200)]
    monkeypatch.setattr(tune, "SWEEPS", (("_false", ()),))
    monkeypatch.setattr(tune, "_false", lambda: tune.Sweep("false", tiles, print), raising=False)
    one, other = tune._made(0), tune._made(0)
    assert one.tiles == other.tiles
    assert len(one.tiles) == tune.MOST
    assert one.tiles[0] == tiles[0], "the table's own choice"
    assert torch.initial_seed() == 0
