"""The `lamina` command: exit codes, and one sentence for every mistake."""

import json
import re

import pytest
from typer.testing import CliRunner

from lamina.bench import machine
from lamina.cli import app

SMALL = "int8_linear/minilm/1x384x384"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """Run what must be refused; returns the one sentence."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module", autouse=True)
def short_probes():
    """The machine's peaks do not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "PROBE_SECONDS", 1e-3)
        yield


@pytest.fixture(scope="module")
def results_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "results.json"
    result = run("bench", "--filter", SMALL, "--quick", "--threads", "1", "--json", path)
    assert result.exit_code == 0, result.output
    assert SMALL.removeprefix("int8_linear/") in result.output
    return path


def test_info_names_the_instruction_set():
    import lamina

    result = run("info")
    assert result.exit_code == 0
    assert lamina.info()["isa"] in result.output


def test_help_lists_the_commands():
    result = run("--help")
    for command in ("info", "train", "bench", "report", "compare"):
        assert command in result.output


def test_bench_writes_what_compare_reads(results_file):
    content = json.loads(results_file.read_text())
    assert content["schema"] == "lamina-results"
    (measurement,) = content["measurements"]
    assert measurement["workload"] == SMALL
    assert measurement["gate"]["ok"]
    assert set(measurement["times"]) == {"lamina", "eager", "quantize_dynamic"}
    result = run("compare", results_file, results_file, "--fail-below", "0.99")
    assert result.exit_code == 0
    assert "same" in result.output


def test_compare_exits_1_on_a_regression(results_file, tmp_path):
    content = json.loads(results_file.read_text())
    timing = content["measurements"][0]["times"]["lamina"]
    content["measurements"][0]["times"]["lamina"] = {
        name: value * 10 if name.startswith("q") else value for name, value in timing.items()
    }
    for contender in content["measurements"][0]["times"].values():
        contender["noise"] = 0.01
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(content))
    assert run("compare", results_file, slower).exit_code == 0
    result = run("compare", results_file, slower, "--fail-below", "0.9")
    assert result.exit_code == 1
    assert "slower" in result.output


def test_compare_refuses_foreign_and_truncated_files(results_file, tmp_path):
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"a": 1}')
    assert "is not a lamina results file" in refused("compare", results_file, foreign)
    truncated = tmp_path / "truncated.json"
    truncated.write_text(results_file.read_text()[:200])
    assert "is not complete JSON" in refused("compare", truncated, results_file)
    assert "can't be read" in refused("compare", tmp_path / "none.json", results_file)


def test_bench_lists_and_filters():
    result = run("bench", "--list", "--filter", "attention/*causal*")
    assert result.exit_code == 0
    assert len(result.output.split()) > 1
    assert all(re.fullmatch(r"attention/\S*causal", line) for line in result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "nonsense"], "no workload matches 'nonsense'"),
        (["--filter", SMALL, "--threads", "many"], "--threads takes counts and 'all'"),
        (["--filter", SMALL, "--threads", "0"], "--threads takes counts and 'all'"),
        (["--filter", SMALL, "--isa", "mmx"], "mmx"),
        (["--targets", "no/such.toml"], "can't be read"),
        (["--strict"], "--targets"),
    ],
)
def test_bench_mistakes_are_one_sentence(arguments, message):
    assert message in refused("bench", *arguments)


def test_bench_judges_targets(tmp_path):
    path = tmp_path / "targets.toml"
    entry = (
        f'[[target]]\nid = "{{id}}"\nworkloads = "{SMALL}"\nmetric = "speedup"\nbaseline = "eager"\n'
        'minimum = {minimum}\nthreads = [1]\nwhy = "to test"\n'
    )
    path.write_text(entry.format(id="easy", minimum=1e-6) + entry.format(id="hard", minimum=1e6))
    result = run("bench", "--targets", path, "--quick", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert re.search(r"easy.*met", result.output)
    assert re.search(r"hard.*missed", result.output)
    path.write_text(path.read_text() + entry.format(id="elsewhere", minimum=1).replace(SMALL, "rms_norm/*"))
    result = run("bench", "--targets", path, "--filter", SMALL, "--quick", "--threads", "1")
    assert "easy" in result.output
    assert "elsewhere" not in result.output  # nobody asked for its workloads
    assert run("bench", "--targets", path, "--quick", "--threads", "1", "--strict").exit_code == 1


def test_train_mistakes_are_one_sentence(tmp_path):
    assert "there is no training recipe for 'nonsense'" in refused("train", "nonsense", "--out", tmp_path)
    assert run("train", "lenet", "--epochs", "0", "--out", tmp_path).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_report_names_what_is_missing(tmp_path, monkeypatch):
    from lamina.bench.reporting import job

    monkeypatch.setattr(job, "NEEDED", ("no_such_package",))
    message = refused("report", "--out", tmp_path / "report")
    assert "needs no_such_package: pip install lamina[report,models]" in message
    assert not (tmp_path / "report").exists()


def test_report_refuses_a_bad_targets_file_before_it_starts(tmp_path):
    path = tmp_path / "targets.toml"
    path.write_text("nonsense")
    assert "is not TOML" in refused("report", "--out", tmp_path / "report", "--targets", path)
    assert not (tmp_path / "report").exists()
