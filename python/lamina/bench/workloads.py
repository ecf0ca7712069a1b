"""The registry of workloads: everything that is ever timed, once.

Each file in `suite/` offers the workloads of one op through a function `workloads()`; a new file there is found by
itself. The shapes are read from `shapes/<op>.txt`, which are package data (not in the repository's benchmarks/ folder),
so that `lamina bench` times the same work from an installed wheel as from a checkout.
"""

import fnmatch
import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import torch

# Prepares a contender for given inputs (packs weights, builds modules) and returns the call that is timed.
Prepare = Callable[[Any], Callable[[], Any]]


@dataclass(frozen=True)
class Gate:
    """Whether a candidate's answer is right: its `error` against the truth, and the `limit` it must not pass."""

    ok: bool
    error: float | None
    limit: float | None
    message: str

    @classmethod
    def judge(cls, error: float, limit: float, what: str) -> "Gate":
        """Green when `error <= limit` (NaN is red). Example: `Gate.judge(1e-7, 1e-6, "relative error").ok`."""
        ok = error <= limit
        return cls(ok, error, limit, f"{what} {error:.1e} {'within' if ok else 'exceeds'} {limit:.1e}")


@dataclass(frozen=True)
class Workload:
    """One piece of work that can be timed.

    Attributes:
        id: `op/model/shape`, unique, e.g. `int8_linear/bert_base/128x768x3072`.
        op: the op's stem, the first part of the id.
        shape: the last part of the id, for people.
        dims: named sizes, e.g. `{"M": 128, "K": 768, "N": 3072}`; targets select by them.
        make_inputs: builds whatever `run`, `baselines` and `check` take; deterministic.
        run: prepares lamina's call.
        baselines: name -> prepares what it is compared with.
        slow: those of the baselines that take half a minute to prepare; quick runs leave them out.
        variants: name -> prepares another call of lamina's own, timed beside the candidate (as "lamina NAME") to say
            what an extra costs or another door gives; never counted as a rival that wins or loses.
        check: judges lamina's output for the same inputs.
        flops: inputs -> floating-point (or integer) operations, 2 per multiply-add.
        bytes: inputs -> bytes that must be read and written at least once.
        resident: inputs -> bytes that many calls one after the other go through, if that is more than `bytes`; they
            say which level of memory the data comes from.
        precision: inputs -> which measured peak applies: "float32", "bf16" or "int8".
        tags: words to filter by.
        requires: importable packages without which the workload is skipped.
        module: inputs -> (eager module, example inputs), for peers that convert whole modules; None if there is none.
        kernels: inputs -> whether any kernel of lamina's runs at all; a model may have no layer that was replaced.
        memory: inputs -> contender -> the most bytes that one call of it needs at once; None where nobody asks.
        device: "cpu", or "cuda" for work on a GPU, whose `make_inputs` makes tensors there.
    """

    id: str
    op: str
    shape: str
    dims: Mapping[str, int]
    make_inputs: Callable[[], Any]
    run: Prepare
    baselines: Mapping[str, Prepare]
    check: Callable[[Any, Any], Gate]
    flops: Callable[[Any], int]
    bytes: Callable[[Any], int]
    precision: Callable[[Any], str]
    resident: Callable[[Any], int] | None = None
    variants: Mapping[str, Prepare] = field(default_factory=dict)
    slow: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    requires: tuple[str, ...] = ()
    module: Callable[[Any], tuple[torch.nn.Module, tuple | dict]] | None = None
    kernels: Callable[[Any], bool] = lambda inputs: True
    memory: Callable[[Any], Mapping[str, int]] | None = None
    device: str = "cpu"

    def missing(self) -> str | None:
        """Why this workload can't run here, in one sentence, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "needs a GPU"
        absent = [name for name in self.requires if importlib.util.find_spec(name) is None]
        return f"needs {', '.join(absent)} (pip install lamina[models])" if absent else None


@functools.cache
def registry() -> Mapping[str, Workload]:
    """All workloads by id, in the order of the suite files and their shape files."""
    from lamina.bench import suite

    found: dict[str, Workload] = {}
    for info in sorted(pkgutil.iter_modules(suite.__path__), key=lambda info: info.name):
        for workload in importlib.import_module(f"{suite.__name__}.{info.name}").workloads():
            if workload.id in found:
                raise ValueError(f"two workloads are called {workload.id}")
            found[workload.id] = workload
    return found


def select(pattern: str | None = None, tags: Sequence[str] = (), device: str = "cpu") -> list[Workload]:
    """Workloads on `device` whose id contains `pattern` (matches it, when it has `*`, `?` or `[`), with all `tags`.

    Raises ValueError when nothing matches. Example: `select("attention/*causal*")`.
    """
    chosen = [
        workload
        for workload in registry().values()
        if workload.device == device
        and (pattern is None or matches(workload.id, pattern))
        and workload.tags.issuperset(tags)
    ]
    if not chosen:
        what = " ".join([*tags, "workload", *(["on a GPU"] if device == "cuda" else [])])
        raise ValueError(f"no {what} matches {pattern!r}; `lamina bench --list` shows all of them")
    return chosen


def matches(workload_id: str, pattern: str) -> bool:
    """Whether an id is meant by a pattern. Example: `matches("attention/gpt2/1x12", "gpt2")`."""
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(workload_id, pattern)
    return pattern in workload_id


def read_shapes(name: str, columns: int) -> Iterator[tuple[str, ...]]:
    """The rows of `shapes/<name>.txt`: words separated by blanks; `#` starts a comment."""
    path = resources.files("lamina.bench") / "shapes" / f"{name}.txt"
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        words = tuple(line.partition("#")[0].split())
        if not words:
            continue
        if len(words) != columns:
            raise ValueError(f"shapes/{name}.txt line {number} has {len(words)} columns, expected {columns}")
        yield words


def relative_error(output: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth; NaN when the output is not finite."""
    truth = truth.detach().double()
    return float((output.detach().double() - truth).norm() / truth.norm().clamp_min(1e-300))
