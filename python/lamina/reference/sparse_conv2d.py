"""What sparse_conv2d computes, in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor

from lamina.reference.conv2d import conv2d


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
) -> Tensor:
    """x [B, C, H, W], the weight [N, C, kh, kw] with its zeros, bias [N] -> [B, N, H', W'], in float64.

    padding: [vertical, horizontal], or [top, bottom, left, right].
    """
    bias = None if bias is None else bias.double()
    return conv2d(x.double(), weight.double(), bias, None, stride, padding, dilation, activation=activation)
