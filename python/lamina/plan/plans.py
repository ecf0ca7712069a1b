"""The plans of one graph: one for each form of its inputs.

The first form gets its plan at once: the graph was compiled for it a moment ago. Others may come once and never again,
as the lengths of texts do, and recording and timing a plan takes as long as some runs: a form gets one when it comes
for the third time. After a few plans that were all faster, or none, the next ones are not timed any more.
"""

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_unflatten

from lamina import _C
from lamina.compile.choose import best_times
from lamina.plan.fusion import fuse_chains
from lamina.plan.program import Program, picker
from lamina.plan.record import Refused, record

_log = logging.getLogger(__name__)

# Forms of inputs whose plans are kept; the one not used for longest goes first.
_MOST = 8
# A plan is timed against the graph's own calls for this long.
_SECONDS = 0.03
# So often a later form runs the graph's own calls first; so many forms are counted.
_CALLS_BEFORE = 2
_MOST_COUNTED = 256
# So many plans in a row decide for those that come.
_DECISIVE = 4


@dataclass
class Specialized:
    """What became of one form of inputs: a program, or the reason why there is none."""

    guard: Any
    program: Program | None
    reason: str


class Plans:
    """Runs a graph by the plan for its inputs' form; `run` gives None where there is none.

    graph: over the functions that implement lamina's ops; static: positions of the inputs that are the model's own and
    stay, until `clear`; measure: whether a plan must be faster than `graph` to be used. Safe to call from several
    threads at once.
    """

    def __init__(self, graph: fx.GraphModule, static: Sequence[int], count: int, measure: bool) -> None:
        self._graph, self._static, self._measure = graph, frozenset(static), measure
        varying = [i for i in range(count) if i not in self._static]
        self._varying = picker(varying)
        self._pool = _C.ArenaPool()
        self._lock = threading.Lock()
        self.entries: list[Specialized] = []
        self._calls: dict[tuple, int] = {}
        self._faster: list[bool] = []

    def run(self, inputs: tuple) -> Any:
        given = self._varying(inputs)
        entries = self.entries
        for i, entry in enumerate(entries):
            if entry.guard.fits(given):
                if i:
                    self.entries = [entry, *entries[:i], *entries[i + 1 :]]
                return None if entry.program is None else _result(entry.program, inputs)
        with self._lock:
            if self._measure and self._faster and not self._came_often(given):
                return None
            entry = self._decided(inputs)
            self.entries = [entry, *self.entries][:_MOST]
        return None if entry.program is None else _result(entry.program, inputs)

    def _came_often(self, given: tuple) -> bool:
        form = tuple(v if isinstance(v, int) else (v.dtype, v.shape, v.stride()) for v in given)
        if len(self._calls) >= _MOST_COUNTED and form not in self._calls:
            self._calls.clear()
        self._calls[form] = self._calls.get(form, 0) + 1
        return self._calls[form] > _CALLS_BEFORE

    def _decided(self, inputs: tuple) -> Specialized:
        """A plan for inputs of this form if that is faster, or expected to be."""
        last = self._faster[-_DECISIVE:]
        sure = len(last) == _DECISIVE and len(set(last)) == 1
        if sure and not last[0]:
            return Specialized(_C.Guard(self._varying(inputs)), None, "plans for other inputs were not faster")
        entry = self.specialize(inputs, self._measure and not sure)
        self._faster.append(entry.program is not None)
        return entry

    def program_for(self, inputs: tuple) -> Program | None:
        """The program that inputs of this form run, if they came before."""
        given = self._varying(inputs)
        return next((entry.program for entry in self.entries if entry.guard.fits(given)), None)

    def clear(self) -> None:
        self.entries = []

    def specialize(self, inputs: tuple, measure: bool) -> Specialized:
        """A plan for inputs of this form, whether or not it is kept."""
        guard = _C.Guard(self._varying(inputs))
        try:
            with torch.inference_mode(False), torch.no_grad():
                recording = record(self._graph, inputs, self._static)
                fuse_chains(recording)
                program = Program(recording, self._pool)
                if measure and not _is_faster(program, self._graph.forward, inputs):
                    return Specialized(guard, None, "the calls one by one are as fast")
        except Refused as refusal:
            _log.info("no plan: %s", refusal)
            return Specialized(guard, None, str(refusal))
        except Exception as failure:  # a graph that is misread is no reason to stop somebody's model
            reason = f"recording it failed: {type(failure).__name__}: {failure}"
            warnings.warn(f"lamina: {reason}; the graph runs without a plan", stacklevel=2)
            _log.info("recording failed", exc_info=True)
            return Specialized(guard, None, reason)
        return Specialized(guard, program, "")


def _result(program: Program, inputs: tuple) -> Any:
    leaves = program.run(program.take(inputs))
    recording = program.recording
    if recording.flat:
        return leaves
    for i, plain in enumerate(recording.plain):
        if recording.outputs[i] is None:
            leaves[i] = plain
    return tree_unflatten(leaves, recording.structure)


def _is_faster(program: Program, direct: Callable[..., Any], inputs: tuple) -> bool:
    given = program.take(inputs)
    best = best_times({"plan": lambda: program.run(given), "calls": lambda: direct(*inputs)}, _SECONDS)
    return best["plan"] <= best["calls"]
