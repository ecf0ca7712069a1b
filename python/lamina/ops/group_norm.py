"""group_norm: group and instance norm with an activation, in the format the images come in."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina import _C
from lamina.ops.layer_norm import runs_here
from lamina.ops.library import define
from lamina.reference.int8_linear import ACTIVATIONS

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _new_output(x: Tensor) -> Tensor:
    form = _CHANNELS_LAST.get(x.ndim)
    if form is None or x.is_contiguous() or not x.is_contiguous(memory_format=form):
        form = torch.contiguous_format
    return torch.empty_like(x, memory_format=form)


def _cpu(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str) -> Tensor:
    out = _new_output(x)
    _C.group_norm(x, num_groups, weight, bias, eps, activation, out)
    return out


def _fake(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> Tensor:
    return _new_output(x)


_op = define(
    "group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, str activation) -> Tensor",
    cpu=_cpu,
    fake=_fake,
)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> Tensor:
    """`torch.nn.functional.group_norm`, then an activation, in one call.

    (x - mean) / sqrt(variance + eps) * weight + bias, with the mean and variance of each group of C / num_groups
    neighbouring channels of an image ("Group Normalization", Wu & He, 2018); num_groups = C is instance norm.
    Statistics are float32 in two passes, the variance taken of distances from the mean; bfloat16 is rounded once, at
    the end. A group that holds NaN or infinity gives NaN. The same inputs give the same bits on every run, for every
    number of threads and for all strides.

    Calls that need gradients, other devices and dtypes than float32 and bfloat16 go to torch.

    Args:
        x: [N, C, ...] float32 or bfloat16, any strides; contiguous and channels_last images are read as they lie.
        num_groups: divides C.
        weight, bias: [C], float32 or bfloat16; ones and zeros by default.
        eps: added to the variance.
        activation: None, "relu", "relu6", "gelu" (exact GELU), "gelu_tanh", "quick_gelu", "silu", "hardswish"
            or "tanh".

    Returns a tensor of x's shape and dtype, channels_last if x is, else contiguous. Raises ValueError when shapes or
    dtypes do not fit, and for an unknown activation.

    >>> y = lamina.ops.group_norm(x, 32, norm.weight, norm.bias, activation="silu")
    """
    activation = activation or "none"
    if runs_here(x, weight, bias):
        return _op(x, num_groups, weight, bias, eps, activation)
    return ACTIVATIONS[activation](F.group_norm(x, num_groups, weight, bias, eps))
