"""The backend by its name, even where the installed package lacks the entry point; no graph outlives its test."""

import pytest
import torch

from lamina.compile import backend


def pytest_collection_modifyitems(items):
    """A pass that fails warns and leaves the graph to eager: here it must not pass for a graph without patterns."""
    for item in items:
        if "tests/compile" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("error:lamina backend"))


@pytest.fixture(scope="session", autouse=True)
def registered():
    if "lamina" not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(backend, name="lamina")


@pytest.fixture(autouse=True)
def no_graphs_left():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
