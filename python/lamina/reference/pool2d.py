"""What pool2d computes, in plain PyTorch."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def pool2d(
    x: Tensor,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Tensor:
    """x [..., channels, height, width] -> the largest value of each window, or its mean."""
    if kind == "max":
        return F.max_pool2d(x, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), ceil_mode)
    if kind == "adaptive_avg":
        return F.adaptive_avg_pool2d(x, tuple(kernel))
    return F.avg_pool2d(x, tuple(kernel), tuple(stride), tuple(padding), ceil_mode, count_include_pad, divisor)
