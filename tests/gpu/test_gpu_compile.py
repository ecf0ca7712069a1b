"""Every Triton kernel compiles to machine code of every architecture that lamina names, whatever GPU is here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ARCHITECTURES = 80, 90, 100
FOLDER = Path(__file__).parent
MODULES = [path.stem for path in sorted(FOLDER.glob("test_gpu_*.py")) if "\nCOMPILED = " in path.read_text("utf-8")]


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("module", MODULES)
def test_subprocess_kernels_compile(module, capability):
    done = subprocess.run(
        [sys.executable, FOLDER / "compile_kernels.py", str(capability), module],
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(rf" sm_{capability}: ", done.stdout)
