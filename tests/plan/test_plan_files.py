"""Plans in files: the same bits without the model, and a clear word about every file that is not one."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import lamina
from lamina.cli import app
from lamina.plan import file

EVERY = {"measure": False}


@pytest.fixture
def model():
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8 * 36, 5)).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 12, 12)


@pytest.fixture
def saved(model, x, tmp_path):
    path = tmp_path / "m.plan.safetensors"
    lamina.make_plan(model, (x,), options=EVERY).save(path)
    return path


def test_the_loaded_plan_gives_the_same_bits(model, x, saved):
    plan, loaded = lamina.make_plan(model, (x,), options=EVERY), lamina.load_plan(saved)
    assert loaded.inputs == plan.inputs
    for x in torch.randn(3, 2, 3, 12, 12):
        assert torch.equal(loaded(x), plan(x))
    assert str(loaded) == str(plan)


def test_it_has_weights_of_its_own(model, x, saved):
    loaded = lamina.load_plan(saved)
    expected = loaded(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(loaded(x), expected)


def test_calls_of_torch_and_results_of_every_form(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x, extra):
            y = torch.cumsum(self.a(x), 1).to(torch.float64)
            return {"y": y, "parts": (extra["bias"], [y[:, :2], None, 2.5])}

    net, x, extra = Net().eval(), torch.randn(3, 8), {"bias": torch.randn(8)}
    plan = lamina.make_plan(net, (x, extra), options=EVERY)
    plan.save(tmp_path / "p")
    loaded = lamina.load_plan(tmp_path / "p")
    actual, expected = loaded(x, extra), plan(x, extra)
    assert torch.equal(actual["y"], expected["y"])
    assert actual["parts"][0] is extra["bias"]
    assert torch.equal(actual["parts"][1][0], expected["parts"][1][0])
    assert actual["parts"][1][1:] == [None, 2.5]


def test_int8_plans(tmp_path):
    model, x = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval(), torch.randn(9, 64)
    plan = lamina.make_plan(model, (x,), options=EVERY | {"config": lamina.Int8Dynamic()})
    plan.save(tmp_path / "p")
    assert torch.equal(lamina.load_plan(tmp_path / "p")(x), plan(x))
    assert (tmp_path / "p").stat().st_size < 0.5 * sum(p.nbytes for p in model.parameters())


def test_loading_needs_neither_the_model_nor_a_compiler(saved, x, tmp_path):
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys, numpy, torch, lamina\n"
        f"y = lamina.load_plan({str(saved)!r})(torch.from_numpy(numpy.load({str(tmp_path / 'x.npy')!r})))\n"
        "assert 'torch._dynamo' not in sys.modules and 'torch._inductor' not in sys.modules\n"
        f"numpy.save({str(tmp_path / 'y.npy')!r}, y.numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert np.array_equal(np.load(tmp_path / "y.npy"), lamina.load_plan(saved)(x).numpy())


# -- files that are no plan


def test_a_model_file_is_no_plan(model, tmp_path):
    lamina.save(model, tmp_path / "m")
    with pytest.raises(lamina.FormatError, match=r"is a model that lamina\.save wrote; lamina\.load_ reads it"):
        lamina.load_plan(tmp_path / "m")


def test_damaged_files(saved):
    good = saved.read_bytes()
    for damaged in (good[: len(good) // 2], good[:100], b"", b"\x00" * 64):
        saved.write_bytes(damaged)
        with pytest.raises(lamina.FormatError):
            lamina.load_plan(saved)
    flipped = bytearray(good)
    flipped[-5] ^= 1
    saved.write_bytes(bytes(flipped))
    with pytest.raises(lamina.FormatError, match="damaged"):
        lamina.load_plan(saved)


def rewritten(saved, change):
    """The file with its recording changed, checksum and all, as somebody might who means harm."""
    from lamina.serialization import load_tensors, save_tensors

    tensors, values = load_tensors(saved)
    change(values)
    save_tensors(tensors, saved, values)


def test_a_newer_version(saved):
    rewritten(saved, lambda values: values.update(plan=file.VERSION + 1))
    with pytest.raises(lamina.FormatError, match=f"version {file.VERSION + 1}, but this lamina reads {file.VERSION}"):
        lamina.load_plan(saved)


def of_first(values, change):
    step = next(s for s in values["sizes"][0]["steps"] if s.get("op") == "conv2d")
    change(step)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: of_first(values, lambda s: s.update(op="no_such_op")),
        lambda values: of_first(values, lambda s: s["arguments"].pop()),
        lambda values: of_first(values, lambda s: s["arguments"].__setitem__(0, 3)),
        lambda values: of_first(values, lambda s: s["arguments"][0]["ref"].__setitem__(1, 1 << 40)),
        lambda values: of_first(values, lambda s: s["arguments"][0]["ref"].__setitem__(3, [1 << 40] * 4)),
        lambda values: of_first(values, lambda s: s["arguments"][0]["ref"].__setitem__(0, 999)),
        lambda values: of_first(values, lambda s: s["arguments"][0]["ref"].__setitem__(2, "complex64")),
        lambda values: values["sizes"][0]["steps"].append({"torch": "evil.call.default", "module": ""}),
        lambda values: values["sizes"][0].pop("steps"),
        lambda values: values["buffers"].pop(),
    ],
)
def test_a_recording_that_does_not_fit_is_refused_before_it_runs(saved, change):
    rewritten(saved, change)
    with pytest.raises(lamina.FormatError):
        lamina.load_plan(saved)


def test_a_foreign_safetensors_file(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "f")
    with pytest.raises(lamina.FormatError):
        lamina.load_plan(tmp_path / "f")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        lamina.load_plan(tmp_path / "nothing")


def test_the_file_says_what_it_is(saved):
    with safe_open(saved, "pt") as opened:
        values = json.loads(opened.metadata()["lamina"])["values"]
    assert values["plan"] == file.VERSION
    assert {step["op"] for step in values["sizes"][0]["steps"]} >= {"conv2d"}


# -- from the command line


def run(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def test_lamina_run(saved, x, tmp_path):
    np.save(tmp_path / "x.npy", x.numpy())
    result = run(saved, "--input", tmp_path / "x.npy", "--out", tmp_path / "y.npz", "--profile")
    assert result.exit_code == 0, result.output
    assert "[2, 5]" in result.output
    assert "conv2d" in result.output
    assert np.array_equal(np.load(tmp_path / "y.npz")["output"], lamina.load_plan(saved)(x).numpy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: np.save(path, np.zeros((1, 3, 12, 12), np.float32)), "was made for float32[2, 3, 12, 12]"),
        (lambda path: np.save(path, np.full((2, 3, 12, 12), 0.1)), "not all of its values fit torch.float32"),
        (lambda path: path.write_bytes(b"no array"), "is no .npy file"),
        (lambda path: None, "x.npy"),
    ],
)
def test_lamina_run_says_what_is_wrong(saved, tmp_path, make, message):
    make(tmp_path / "x.npy")
    result = run(saved, "--input", tmp_path / "x.npy")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
