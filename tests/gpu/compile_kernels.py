"""Compiles Triton kernels for GPUs that this machine need not have.

    python tests/gpu/compile_kernels.py 90 test_gpu_attention

runs every function of COMPILED in the test module with launches turned into compilations for a compute capability, down
to the machine code. COMPILED has functions without arguments that call launchers of lamina.kernels
with tensors of the meta device, in the shapes, dtypes and options whose code differs. A module may have COMPILED_ONCE
too: lists of such functions, of which all but the first must find their kernels compiled. Prints a line per kernel
compiled: its name, capability, registers and bytes spilled to local memory by one thread, and bytes of shared memory.

Not a test itself: the interpreter, which the tests without a GPU use, and the compiler exclude each other in a process,
and so do two capabilities, since Triton keeps a compiled kernel whatever the GPU.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from functools import partialmethod
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction


class CompileOnly(DriverBase):
    """A driver of a GPU that is only described."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError

    def get_empty_cache_for_benchmark(self):
        raise NotImplementedError

    def clear_cache(self, cache) -> None:
        pass


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and local memory of a thread, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        listed = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", listed)[1]), int(re.search(r"STACK:(\d+)", listed)[1])


def main(capability: int, module: str) -> None:
    run = JITFunction.run
    compiled = {}

    def compile_only(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        if id(kernel) not in compiled:
            compiled[id(kernel)] = kernel
            registers, local = resources(kernel.asm["cubin"])
            # Of Blackwell there are 512 columns; with more the compiler gives a kernel that no GPU launches.
            assert (getattr(kernel.metadata, "tmem_size", 0) or 0) <= 512, f"{self.fn.__name__}: too much tensor memory"
            print(
                f"{self.fn.__name__} sm_{kernel.metadata.target.arch}: {registers} registers, {local} bytes local, "
                f"{kernel.metadata.shared} bytes shared, {kernel.metadata.num_warps} warps"
            )
        return kernel

    compile_only.__name__ = "run"
    JITFunction.run = partialmethod(compile_only, warmup=True)
    JITFunction.__getitem__ = lambda self, grid: lambda *args, **kwargs: self.run(*args, grid=grid, **kwargs)
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    tests = importlib.import_module(module)
    cases = tests.COMPILED
    assert cases, f"{module} has nothing to compile"
    triton.runtime.driver.set_active(CompileOnly(capability))
    for case in cases:
        case()
    assert compiled, f"{module}: no kernel was launched"
    for first, *others in getattr(tests, "COMPILED_ONCE", ()):
        first()
        before = len(compiled)
        for case in others:
            case()
            names = [kernel.metadata.name for kernel in list(compiled.values())[before:]]
            assert not names, f"{module}: another length compiles {', '.join(names)} again"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
