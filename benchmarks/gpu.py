"""`make gpu`: everything that a GPU can tell about lamina, in one command, without a network and within a time.

    python benchmarks/gpu.py --out gpu-report --seconds 480

Builds lamina with CUDA, for this GPU alone, beside the packages that this Python has; runs tests/gpu on the GPU, some
of them under compute-sanitizer; times the GPU suites and tile sizes; and writes OUT/results.json, OUT/index.html and
OUT/tuning.md. Each part has a budget and a process of its own: one that fails, hangs or takes CUDA down with it loses
nothing of the others, and is named. The exit status is 1 if a part failed or an answer was wrong, and 0 otherwise;
what was left out for want of time and promises that were missed are printed.

The int8 product in CUDA C++ is built where CUTLASS is at hand: LAMINA_CUTLASS_DIR names its folder or a wheel of
nvidia-cutlass, or such a wheel lies in the folder .whl. What --only names is added to an earlier run in the same OUT:

    python benchmarks/gpu.py --only sanitizer tuning compiled --seconds 150

Only the standard library is used: lamina itself is what the first part builds.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu"
# Seconds that are kept for what comes behind the last part: the page.
PAGE_SECONDS = 15.0
# Of a part's budget, when nothing new is begun in it any more; the rest is for what runs then.
BEGIN = 0.75
# Tests under each tool of compute-sanitizer. Without what needs no GPU, brings no kernel of ours or captures a graph,
# which torch cannot where it does not keep memory.
SANITIZED = {"memcheck --report-api-errors no": 8, "synccheck": 3, "racecheck": 3}
UNSANITIZED = "subprocess", "composite", "without_cuda", "2_31", "epilogue", "graph", "refus", "waits"
# What one test may take; the compiler of one of them alone works for half a minute.
TEST_SECONDS = 90
OPS = {
    "gpu_attention": 50.0,
    "gpu_int8_linear": 25.0,
    "gpu_attention_decode": 20.0,
    "gpu_model": 40.0,
    "gpu_attention_backward": 20.0,
    "gpu_weight_only_linear": 30.0,
    "gpu_sparse_linear": 15.0,
    "gpu_attention_varlen": 15.0,
    "gpu_int8_conv2d": 15.0,
}
# Workloads with contenders that compile for half a minute, which come last.
COMPILED = (
    "gpu_model/*-compiled",
    "gpu_attention/llama_8k/*",
    "gpu_int8_linear/square/4096*",
    "gpu_attention/windowed/*",
)


@dataclass(frozen=True)
class Part:
    """One step: commands that run one after the other, in so many seconds together.

    needed: whether nothing behind it can run without it. partial: whether running out of time is no failure of it,
    unless its log has a line that `wrong`, a regular expression, finds.
    """

    name: str
    budget: float
    commands: Callable[[float], Sequence[Sequence[str]]]
    needed: bool = False
    partial: bool = False
    wrong: str = ""


@dataclass
class Outcome:
    """outcome: "done", "left out" (no time, or nothing to run it with) or "failed"; note: why, in a line."""

    name: str
    outcome: str
    seconds: float
    budget: float
    note: str = ""


@dataclass
class Job:
    """The parts one after the other, and what became of them. goes_on: adds to what an earlier run left in `out`."""

    out: Path
    seconds: float
    clock: Callable[[], float] = time.monotonic
    outcomes: list[Outcome] = field(default_factory=list)
    goes_on: bool = False

    def __post_init__(self) -> None:
        self.end = self.clock() + self.seconds
        self.logs = self.out / "logs"
        listed = self.out / "parts" / "parts.json"
        self.earlier = json.loads(listed.read_text("utf-8")) if self.goes_on and listed.is_file() else []
        if not self.goes_on:
            shutil.rmtree(self.out / "parts", ignore_errors=True)  # of an earlier run
        (self.out / "parts").mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)

    def run(self, parts: Sequence[Part]) -> None:
        missing = ""
        for part in parts:
            left = self.end - PAGE_SECONDS - self.clock()
            if missing:
                self._note(Outcome(part.name, "left out", 0.0, part.budget, f"without {missing} it cannot run"))
            elif left < min(10.0, part.budget):
                self._note(Outcome(part.name, "left out", 0.0, part.budget, "no time was left"))
            else:
                self._note(self._one(part, min(part.budget, left)))
                if part.needed and self.outcomes[-1].outcome != "done":
                    missing = part.name

    def _one(self, part: Part, budget: float) -> Outcome:
        start = self.clock()
        print(f"== {part.name} ({budget:.0f} s)", flush=True)
        outcome = Outcome(part.name, "done", 0.0, budget)
        log = self.logs / f"{part.name.replace(' ', '-')}.log"
        try:
            with log.open("w") as stream:
                for command in part.commands(budget):
                    left = budget - (self.clock() - start)
                    status = call(command, max(1.0, left), stream)
                    if status is None:
                        stream.flush()
                        found = [line for line in tail(log, 10**6).splitlines() if re.search(part.wrong or "$^", line)]
                        late = part.partial and not found
                        outcome.outcome = "left out" if late else "failed"
                        outcome.note = f"stopped after {budget:.0f} s"
                        outcome.note += ", with nothing wrong so far" if late else "".join(f"; {x}" for x in found[:1])
                        break
                    if status:
                        outcome.outcome, outcome.note = "failed", f"exit status {status}; see logs/{log.name}"
                        break
        except Unavailable as reason:
            outcome.outcome, outcome.note = "failed" if part.needed else "left out", str(reason)
        except Exception as failure:  # a part must not take the others with it
            outcome.outcome, outcome.note = "failed", f"{type(failure).__name__}: {failure}"
        outcome.seconds = self.clock() - start
        if log.is_file():
            print(tail(log, 25 if outcome.outcome == "failed" else 6), flush=True)
        return outcome

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        why = f" ({outcome.note})" if outcome.note else ""
        print(f"-- {outcome.name}: {outcome.outcome} in {outcome.seconds:.0f} s{why}", flush=True)
        names = {each.name for each in self.outcomes}
        rows = [row for row in self.earlier if row["name"] not in names] + [asdict(each) for each in self.outcomes]
        (self.out / "parts" / "parts.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


class Unavailable(RuntimeError):
    """A part that cannot run here; the message is the reason."""


def call(command: Sequence[str], seconds: float, stream: object) -> int | None:
    """The exit status, or None when it took too long; whatever it started is gone then too."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def environment() -> Mapping[str, str]:
    """The caller's, with what was built first on the path and caches that a second run finds again."""
    path = [str(WORK / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "TRITON_CACHE_DIR": str(WORK / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"),
        "OMP_WAIT_POLICY": "passive",
    }


def tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-lines:])


