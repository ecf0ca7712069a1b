"""The table of lowerings and what they have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16)

Live = Callable[[Tensor], bool]
Lowering = Callable[..., Any]

LOWERINGS: dict[torch._ops.OpOverload, Lowering] = {}

# Functions of `_C` that write to an argument which is not blank.
MUTATING = {"attention_decode_append"}


def lowers(*overloads: torch._ops.OpOverload) -> Callable[[Lowering], Lowering]:
    def register(function: Lowering) -> Lowering:
        for overload in overloads:
            LOWERINGS[overload] = function
        return function

    return register


def is_channels_last(tensor: Tensor) -> bool:
    """Whether that is how it lies, and not the other layout as well."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def is_float(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype in FLOATS for t in tensors)


def with_unused(result: Tensor, others: int) -> tuple[Tensor, ...]:
    """A result in the place of a tuple whose other parts only a gradient would read."""
    return result, *(torch.empty(0) for _ in range(others))
