"""What linear computes, in plain PyTorch."""

from torch import Tensor

from lamina.reference.int8_linear import ACTIVATIONS


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """x [..., K], weight [N, K], bias [N], residual [..., N] -> [..., N], all in float64."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if residual is not None:
        y = y + residual.double()
    return ACTIVATIONS[activation](y)
