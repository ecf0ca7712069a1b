"""What launchers ask of the device that their tensors lie on.

Without a GPU two answers are made up: a machine that interprets kernels says it is a Hopper GPU, and tensors of the
meta device, with which kernels are only compiled, say what they are compiled for.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
from torch import Tensor

# The multiprocessors of an H200, for tensors that are on no GPU.
_MULTIPROCESSORS = 132


@cache
def _of_gpu(index: int) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(index)
    return 10 * found.major + found.minor, found.multi_processor_count


def capability(tensor: Tensor) -> int:
    """The compute capability of the tensor's GPU: 80, 90, 100."""
    if tensor.is_cuda:
        return _of_gpu(tensor.device.index)[0]
    return triton.runtime.driver.active.get_current_target().arch if tensor.is_meta else 90


def multiprocessors(tensor: Tensor) -> int:
    return _of_gpu(tensor.device.index)[1] if tensor.is_cuda else _MULTIPROCESSORS


def overlaps(tensor: Tensor) -> bool:
    """Whether a kernel may be launched while the one before it runs: it then waits for what that one writes
    (`gdc_wait`), but not for its own launch. Hopper and later."""
    return (tensor.is_cuda or tensor.is_meta) and capability(tensor) >= 90


def by_descriptor(matrix: Tensor) -> bool:
    """Whether the tensor memory accelerator, which Hopper and later have, takes the rows of this matrix: they lie apart
    and begin at multiples of 16 bytes."""
    rows, columns = matrix.shape
    return (
        rows > 0
        and columns > 0
        and matrix.stride(1) == 1
        and matrix.stride(0) >= columns
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
        and capability(matrix) >= 90
    )


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one, to which Triton launches."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def check_same_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Refuses operands that are not where x is: a kernel would read a wrong address."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{op}: {name} is on {other.device}, but x is on {x.device}")
