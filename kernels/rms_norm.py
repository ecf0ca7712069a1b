"""rms_norm in Triton: see norm_rows."""

from lamina.kernels.norm_rows import norm_rows
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    total: Tensor | None = None,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """The norm of the rows of x + residual [M, K] into out; total is the sum, codes and scales what quantize_rows makes
    of out."""
    norm_rows("rms_norm", False, x, weight, None, eps, residual, out, total, codes, scales)
