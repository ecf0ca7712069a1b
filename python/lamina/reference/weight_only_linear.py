"""What weight_only_linear computes, in plain PyTorch."""

from torch import Tensor

from lamina.reference.int8_linear import ACTIVATIONS


def dequantize(codes: Tensor, scale: Tensor, group_size: int = 0) -> Tensor:
    """Codes [N, K] and their scales -> the weight [N, K] in float64, exact.

    scale: [N] for int8 (group_size 0), [N, ceil(K / group_size)] for int4.
    """
    if group_size == 0:
        return codes.double() * scale.double()[:, None]
    wide = scale.double().repeat_interleave(group_size, dim=1)[:, : codes.shape[1]]
    return codes.double() * wide


def weight_only_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x [..., K], dequantized weight [N, K], bias [N] -> [..., N], all in float64: only the weight was rounded."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    return ACTIVATIONS[activation](y)
