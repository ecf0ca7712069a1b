"""lamina compress: the whole way in small, the same bits after an interruption, and one sentence for every mistake."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console
from tolerances import assert_exact
from typer.testing import CliRunner

import lamina
from lamina import compress, data, models, train
from lamina.cli import app
from lamina.errors import FormatError
from lamina.serialization import load_tensors


def first(part, count):
    return type(part)(part.x[:count], part.y[:count])


@pytest.fixture(scope="module", autouse=True)
def short_timings():
    """How fast it is does not matter here, and every layer that can be exchanged is."""
    import sys

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "TIMING_SECONDS", 1e-3)
        patch.setattr(
            sys.modules["lamina.accelerate"], "_interleaved", lambda before, after, seconds, stopwatch: (2.0, 1.0)
        )
        yield


@pytest.fixture(scope="module")
def splits():
    full = data.mnist()
    return data.Splits(first(full.train, 800), first(full.validation, 200), first(full.test, 250))


# Enough to be right about most images, in a second.
RECIPE = dataclasses.replace(train.RECIPES["lenet"], epochs=5, learning_rate=8e-3, augment=False)


def run(out, splits, **options):
    options = {"int8": True, "compile": False, "console": Console(quiet=True), **options}
    return compress.run("lenet", out, recipe=RECIPE, splits=splits, **options)


def state_of(out):
    state = json.loads((out / "compress.json").read_text())
    return {name: {k: v for k, v in stage.items() if k != "seconds"} for name, stage in state["stages"].items()}


@pytest.fixture(scope="module")
def whole(splits, tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("compress") / "whole"
    assert run(out, splits) == out / "index.html"
    return out


def test_the_model_keeps_its_accuracy_and_becomes_small(whole, splits):
    assert sorted(path.name for path in whole.iterdir()) == [
        *("compress.json", "compressed.safetensors", "dense.safetensors", "index.html", "pruned.safetensors")
    ]
    stages = state_of(whole)
    dense, tuned, final = (stages[name]["metrics"]["accuracy"] for name in ("train", "tune", "convert"))
    assert dense > 0.9
    # A few epochs on a third of the images: the runs that `lamina compress` is judged by take minutes.
    assert tuned > dense - 0.06
    assert abs(final - tuned) < 0.02
    assert stages["tune"]["at_once"]["accuracy"] < 0.6
    assert stages["tune"]["sparsity"] == pytest.approx(0.9, abs=0.002)
    assert stages["convert"]["files"][1] < stages["convert"]["files"][0] / 2

    pruned, compressed = models.create("lenet").eval(), models.create("lenet").eval()
    lamina.load_(pruned, whole / "pruned.safetensors")
    lamina.load_(compressed, whole / "compressed.safetensors")
    report = lamina.prune.report(pruned, "4x4")
    assert report.sparsity == stages["tune"]["sparsity"]
    zero_blocks = [weight["zero_blocks"] for weight in stages["tune"]["weights"]]
    assert [weight.zero_blocks for weight in report.weights] == zero_blocks
    assert train.evaluate(pruned, *splits.test).accuracy == tuned
    assert isinstance(compressed.classifier[1], lamina.nn.SparseInt8Linear)
    with torch.no_grad():
        error = compressed(splits.test.x) - pruned(splits.test.x)
    assert error.norm() < 0.1 * pruned(splits.test.x).norm()


def test_float_models_get_sparse_layers_too(whole, splits):
    """The same folder up to where it is converted; 4x4 blocks are 4x1 blocks as well."""
    pruned = models.create("lenet").eval()
    lamina.load_(pruned, whole / "pruned.safetensors")
    for pattern, kind in (("4x4", "4x1"), ("2x4", "2x1"), ("2:4", "unstructured")):
        request = compress.Request("lenet", 0.9, pattern, False, 2, 0, None, {})
        config = compress._configs(request)[0]
        assert config == lamina.Sparse(kind)
    fast = lamina.accelerate(pruned, (splits.test.x[:64],), compress._configs(request), compile=False)
    assert isinstance(fast.model.classifier[1], lamina.nn.SparseLinear)
    torch.testing.assert_close(fast.model(splits.test.x), pruned(splits.test.x), rtol=1e-4, atol=1e-4)


def test_the_page_says_what_happened(whole):
    html = (whole / "index.html").read_text()
    stages = state_of(whole)
    assert f"{stages['convert']['metrics']['accuracy']:.2%}" in html
    for layer in stages["scan"]["layers"]:
        assert layer["fqn"] in html
        assert [share for share, _ in layer["scores"]] == list(compress.SCANNED)
    assert html.count("<svg viewBox") == 2
    assert "http://" not in html
    assert "<script" not in html
    assert "SparseInt8Linear" in html


class Stopped(Exception):
    pass


def stops_at_once(*args):
    raise Stopped


@pytest.fixture(scope="module")
def interrupted(whole, splits, tmp_path_factory):
    """The same run, stopped in the middle of training, of the scan and of tuning, and taken up again each time."""
    out = tmp_path_factory.mktemp("compress") / "interrupted"
    train_epoch = train.Run._train_epoch
    sensitivity = lamina.prune.sensitivity
    with pytest.MonkeyPatch.context() as patch:
        for stage, epochs in (("train", 2), ("scan", 0), ("tune", 3), ("tune", 1)):
            left = epochs if stage != "scan" else 100

            def stops(self):
                nonlocal left
                train_epoch(self)  # which is lost: its state is kept when the next begins
                left -= 1
                if left < 0:
                    raise Stopped

            def stops_scan(*args, stage=stage, **kwargs):
                if stage == "scan":
                    raise Stopped
                return sensitivity(*args, **kwargs)

            patch.setattr(train.Run, "_train_epoch", stops)
            patch.setattr(lamina.prune, "sensitivity", stops_scan, raising=False)
            with pytest.raises(Stopped):
                run(out, splits)
            assert not (out / "index.html").exists()
            if stage != "scan":
                file = {"train": "training.safetensors", "tune": "tuning.safetensors"}[stage]
                assert len(load_tensors(out / file)[1]["history"]) == {2: 2, 3: 3, 1: 4}[epochs]
            if stage == "train":
                with patch.context() as unsaved:  # trained and saved, but nobody wrote that down
                    unsaved.setattr(train.Run, "_train_epoch", train_epoch)
                    unsaved.setattr(compress, "_replace", stops_at_once)
                    with pytest.raises(Stopped):
                        run(out, splits)
                    unsaved.setattr(train.Run, "_train_epoch", None)
                    with pytest.raises(Stopped):
                        run(out, splits)
    run(out, splits)
    return out


def test_an_interrupted_run_ends_in_the_same_bits(whole, interrupted):
    assert sorted(path.name for path in interrupted.iterdir()) == sorted(path.name for path in whole.iterdir())
    for name in ("dense", "pruned", "compressed"):
        ones, others = models.create("lenet"), models.create("lenet")
        lamina.load_(ones, whole / f"{name}.safetensors")
        lamina.load_(others, interrupted / f"{name}.safetensors")
        mine, theirs = ones.state_dict(), others.state_dict()
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert_exact(tensor, theirs[key], f"{name} {key}")
    before, after = state_of(whole), state_of(interrupted)
    for stage in ("train", "scan", "tune"):
        assert before[stage] == after[stage]
    assert before["convert"]["metrics"] == after["convert"]["metrics"]


def test_a_finished_run_only_writes_its_page_again(whole, splits, monkeypatch):
    monkeypatch.setattr(train.Run, "_train_epoch", None)
    before = (whole / "compress.json").read_bytes()
    (whole / "index.html").unlink()
    run(whole, splits)
    assert (whole / "index.html").exists()
    assert (whole / "compress.json").read_bytes() == before


def test_a_folder_belongs_to_one_run(whole, splits):
    with pytest.raises(ValueError, match=r"holds another run \(sparsity 0\.9, not 0\.5\); use another --out"):
        run(whole, splits, sparsity=0.5)


def test_a_damaged_state_is_refused(whole, splits, tmp_path):
    (tmp_path / "compress.json").write_text((whole / "compress.json").read_text()[:300])
    with pytest.raises(FormatError, match=r"compress\.json can't be read"):
        run(tmp_path, splits)
    (tmp_path / "compress.json").write_text("{}")
    with pytest.raises(FormatError, match="is not of a compression"):
        run(tmp_path, splits)
    (tmp_path / "compress.json").unlink()
    (tmp_path / "training.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="truncated or no safetensors file"):
        run(tmp_path, splits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "there is no training recipe for 'nonsense'"),
        (["lenet", "--sparsity", "1"], "sparsity is 1, which leaves nothing of the model"),
        (["lenet", "--sparsity", "1.5"], "sparsity is 1.5, but must be between 0 and 1"),
        (["lenet", "--pattern", "8x8"], "pattern is '8x8', but must be one of"),
        (["lenet", "--pattern", "2:4"], "which is sparsity 0.5, not 0.9"),
        (["lenet", "--checkpoint", "no/such.safetensors"], "does not exist; write one with `lamina train`"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["compress", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_how_to_go_on(monkeypatch, tmp_path):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "run", stop)
    result = CliRunner().invoke(app, ["compress", "lenet", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert "stopped; the same command goes on from here" in result.stderr
