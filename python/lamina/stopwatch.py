"""How long a call takes, on a CPU or on a GPU: the one clock, and the one loop, of all who choose between candidates.

Work on a GPU is asynchronous, so that a host's clock would time the launches. There a call is timed by events in the
stream, which see what its caller sees: launches that the GPU waits for as well as kernels that the host waits for.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# (call, how many times) -> seconds that one of them took.
Stopwatch = Callable[[Callable[[], Any], int], float]


def on_cpu(call: Callable[[], Any], calls: int = 1, clock: Callable[[], float] | None = None) -> float:
    """Seconds a call, by the host's clock or another; the work must be done when it returns."""
    clock = clock or time.perf_counter
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


class OnGPU:
    """Seconds a call, by events in the current stream of one GPU; the queue is empty before and after.

    ahead: cycles that the GPU is kept busy for at first, so that all launches are queued when the first kernel begins:
    then it is the kernels that are timed, as in a CUDA graph, and not the host.
    """

    def __init__(self, device: torch.device | str = "cuda", ahead: int = 0) -> None:
        self.device, self.ahead = torch.device(device), ahead

    def __call__(self, call: Callable[[], Any], calls: int = 1) -> float:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if self.ahead:
                torch.cuda._sleep(self.ahead)
            start.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls


def device_of(tensors: Iterable[Tensor]) -> torch.device:
    """The GPU that tensors are on, or the CPU where none is. Raises ValueError for more than one GPU."""
    found = {t.device for t in tensors if t.is_cuda}
    if len(found) > 1:
        names = " and ".join(sorted(map(str, found)))
        raise ValueError(f"the tensors are on {names}, but only work on one GPU can be timed")
    return found.pop() if found else torch.device("cpu")


def stopwatch_of(device: torch.device) -> Stopwatch:
    """What times calls that work on a device."""
    return OnGPU(device) if device.type == "cuda" else on_cpu


def in_turns(
    candidates: Mapping[str, Callable[[], Any]], seconds: float, min_rounds: int, stopwatch: Stopwatch = on_cpu
) -> dict[str, list[float]]:
    """The times of each candidate, called in turn for so many seconds or rounds, after one call for nothing.

    What disturbs a machine hits all of them, and only adds.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < min_rounds or time.perf_counter() < end:
        for name, run in candidates.items():
            times[name].append(stopwatch(run, 1))
        rounds += 1
    return times
