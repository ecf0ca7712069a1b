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


def _mend_the_interpreter() -> None:
    """Of Triton 3.6: NumPy 2.4 makes no int of an array of one element, and bfloat16, kept as uint16, is multiplied so.

    Beside products only conversions know bfloat16 there: kernels convert before they compare or subtract.
    """
    from triton.runtime import interpreter

    patch_tensor, create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        with np.errstate(invalid="ignore"):  # NaN among the operands
            return create_dot(self, widened(a), widened(b), *rest)

    import numpy as np
    import triton.language as tl

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = dot


if not ON_GPU:
    _mend_the_interpreter()


def pytest_report_header(config):
    return f"GPU tests run on {torch.cuda.get_device_name() if ON_GPU else 'the CPU, by the interpreter of Triton'}"


@pytest.fixture(autouse=True)
def device(monkeypatch) -> str:
    """The device whose tensors the CUDA implementations take."""
    if ON_GPU:
        yield "cuda"
        return
    library = torch.library.Library("lamina", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, implementation in CUDA_IMPLEMENTATIONS.items():
            library.impl(name, implementation, "CPU", allow_override=True)
    monkeypatch.setattr(_C, "skips_dispatcher", lambda arguments: False)
    yield "cpu"
    library._destroy()
