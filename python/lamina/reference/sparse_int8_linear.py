"""What sparse_int8_linear computes, in plain PyTorch: int8_linear with the dense weight."""

from torch import Tensor

from lamina.reference.int8_linear import int8_linear as sparse_int8_linear
from lamina.reference.token_panels import codes_of_panels

__all__ = ["sparse_int8_linear", "sparse_int8_linear_panels"]


def sparse_int8_linear_panels(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The same from panels (see token_panels): x_codes [P, K / 4, 32, 4], residual [P, N, 32] -> float64 [P, N, 32]."""
    x = codes_of_panels(x_codes, codes.shape[1])
    rows = None if residual is None else residual.mT
    return sparse_int8_linear(x, codes, scale, bias, activation, rows, x_scales).mT
