"""Norms, softmax, sums."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lamina import ops
from lamina.plan.lowering.table import Live, aten, is_float, lowers, with_unused


@lowers(aten.native_layer_norm.default)
def _layer_norm(
    live: Live, input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    if not is_float(input, weight, bias):
        return NotImplemented
    return with_unused(ops.layer_norm(input, shape, weight, bias, eps), 2)


@lowers(aten.native_group_norm.default)
def _group_norm(
    live: Live,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    images: int,
    channels: int,
    pixels: int,
    groups: int,
    eps: float,
) -> Any:
    if not is_float(input, weight, bias):
        return NotImplemented
    return with_unused(ops.group_norm(input, groups, weight, bias, eps), 2)


@lowers(aten.native_batch_norm.default)
def _batch_norm(
    live: Live,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    parameters = [t for t in (weight, bias, mean, variance) if t is not None]
    if training or mean is None or variance is None or not is_float(input, *parameters) or any(map(live, parameters)):
        return NotImplemented
    factor = (variance.float() + eps).rsqrt()
    if weight is not None:
        factor = factor * weight
    offset = -mean * factor if bias is None else bias - mean * factor
    shape = (1, -1, *[1] * (input.ndim - 2))
    inputs = [input, factor.reshape(shape), offset.reshape(shape)]
    y = ops.elementwise(inputs, [("mul", 0, 1), ("add", 3, 2)], dtype=input.dtype)
    return with_unused(y, 2)


@lowers(aten._native_batch_norm_legit_no_training.default)
def _batch_norm_without_training(
    live: Live,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> Any:
    return _batch_norm(live, input, weight, bias, mean, variance, False, momentum, eps)


@lowers(aten._softmax.default)
def _softmax(live: Live, input: Tensor, dim: int, half_to_float: bool) -> Any:
    return NotImplemented if half_to_float or not is_float(input) else ops.softmax(input, dim)


@lowers(aten._log_softmax.default)
def _log_softmax(live: Live, input: Tensor, dim: int, half_to_float: bool) -> Any:
    if half_to_float or input.dtype is not torch.float32 or not input.ndim or not input.numel():
        return NotImplemented
    centred = ops.elementwise([input, ops.reduce(input, dim, "max", True)], [("sub", 0, 1)])
    total = ops.reduce(ops.elementwise([centred], [("exp", 0)]), dim, "sum", True)
    return ops.elementwise([centred, total], [("log", 1), ("sub", 0, 2)])


@lowers(aten.mean.dim)
def _mean(live: Live, input: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    return _reduce(input, dim, keepdim, "mean", dtype)


@lowers(aten.sum.dim_IntList)
def _sum(live: Live, input: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    return _reduce(input, dim, keepdim, "sum", dtype)


@lowers(aten.mean.default)
def _mean_of_all(live: Live, input: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    return _reduce(input, None, False, "mean", dtype)


@lowers(aten.sum.default)
def _sum_of_all(live: Live, input: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    return _reduce(input, None, False, "sum", dtype)


@lowers(aten.amax.default)
def _amax(live: Live, input: Tensor, dim: Any = (), keepdim: bool = False) -> Any:
    return _reduce(input, dim, keepdim, "max", None)


@lowers(aten.amin.default)
def _amin(live: Live, input: Tensor, dim: Any = (), keepdim: bool = False) -> Any:
    return _reduce(input, dim, keepdim, "min", None)


def _reduce(input: Tensor, dim: Any, keepdim: bool, how: str, dtype: torch.dtype | None) -> Any:
    if not is_float(input) or dtype not in (None, input.dtype):
        return NotImplemented
    return ops.reduce(input, dim, how, keepdim)
