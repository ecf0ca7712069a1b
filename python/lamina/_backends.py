"""What this machine can run: the compiled module, its instruction sets, CUDA.

torch is imported before the compiled module: it loads the OpenMP library whose thread pool both then share.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from lamina import _C
from lamina.kernels.tuning import attention as tuning

if "LAMINA_ISA" in os.environ:
    try:
        _C.force_isa(os.environ["LAMINA_ISA"])
    except ValueError as error:
        raise ValueError(f"LAMINA_ISA: {error}") from None


if "LAMINA_GPU_TUNING" in os.environ:
    try:
        tuning.load(os.environ["LAMINA_GPU_TUNING"])
    except (OSError, ValueError) as error:
        raise ValueError(f"LAMINA_GPU_TUNING: {error}") from None


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Run kernels of at most the instruction set `name` inside the block, in the whole process.

    Raises ValueError, naming the available ones, if `name` is unknown or this machine lacks it.

    >>> with lamina.force_isa("avx2"):
    ...     y = model(x)
    """
    before = _C.active_isa()
    _C.force_isa(name)
    try:
        yield
    finally:
        _C.force_isa(before)


def has_triton() -> bool:
    """Whether Triton is installed; nothing is imported."""
    return importlib.util.find_spec("triton") is not None


def info() -> dict[str, Any]:
    """What lamina runs on here.

    Keys: `version`; `isa` (in use) and `isas` (available, rising); `threads` (torch's setting); `backends` (which of
    cpu, cuda, triton can run); `cuda_devices`; `build` (torch version, whether CUDA kernels were compiled,
    and among them those made of CUTLASS).
    """
    devices = _C.cuda_devices() if _C.with_cuda else []
    backends = ["cpu"]
    if devices:
        backends.append("cuda")
    if has_triton() and torch.cuda.is_available():
        backends.append("triton")
    return {
        "version": version("lamina"),
        "isa": _C.active_isa(),
        "isas": _C.available_isas(),
        "threads": torch.get_num_threads(),
        "backends": backends,
        "cuda_devices": devices,
        "build": {"torch": torch.__version__, "cuda": _C.with_cuda, "cutlass": _C.with_cutlass},
    }
