"""Fixtures of the whole suite. No reruns, and nothing is skipped: what a machine cannot run is not collected."""

import random
import sys

import pytest
import torch

import lamina
from lamina import _C


def pytest_addoption(parser):
    parser.addoption("--seed", default="0", help="seed of random inputs, a number, or 'random' for one that is drawn")


def pytest_configure(config):
    drawn = random.SystemRandom().randrange(2**31)
    config.option.seed = drawn if config.option.seed == "random" else int(config.option.seed)


def pytest_report_header(config):
    return [
        f"seed: {config.option.seed} (repeat with --seed {config.option.seed})",
        f"lamina: {lamina.__file__}; isas: {', '.join(_C.available_isas())}; threads: {torch.get_num_threads()}",
    ]


def pytest_generate_tests(metafunc):
    """A test with an argument `isa` runs once on every instruction set of this machine."""
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", _C.available_isas())


@pytest.fixture
def seed(request) -> int:
    """Seed of this run's random inputs; printed at the top of the run and beside every failure."""
    value = request.config.option.seed
    print(f"--seed {value}")
    return value


@pytest.fixture
def generator(seed) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def as_found():
    """Every test starts from the same torch seed, and leaves threads, ISA and poison as it found them."""
    threads, isa = torch.get_num_threads(), _C.active_isa()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    _C.force_isa(isa)
    _C.poison_workspace(False)


@pytest.fixture
def poison(monkeypatch):
    """Memory that lamina takes without writing it is full of NaN (integers: of their largest value).

    For torch.empty and its relatives in Python, and for the workspace in C++. `poison.calls` counts the tensors filled,
    so that a test can tell that the poison was there at all.
    """

    class Poison:
        calls = 0

    def poisoned(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if sys._getframe(1).f_globals.get("__name__", "").startswith("lamina") and tensor.device.type == "cpu":
                Poison.calls += 1
                tensor.fill_(float("nan") if tensor.is_floating_point() else _largest(tensor.dtype))
            return tensor

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
    _C.poison_workspace(True)
    return Poison


def _largest(dtype: torch.dtype):
    return True if dtype is torch.bool else torch.iinfo(dtype).max
