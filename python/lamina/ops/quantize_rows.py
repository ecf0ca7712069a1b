"""quantize_rows: symmetric int8 codes of rows, so that layers which share an input quantize it once."""

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.library import define


def _cpu(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if x.ndim == 0:
        raise ValueError("quantize_rows: x is a scalar, but must have at least one dimension, [..., K]")
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
    # No reshape(-1, K): torch cannot tell what -1 means when K is 0.
    shape = (x.shape[:-1].numel(), x.shape[-1])
    _C.quantize_rows(x.reshape(shape), scale, codes.view(shape), scales.view(-1))
    return codes, scales


def _cuda(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from lamina.kernels.quantize_rows import quantize_rows as launch

    if x.ndim == 0:
        raise ValueError("quantize_rows: x is a scalar, but must have at least one dimension, [..., K]")
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    shape = (x.shape[:-1].numel(), x.shape[-1])
    launch(x.reshape(shape), scale, codes.view(shape), scales.view(-1))
    return codes, scales


def _fake(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    torch._check(x.ndim >= 1, lambda: "quantize_rows: x must have at least one dimension")
    known = x.dtype in (torch.float32, torch.bfloat16) or (x.dtype is torch.float16 and not x.is_cpu)
    torch._check(known, lambda: f"quantize_rows: x is {x.dtype}")
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


_op = define("quantize_rows(Tensor x, Tensor? scale=None) -> (Tensor, Tensor)", cpu=_cpu, fake=_fake, cuda=_cuda)


def quantize_rows(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes of the rows of `x` and what they mean: `x = codes * scales[..., None]` but for rounding.

    Symmetric: codes lie in [-127, 127], zero is 0. Without `scale` each row gets its own, max|row| / 127 (a row below
    1e-36 counts as zero: scale 0); with it, all rows share that one and larger values are clamped. Codes are
    round_half_even(x * (127 / max|row|)) or round_half_even(x * (1 / scale)), in float32, the same bits on every
    instruction set and on a GPU. A row that holds NaN or infinity gets codes 0 and scale NaN. No gradient.

    Args:
        x: [..., K] float32 or bfloat16, on a GPU also float16, any strides.
        scale: None, or a float32 scalar tensor [], finite and at least 1e-36 (on a GPU that is not checked).

    Returns (codes, scales): int8 [..., K] and float32 [...], contiguous. They go into `int8_linear` as `x` and
    `x_scale`. Raises ValueError when shapes or dtypes do not fit.

    >>> codes, scales = lamina.ops.quantize_rows(x)
    >>> q, k = (lamina.ops.int8_linear(codes, w, x_scale=scales) for w in (query_weight, key_weight))
    """
    return _op(x, scale)
