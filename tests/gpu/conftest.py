"""What lamina does on a GPU, tested with and without one.

With a GPU the tests here run on it. Without, Triton interprets its kernels with NumPy, on tensors of the CPU: the CUDA
implementations of the ops then stand in the place of the CPU's for the length of a test, so that the same public
functions, gradients and checks are tested, on smaller shapes.
"""

import os
import warnings

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any module of lamina.kernels

from lamina import _C  # noqa: E402
from lamina.ops.library import CUDA_IMPLEMENTATIONS  # noqa: E402

if not ON_GPU:
    from interpreter_repairs import repair

    repair()


def pytest_report_header(config):
    return f"GPU tests run on {torch.cuda.get_device_name() if ON_GPU else 'the CPU, by the interpreter of Triton'}"


@pytest.fixture(autouse=True)
def device(monkeypatch) -> str:
    """The device whose tensors the CUDA implementations take."""
    if ON_GPU:
        yield "cuda"
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            # A process keeps no GPU after such an error: another worker must take its place, or all tests that come
            # later fail in this one.
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)
            raise
        return
    library = torch.library.Library("lamina", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, implementation in CUDA_IMPLEMENTATIONS.items():
            library.impl(name, implementation, "CPU", allow_override=True)
    monkeypatch.setattr(_C, "skips_dispatcher", lambda arguments: False)
    yield "cpu"
    library._destroy()


@pytest.fixture
def exact_products():
    """cuDNN rounds operands to tf32 otherwise."""
    # Not by assignment, which some of torch's own test helpers forbid for the rest of a process.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# What needs a GPU itself is not collected without one.
collect_ignore = [] if ON_GPU else ["test_gpu_models.py"]
