"""embedding: rows of a table, picked by index."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina import _C
from lamina.ops.library import define

# Elements that are copied whatever they mean.
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
    | {torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64}
)


def _new_output(indices: Tensor, weight: Tensor) -> Tensor:
    return torch.empty((*indices.shape, weight.shape[-1]), dtype=weight.dtype, device=weight.device)


def _cpu(indices: Tensor, weight: Tensor) -> Tensor:
    out = _new_output(indices, weight)
    _C.embedding(indices, weight, out)
    return out


def _fake(indices: Tensor, weight: Tensor) -> Tensor:
    torch._check(weight.ndim == 2, lambda: f"embedding: weight has {weight.ndim} dimensions, but must be [V, D]")
    return _new_output(indices, weight)


_op = define("embedding(Tensor indices, Tensor weight) -> Tensor", cpu=_cpu, fake=_fake)


def embedding(indices: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.embedding`: rows of a table, picked by index.

    Rows are copied byte by byte; while one is, those to come are asked for from memory.

    Calls that need gradients, other devices and dtypes without a place here (complex numbers) go to torch.

    Args:
        indices: int32 or int64, any shape and strides.
        weight: [V, D] of any dtype, any strides.

    Returns [*indices.shape, D] of weight's dtype, contiguous. Raises ValueError for an index outside [0, V), where
    torch raises IndexError.

    >>> x = lamina.ops.embedding(tokens, table)
    """
    grad = torch.is_grad_enabled() and weight.requires_grad
    if not grad and weight.is_cpu and indices.is_cpu and weight.dtype in _DTYPES:
        return _op(indices, weight)
    return F.embedding(indices, weight)
