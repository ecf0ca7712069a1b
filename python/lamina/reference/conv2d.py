"""What conv2d computes, in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from lamina.reference.int8_linear import ACTIVATIONS


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    pool: str = "none",
    pool_sizes: Sequence[int] = (),
) -> Tensor:
    """input [B, C, H, W], weight [N, C / groups, kh, kw], bias [N], residual as the convolution's output.

    padding: [vertical, horizontal], or [top, bottom, left, right]. pool: "none", "max" or "avg" of the activated sums,
    with pool_sizes = [window, stride, padding], two numbers each.
    """
    if len(padding) == 4:
        top, bottom, left, right = padding
        input, padding = F.pad(input, (left, right, top, bottom)), (0, 0)
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = ACTIVATIONS[activation](y if residual is None else y + residual)
    if pool == "none":
        return y
    pooled = F.max_pool2d if pool == "max" else F.avg_pool2d
    return pooled(y, pool_sizes[0:2], pool_sizes[2:4], pool_sizes[4:6])
