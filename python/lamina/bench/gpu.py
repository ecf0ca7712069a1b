"""The GPU that a measurement belongs to: what it is, and how fast it can possibly be, measured in the same run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from lamina.stopwatch import OnGPU

# Where GPU workloads make their tensors; the tests, which have no GPU, put "cpu" here.
DEVICE = "cuda"
# Cycles, about five milliseconds of them, in which the host queues the launches of a sample.
AHEAD = 10_000_000
# Data that fills more of the L2 cache than this does not stay in it.
_FILL = 0.75
_SIZE = 8192
_COPY_BYTES = 2 << 30
_CALLS = 10
_REPEATS = 5


@dataclass(frozen=True)
class Gpu:
    """One GPU and what was measured on it.

    `capability`: "9.0". `peaks`: precision -> operations a second of a matrix product of random values by torch.
    `bandwidth`: bytes a second of a copy within its memory, read and written ones together.
    """

    name: str
    memory: int
    multiprocessors: int
    capability: str
    l2: int
    peaks: Mapping[str, float]
    bandwidth: float

    def level(self, count: int) -> str:
        """The level that so many bytes stay in when calls go through them again and again."""
        return "L2" if count <= _FILL * self.l2 else "HBM"


def stopwatch() -> OnGPU:
    """Times kernels, as they run one after the other with no host to wait for."""
    return OnGPU(ahead=AHEAD)


def architecture() -> str:
    """What kernels are compiled for here. Example: "sm_90"."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def versions() -> dict[str, str]:
    """Of what stands between the GPU and torch."""
    found = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    try:
        from importlib.metadata import version

        found["triton"] = version("triton")
    except ImportError:
        pass
    return found


def describe() -> Gpu:
    """Describe the current GPU and probe its peaks, in two or three seconds."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    with torch.inference_mode():
        peaks = {"bf16": _product_rate(torch.bfloat16), "int8": _product_rate(torch.int8)}
        source = _random(torch.int8, _COPY_BYTES)
        target = torch.empty_like(source)
        bandwidth = 2 * _COPY_BYTES / _best(lambda: target.copy_(source))
    return Gpu(
        name=properties.name,
        memory=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
        capability=f"{properties.major}.{properties.minor}",
        l2=properties.L2_cache_size,
        peaks=peaks,
        bandwidth=bandwidth,
    )


def combine(before: Gpu | None, after: Gpu | None) -> Gpu | None:
    """The higher peaks of two descriptions of one GPU."""
    if before is None or after is None:
        return before or after
    peaks = {name: max(rate, after.peaks[name]) for name, rate in before.peaks.items()}
    return replace(before, peaks=peaks, bandwidth=max(before.bandwidth, after.bandwidth))


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype is torch.int8:
        return torch.randint(-127, 128, shape, device="cuda", dtype=dtype)
    return torch.randn(shape, device="cuda", dtype=dtype)


def _product_rate(dtype: torch.dtype) -> float:
    """Operations a second of torch's product of two square matrices."""
    a, b = _random(dtype, _SIZE, _SIZE), _random(dtype, _SIZE, _SIZE)
    # The second int8 operand lies as a linear layer's weight: the library has no fast product of the other kind.
    product = (lambda: torch._int_mm(a, b.t())) if dtype is torch.int8 else (lambda: a @ b)
    return 2 * _SIZE**3 / _best(product)


def _best(call: Callable[[], object]) -> float:
    """The least seconds of a call, in samples of several."""
    timed = stopwatch()
    timed(call, _CALLS)
    return min(timed(call, _CALLS) for _ in range(_REPEATS))
