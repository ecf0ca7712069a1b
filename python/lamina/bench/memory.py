"""How much memory a call needs while it runs, as the operating system sees it."""

import ctypes
import statistics
import threading
from collections.abc import Callable
from pathlib import Path

import torch

_RUNS = 3
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes by which this process grows during a call: outputs, intermediate results, all kernels' scratch.

    The call runs once before, so that what stays (packed weights, compiled kernels, a plan's arena) is not counted;
    then in new threads, whose scratch memory is new too. The median of three. Raises OSError where /proc does not tell.

    >>> peak_bytes(lambda: model(x))
    """
    call()
    return int(statistics.median(_in_new_thread(call) for _ in range(_RUNS)))


def _in_new_thread(call: Callable[[], object]) -> int:
    grown: list[int | BaseException] = []
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run() -> None:
        try:
            # The number of threads and the mode are each thread's own.
            torch.set_num_threads(threads)
            with torch.inference_mode(inference):
                grown.append(_growth(call))
        except BaseException as error:  # for the thread that asked
            grown.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(grown[0], BaseException):
        raise grown[0]
    return grown[0]


def _growth(call: Callable[[], object]) -> int:
    # Pages that are free but still the process's would be used again without a trace.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text(_RESET_PEAK)
    before = _status("VmRSS")
    output = call()
    peak = _status("VmHWM")
    del output
    return max(0, peak - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
