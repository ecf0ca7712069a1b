"""rms_norm: root mean square norm of a sum, in one pass over memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina import _C
from lamina.ops.layer_norm import (
    NormCodes,
    as_rows,
    check_return_sum,
    launch_with_codes,
    new_norm_codes,
    new_result,
    runs_here,
    same_shape,
)
from lamina.ops.library import define

# What torch takes for eps=None: it computes in float32.
_DEFAULT_EPS = torch.finfo(torch.float32).eps


def _cpu(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    out = new_result(input, residual)
    _C.rms_norm(input, normalized_shape, weight, _DEFAULT_EPS if eps is None else eps, residual, out, None)
    return out


def _cuda(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    from lamina.kernels.rms_norm import rms_norm as launch

    rows, weight, _, added = as_rows("rms_norm", input, normalized_shape, weight, None, residual)
    out = new_result(input, residual)
    launch(rows, weight, _DEFAULT_EPS if eps is None else eps, added, out.view(rows.shape))
    return out


def _fake(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    return new_result(input, residual)


def _sum_cpu(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None, residual: Tensor
) -> tuple[Tensor, Tensor]:
    out, total = new_result(input, residual), new_result(input, residual)
    _C.rms_norm(input, normalized_shape, weight, _DEFAULT_EPS if eps is None else eps, residual, out, total)
    return out, total


def _sum_cuda(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None, residual: Tensor
) -> tuple[Tensor, Tensor]:
    from lamina.kernels.rms_norm import rms_norm as launch

    rows, weight, _, added = as_rows("rms_norm", input, normalized_shape, weight, None, residual)
    out, total = new_result(input, residual), new_result(input, residual)
    eps = _DEFAULT_EPS if eps is None else eps
    launch(rows, weight, eps, added, out.view(rows.shape), total.view(rows.shape))
    return out, total


def _sum_fake(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None, residual: Tensor
) -> tuple[Tensor, Tensor]:
    return new_result(input, residual), new_result(input, residual)


_op = define(
    "rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, Tensor? residual=None) "
    "-> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)
_with_sum = define(
    "rms_norm.with_sum(Tensor input, SymInt[] normalized_shape, Tensor? weight, float? eps, Tensor residual) "
    "-> (Tensor norm, Tensor sum)",
    cpu=_sum_cpu,
    fake=_sum_fake,
    cuda=_sum_cuda,
)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`torch.nn.functional.rms_norm` of `input + residual`: v / sqrt(mean(v^2) + eps) * weight.

    The sum is added, measured and scaled while a row is in cache, in float32 whatever the storage; bfloat16 is rounded
    once, at the end (Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019). A row that holds NaN gives NaN.
    The same inputs give the same bits on every run and for every number of threads.

    What the kernels do not cover goes to torch's own op: calls that need gradients, dtypes other than float32 and
    bfloat16 (on a GPU also float16), other devices than the CPU and NVIDIA GPUs.

    Args:
        input: [..., *normalized_shape] float32 or bfloat16, any strides.
        normalized_shape: the last dimensions, over which a row reaches.
        weight: normalized_shape, float32 or bfloat16; ones by default.
        eps: added to the mean square; the machine epsilon of float32 by default, as in torch.
        residual: broadcasts with input; added before the norm.
        return_sum: return (norm, input + residual), as models need that normalise before a layer and not after it.

    Returns what torch returns: contiguous, of the shape and dtype of input + residual. Raises ValueError when shapes or
    dtypes do not fit.

    >>> y, hidden = lamina.ops.rms_norm(attended, (4096,), norm.weight, 1e-6, residual=hidden, return_sum=True)
    """
    if return_sum:
        check_return_sum("rms_norm", residual)
    if runs_here(input, residual, weight):
        if residual is not None:
            input, residual = same_shape(input, residual)
            if return_sum:
                return _with_sum(input, normalized_shape, weight, eps, residual)
        return _op(input, normalized_shape, weight, eps, residual)
    total = input if residual is None else input + residual
    norm = F.rms_norm(total, normalized_shape, weight, eps)
    return (norm, total) if return_sum else norm


def _codes_cpu(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = new_norm_codes(input, normalized_shape, residual)
    norm, total, codes, scales = results
    eps = _DEFAULT_EPS if eps is None else eps
    _C.rms_norm(input, normalized_shape, weight, eps, residual, norm, None if residual is None else total)
    shape = (scales.numel(), math.prod(normalized_shape))
    _C.quantize_rows(norm.view(shape), None, codes.view(shape), scales.view(-1))
    return results


def _codes_cuda(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lamina.kernels.rms_norm import rms_norm as launch

    rows, weight, _, added = as_rows("rms_norm", input, normalized_shape, weight, None, residual)
    results = new_norm_codes(input, normalized_shape, residual)
    launch_with_codes(launch, rows, results, weight, _DEFAULT_EPS if eps is None else eps, added)
    return results


def _codes_fake(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return new_norm_codes(input, normalized_shape, residual)


_with_codes = define(
    "rms_norm.with_codes(Tensor input, SymInt[] normalized_shape, Tensor? weight, float? eps, Tensor? residual) "
    "-> (Tensor norm, Tensor sum, Tensor codes, Tensor scales)",
    cpu=_codes_cpu,
    fake=_codes_fake,
    cuda=_codes_cuda,
)


def rms_norm_codes(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
) -> NormCodes:
    """`rms_norm` with its sum, and the codes that the int8 layers behind it take: on a GPU one pass over memory.

    Args as in `rms_norm`. Returns NormCodes; without a residual its sum is empty. No gradient. Raises ValueError when
    shapes or dtypes do not fit.

    >>> norm, hidden, codes, scales = lamina.ops.rms_norm_codes(attended, (4096,), norm.weight, residual=hidden)
    """
    if residual is not None:
        input, residual = same_shape(input, residual)
    return NormCodes(*_with_codes(input, normalized_shape, weight, eps, residual))
