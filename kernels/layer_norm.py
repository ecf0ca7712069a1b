"""layer_norm in Triton: see norm_rows."""

from lamina.kernels.norm_rows import norm_rows
from torch import Tensor


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    total: Tensor | None = None,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """The norm of the rows of x + residual [M, K] into out; total is the sum, codes and scales what quantize_rows makes
    of out."""
    norm_rows("layer_norm", True, x, weight, bias, eps, residual, out, total, codes, scales)
