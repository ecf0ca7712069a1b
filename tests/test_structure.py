"""The house keeps its order: every op has its rooms, and every line stands in the room it belongs to."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import SUITES
from test_every_op import registered_ops

from lamina import _C

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "lamina"
KERNELS = sorted((ROOT / "csrc/cpu/kernels").glob("*"))
VECTORS = sorted((ROOT / "csrc/cpu/vec").glob("*"))


def code_of(path: Path) -> str:
    """C++ without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text("utf-8"), flags=re.DOTALL)


def sources(folder: str, *suffixes: str) -> list[Path]:
    found = sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    assert found, f"no {suffixes} under {folder}"
    return found


def violations(pattern: str, paths: list[Path], *, allowed: tuple[str, ...], strip: bool = False) -> list[str]:
    """ "file:line: text" of every match outside the allowed folders and files."""
    found = []
    for path in paths:
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith(allowed):
            continue
        text = code_of(path) if strip else path.read_text("utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            if re.search(pattern, line):
                found.append(f"{relative}:{number}: {line.strip()}")
    return found


# -- every op has its rooms

# The gradient of an op lives in the op's rooms, unless it is large enough for its own.
STEMS = sorted(
    {op if (ROOT / f"csrc/ops/{op}.cpp").is_file() else op.removesuffix("_backward") for op in registered_ops()}
)


@pytest.mark.parametrize("op", STEMS)
def test_every_op_has_its_rooms(op):
    for room in (
        f"csrc/ops/{op}.h",
        f"csrc/ops/{op}.cpp",
        f"python/lamina/ops/{op}.py",
        f"python/lamina/reference/{op}.py",
        f"tests/ops/test_{op}.py",
    ):
        assert (ROOT / room).is_file(), f"{op} has no {room}"
    assert op in SUITES, f"{op} has no cases in tests/cases.py"


@pytest.mark.parametrize("op", STEMS)
def test_every_op_is_benchmarked(op):
    from lamina.bench.workloads import registry

    workloads = [workload for workload in registry().values() if workload.op == op]
    assert workloads, f"{op} has no workload in lamina.bench"
    for workload in workloads:
        assert workload.id.startswith(f"{op}/")
        assert workload.baselines, f"{workload.id} is compared with nothing"


@pytest.mark.parametrize("op", STEMS)
def test_every_op_is_public_and_documented(op):
    import lamina

    function = getattr(lamina.ops, op)
    assert op in lamina.ops.__all__
    for word in ("Args:", "Returns", "Raises", ">>>"):
        assert word in function.__doc__, f"the docstring of lamina.ops.{op} has no {word}"


def test_no_room_stands_empty():
    """A file per op in csrc/ops, ops/ and reference/ belongs to a registered op."""
    ops = set(STEMS)
    helpers = {"library", "packed_cache", "pool_windows", "rnn", "semi_structured", "sparse_blocks"}
    for folder in ("ops", "reference"):
        stems = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"} - helpers
        assert stems == ops, folder
    assert {path.stem.removeprefix("test_") for path in (ROOT / "tests/ops").glob("test_*.py")} == ops


# -- kernels


def test_kernels_are_found():
    assert len(KERNELS) > 5
    assert len(VECTORS) > 3


@pytest.mark.parametrize("path", KERNELS + VECTORS, ids=lambda path: path.name)
def test_kernel_files_include_no_library(path):
    """An inline function of the standard library, compiled with AVX-512, could be linked into baseline code."""
    includes = re.findall(r"#include\s+([<\"][^>\"]+[>\"])", code_of(path))
    system = {"<immintrin.h>", "<stdint.h>", "<stddef.h>", "<string.h>"}
    assert [name for name in includes if name not in system and not name.startswith('"cpu/')] == []
    assert "std::" not in code_of(path)


@pytest.mark.parametrize(
    "path",
    [p for p in KERNELS if p.suffix == ".cpp"] + [p for p in VECTORS if p.name != "README.md"],
    ids=lambda p: p.name,
)
def test_kernel_code_is_in_an_anonymous_namespace(path):
    """In a namespace named after the ISA as well: two copies of one function must never be taken for the same."""
    code = re.sub(r"^\s*#(?:[^\n]*\\\n)*[^\n]*$", "", code_of(path), flags=re.MULTILINE).strip()
    assert code.startswith("namespace lamina::LAMINA_ISA {\nnamespace {"), code[:80]
    assert re.search(r"\}\s*\}$", code), code[-80:]
    assert len(re.findall(r"^namespace \{", code, flags=re.MULTILINE)) == 1


@pytest.mark.parametrize("path", [p for p in KERNELS if p.suffix == ".cpp"], ids=lambda p: p.name)
def test_kernel_files_register_themselves_for_an_isa_that_exists(path):
    assert "REGISTER_KERNEL(" in path.read_text("utf-8")
    stem, *isa = path.name.removesuffix(".cpp").split(".")
    assert len(isa) <= 1
    ladder = re.findall(r"^ISA_ROW\((\w+),", (ROOT / "csrc/cpu/isa.def").read_text("utf-8"), flags=re.MULTILINE)
    assert set(isa) <= set(ladder)
    assert (path.parent / f"{stem}.h").is_file(), f"{path.name} has no contract {stem}.h"


def test_no_isa_flags_outside_isa_def():
    """-march=native or a flag on a whole target ends in an illegal instruction on somebody else's machine."""
    build = [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml", ROOT / "Makefile", *sources("csrc/cmake", ".cmake")]
    assert violations(r"-march|-mtune|-mavx|-mfma|-ffast-math|-Ofast", build, allowed=()) == []


# -- every line in its room


def test_intrinsics_only_in_kernels():
    cpp = sources("csrc", ".h", ".cpp", ".cu")
    assert (
        violations(
            r"\b_mm(256|512)?_|\b__m(128|256|512)|immintrin", cpp, allowed=("csrc/cpu/vec/", "csrc/cpu/kernels/")
        )
        == []
    )


def test_only_bindings_know_python():
    cpp = sources("csrc", ".h", ".cpp", ".cu")
    assert violations(r"pybind11|Python\.h|\bPy_|\bPyObject", cpp, allowed=("csrc/bindings/",), strip=True) == []


def test_csrc_knows_no_torch():
    assert (
        violations(
            r"#include\s+[<\"](torch|ATen|c10)|\bat::|\btorch::", sources("csrc", ".h", ".cpp", ".cu"), allowed=()
        )
        == []
    )


def test_cpu_knows_no_tensors():
    cpu = sources("csrc/cpu", ".h", ".cpp")
    assert violations(r"TensorView|#include\s+\"(ops|bindings)/", cpu, allowed=(), strip=True) == []


def test_triton_only_in_kernels():
    assert violations(r"\btl\.[a-z]|import triton", sources("python", ".py"), allowed=()) == []


def test_torch_library_only_in_ops():
    python = [*sources("python", ".py"), *sources("kernels", ".py")]
    assert violations(r"\btorch\.library\b", python, allowed=("python/lamina/ops/",)) == []


def test_environment_is_read_in_one_place():
    assert (
        violations(r"\bos\.environ\b|\bgetenv\b", sources("python", ".py"), allowed=("python/lamina/_backends.py",))
        == []
    )
    assert violations(r"\bgetenv\b|\b__get_cpuid", sources("csrc", ".cpp", ".h"), allowed=("csrc/cpu/isa.cpp",)) == []


def test_tolerances_are_in_one_file():
    """Of ops. What models and training come to is judged where they are tested."""
    tests = [*sources("tests/ops", ".py"), *(ROOT / "tests" / f"test_every_{what}.py" for what in ("op", "isa"))]
    assert violations(r"\b[ar]tol\s*=|allclose\(", tests, allowed=()) == []


def test_no_pickle():
    """A checkpoint must not be able to run code."""
    python = sources("python", ".py")
    assert violations(r"import pickle|pickle\.load|torch\.load\(|torch\.save\(", python, allowed=()) == []


def repository_files() -> list[Path]:
    """Tracked files, and those that are about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the list of files comes from git")
def test_no_file_names_a_home_directory():
    files = repository_files()
    assert len(files) > 50
    # In two pieces, or this file would name one.
    homes = [f"/{name}/".encode() for name in ("home", "root", "Users")]
    named = [path.relative_to(ROOT).as_posix() for path in files if any(home in path.read_bytes() for home in homes)]
    assert named == []


# -- the compiled module and its stub


def test_stub_lists_what_the_module_has():
    stub = ast.parse((PACKAGE / "_C.pyi").read_text("utf-8"))
    functions = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    values = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    there = {name for name in dir(_C) if not name.startswith("_")}
    # What only a build with CUDA has.
    on_cuda = {name for name in functions if name.endswith("_cuda")} | {"cuda_devices"}
    expected = there if _C.with_cuda else there | on_cuda
    assert functions | values == expected
    assert all(callable(getattr(_C, name)) for name in functions & there)
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)} - {"__init__"}
            assert methods == {name for name in dir(getattr(_C, node.name)) if not name.startswith("_")}, node.name


def test_stub_has_the_arguments_of_the_module():
    """Counted in the signature that pybind11 writes into the docstring."""
    stub = ast.parse((PACKAGE / "_C.pyi").read_text("utf-8"))
    for node in stub.body:
        if isinstance(node, ast.FunctionDef) and hasattr(_C, node.name):
            signature = getattr(_C, node.name).__doc__.splitlines()[0]
            inside = re.fullmatch(rf"{node.name}\((.*)\) -> .*", signature)[1]
            # A nested comma, as in "Optional[a, b]", does not separate arguments.
            count = len(re.sub(r"\[[^\]]*\]", "", inside).split(", ")) if inside else 0
            assert len(node.args.args) == count, f"{node.name}: {signature}"


# -- importing lamina


def test_subprocess_import_is_lean():
    """No optional dependency is imported, and CUDA is not initialised."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import lamina\n"
        "heavy = {'transformers', 'matplotlib', 'sklearn', 'triton', 'jinja2', 'mlxtend', 'onnxruntime', 'scipy',"
        " 'torch_pruning'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)), torch.cuda.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] False"


def test_every_public_name_exists():
    import lamina

    for module in (lamina, lamina.ops, lamina.nn, lamina.prune, lamina.quant, lamina.integrations):
        for name in module.__all__:
            assert hasattr(module, name), f"{module.__name__}.{name}"
