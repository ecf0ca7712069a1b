"""csrc/cuda/attention_decode.cu compiled for the CPU, on the emulator beside this, with the functions of `_C`."""

import ctypes
import subprocess
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
SOURCES = [
    HERE / "attention_decode.cpp",
    CSRC / "ops/attention_decode_checks.cpp",
    CSRC / "ops/cuda/attention_decode.cpp",
    CSRC / "ops/tensor.cpp",
    CSRC / "cuda/attention_decode.cu",
]
# In the order of csrc/ops/tensor.h.
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]


def compile_library(folder: Path, *flags: str) -> Path:
    """The shared library, built in `folder`, one compiler at a time."""
    objects = []
    for source in SOURCES:
        objects.append(folder / f"{source.stem}{source.suffix}.{source.parent.name}.o")
        subprocess.run(
            ["g++", "-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-DLAMINA_CUDA_EMULATOR", f"-I{HERE}",
             f"-I{CSRC}", *flags, "-c", "-o", objects[-1], "-x", "c++", source],
            check=True,
        )  # fmt: skip
    library = folder / "emulated_attention_decode.so"
    subprocess.run(["g++", "-shared", *flags, "-o", library, *objects], check=True)
    return library


class _View(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


def _view(t: Tensor | None):
    if t is None:
        return None
    sizes = ctypes.c_int64 * max(t.ndim, 1)
    return ctypes.byref(_View(t.data_ptr(), sizes(*t.shape), sizes(*t.stride()), t.ndim, DTYPES.index(t.dtype)))


class Emulated:
    """Functions of the names and arguments of `_C`, for tensors of the CPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.attention_decode.restype = ctypes.c_char_p
        self._library.attention_decode_append.restype = ctypes.c_char_p
        self._library.attention_decode_workspace.restype = ctypes.c_int64

    def take_turns_backwards(self, on: bool) -> None:
        """Threads of a block run from the last to the first: what hides a missing barrier one way shows the other."""
        self._library.take_turns_backwards(int(on))

    def attention_decode_workspace_cuda(self, q, k_cache, v_cache, block_table) -> int:
        return self._library.attention_decode_workspace(*map(_view, (q, k_cache, v_cache, block_table)))

    def attention_decode_cuda(
        self, q, k_cache, v_cache, cache_seqlens, block_table, scale, window, softcap, *rest
    ) -> None:
        message = self._library.attention_decode(
            *map(_view, (q, k_cache, v_cache, cache_seqlens, block_table)),
            ctypes.c_double(scale),
            None if window is None else ctypes.byref(ctypes.c_int64(window)),
            None if softcap is None else ctypes.byref(ctypes.c_double(softcap)),
            *map(_view, rest),
        )
        if message:
            raise ValueError(message.decode())

    def attention_decode_append_cuda(self, *tensors) -> None:
        message = self._library.attention_decode_append(*map(_view, tensors))
        if message:
            raise ValueError(message.decode())