def asked(code: str) -> str:
    """What a line of Python prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=environment()
    )
    if done.returncode:
        raise Unavailable((done.stderr.strip().splitlines() or ["no answer"])[-1])
    return done.stdout.strip()


def architecture(capability: str) -> str:
    """What CMake calls the architecture of a GPU, by its compute capability: "9.0" -> "90a-real"."""
    major, _, minor = capability.partition(".")
    # The instructions of Hopper's tensor cores belong to an architecture of their own.
    return f"{major}{minor}{'a' if major == '9' else ''}-real"


def nvcc() -> str | None:
    return shutil.which("nvcc") or next(map(str, Path("/usr/local/cuda/bin").glob("nvcc")), None)


def cutlass() -> str | None:
    """What LAMINA_CUTLASS_DIR names, or a wheel of nvidia-cutlass in the folder .whl of the tree."""
    named = os.environ.get("LAMINA_CUTLASS_DIR")
    wheels = sorted((ROOT / ".whl").glob("nvidia_cutlass-*.whl"))
    return str(Path(named).resolve()) if named else next(map(str, wheels), None)


def build(budget: float) -> Sequence[Sequence[str]]:
    capability = asked("import torch; print(*torch.cuda.get_device_capability(), sep='.')")
    compiler = nvcc()
    options = [
        f"build-dir={WORK}",
        f"cmake.define.LAMINA_CUDA={'ON' if compiler else 'OFF'}",
        *([f"cmake.define.CMAKE_CUDA_COMPILER={compiler}"] if compiler else []),
        f"cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture(capability)}",
        *([f"cmake.define.LAMINA_CUTLASS_DIR={headers}"] if (headers := cutlass()) else []),
    ]
    # A folder and not a virtual environment: one that is made inside another does not see the packages of that.
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    install += ["--upgrade", "--target", str(WORK / "site")]
    for option in options:
        install += ["-C", option]
    return [[*install, "."], [sys.executable, "-c", "import lamina; print(lamina.info())"]]


def tests(budget: float) -> Sequence[Sequence[str]]:
    # What compiles for other architectures, or runs on the host in a process of its own, needs no GPU.
    options = ["--ignore=tests/gpu/test_gpu_compile.py", "-k", "not subprocess", "-p", "no:cacheprovider"]
    options += ["-v", "-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    # The workers have a core each, which compiles kernels nearly all of the time: about a thousand of them.
    return [["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "pytest", "tests/gpu", *options]]


def sanitizer(budget: float) -> Sequence[Sequence[str]]:
    """Its tools on a few tests of what is written in CUDA C++: Triton's kernels are the compiler's own business."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        raise Unavailable("compute-sanitizer is not installed")
    if asked("from lamina import _C; print(_C.with_cuda)") != "True":
        raise Unavailable("there are no kernels in CUDA C++ in this build")
    wanted = "attention_decode", "int8_gemm"
    files = [str(path) for name in wanted if (path := ROOT / f"tests/gpu/test_gpu_{name}.py").is_file()]
    wanted_tests = " and ".join(f"not {word}" for word in UNSANITIZED)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    collect = [*pytest, "--collect-only", "-k", wanted_tests, *files]
    listed = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=False, env=environment())
    ids = [line for line in listed.stdout.splitlines() if "::" in line]
    if not ids:
        raise Unavailable("no tests of them were found")
    # Each tensor in memory of its own: within a block that torch keeps, nothing is out of bounds.
    alone = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--error-exitcode", "9", "--tool"]
    return [
        [*alone, *check.split(), *pytest, *ids[:: max(1, len(ids) // count)][:count]]
        for check, count in SANITIZED.items()
    ]


def bench(op: str, out: Path) -> Callable[[float], Sequence[Sequence[str]]]:
    def commands(budget: float) -> Sequence[Sequence[str]]:
        target = out / "parts" / f"bench-{op}.json"
        options = ["--device", "cuda", "--quick", "--filter", f"{op}/", "--seconds", str(BEGIN * budget)]
        return [[sys.executable, "-m", "lamina.cli", "bench", *options, "--json", str(target)]]

    return commands


def compiled(out: Path) -> Callable[[float], Sequence[Sequence[str]]]:
    """Measured again, with the contenders that a quick run leaves out."""

    def commands(budget: float) -> Sequence[Sequence[str]]:
        bench = [sys.executable, "-m", "lamina.cli", "bench", "--device", "cuda"]
        return [
            [*bench, "--filter", pattern, "--json", str(out / "parts" / f"bench-compiled-{i}.json")]
            for i, pattern in enumerate(COMPILED)
        ]

    return commands


def tuning(out: Path) -> Callable[[float], Sequence[Sequence[str]]]:
    def commands(budget: float) -> Sequence[Sequence[str]]:
        return [[sys.executable, "-m", "lamina.bench.tune", str(out), "--seconds", str(BEGIN * budget)]]

    return commands


def parts_of(out: Path) -> list[Part]:
    """In the order of their worth: what is left out is at the end."""
    return [
        Part("build", 200.0, build, needed=True),
        Part("tests", 180.0, tests, partial=True, wrong=r"\b(FAILED|ERROR) tests/"),
        *(Part(f"bench {op}", seconds, bench(op, out), partial=True) for op, seconds in OPS.items()),
        Part("sanitizer", 75.0, sanitizer, partial=True, wrong=r"^=+ (Invalid|Race|ERROR SUMMARY: [1-9])"),
        Part("tuning", 120.0, tuning(out), partial=True),
        Part("compiled", 150.0, compiled(out), partial=True),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-report")
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument(
        "--only", nargs="*", default=[], help="the first words of the parts to run, added to an earlier run in --out"
    )
    given = parser.parse_args()
    out = given.out.resolve()
    job = Job(out, given.seconds, goes_on=bool(given.only))
    parts = [part for part in parts_of(out) if not given.only or part.name.split()[0] in given.only]
    job.run(parts)
    page = [sys.executable, "-m", "lamina.bench.reporting.gpu", str(out), "--targets", "benchmarks/targets.toml"]
    status = subprocess.run(page, cwd=ROOT, check=False, env=environment()).returncode
    for outcome in job.outcomes:
        if outcome.outcome != "done":
            print(f"{outcome.outcome}: {outcome.name}, {outcome.note}")
    if (out / "index.html").is_file():
        print(f"wrote {out / 'index.html'}")
    return 1 if status or any(outcome.outcome == "failed" for outcome in job.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
