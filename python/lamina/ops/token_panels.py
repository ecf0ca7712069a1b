"""token_panels: tokens in panels of 32, feature by feature, the layout of a chain of sparse int8 layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.library import define

# Tokens of a panel.
PANEL = 32


def new_codes(panels: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of as many panels, of so many features."""
    count = panels.shape[0]
    codes = panels.new_empty((count, (features + 3) // 4, PANEL, 4), dtype=torch.uint8)
    return codes, panels.new_empty((count, PANEL), dtype=torch.float32)


def _new_panels(x: Tensor) -> Tensor:
    length, features = x.shape[-2:]
    sequences = x.shape[:-2].numel()
    return x.new_empty((sequences * ((length + PANEL - 1) // PANEL), features, PANEL), dtype=torch.float32)


def _cpu(x: Tensor) -> Tensor:
    if x.ndim < 2:
        raise ValueError(f"token_panels: x has shape {list(x.shape)}, but must be [..., L, K]")
    panels = _new_panels(x)
    _C.token_panels(x if x.ndim == 3 else x.reshape(x.shape[:-2].numel(), *x.shape[-2:]), panels)
    return panels


def _fake(x: Tensor) -> Tensor:
    torch._check(x.ndim >= 2, lambda: "token_panels: x must be [..., L, K]")
    torch._check(x.dtype in (torch.float32, torch.bfloat16), lambda: f"token_panels: x is {x.dtype}")
    return _new_panels(x)


def _rows_cpu(panels: Tensor, shape: Sequence[int]) -> Tensor:
    if panels.ndim != 3:
        raise ValueError(f"token_rows: panels has shape {list(panels.shape)}, but must be [panels, K, {PANEL}]")
    if not shape:
        raise ValueError("token_rows: shape is empty, but must end in the number of tokens of a sequence")
    rows = panels.new_empty((*shape, panels.shape[1]))
    _C.token_rows(panels, rows if rows.ndim == 3 else rows.view(rows.shape[:-2].numel(), *rows.shape[-2:]))
    return rows


def _rows_fake(panels: Tensor, shape: Sequence[int]) -> Tensor:
    torch._check(panels.ndim == 3, lambda: "token_rows: panels must be [panels, K, 32]")
    return panels.new_empty((*shape, panels.shape[1]))


def _codes_cpu(panels: Tensor) -> tuple[Tensor, Tensor]:
    if panels.ndim != 3:
        raise ValueError(f"quantize_panels: panels has shape {list(panels.shape)}, but must be [panels, K, {PANEL}]")
    codes, scales = new_codes(panels, panels.shape[1])
    _C.quantize_panels(panels, codes, scales)
    return codes, scales


def _codes_fake(panels: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(panels.ndim == 3, lambda: "quantize_panels: panels must be [panels, K, 32]")
    return new_codes(panels, panels.shape[1])


_op = define("token_panels(Tensor x) -> Tensor", cpu=_cpu, fake=_fake)
_rows = define("token_panels.rows(Tensor panels, SymInt[] shape) -> Tensor", cpu=_rows_cpu, fake=_rows_fake)
_codes = define("token_panels.codes(Tensor panels) -> (Tensor codes, Tensor scales)", cpu=_codes_cpu, fake=_codes_fake)


def token_panels(x: Tensor) -> Tensor:
    """Tokens [..., L, K] as panels [panels, K, 32]: panel p holds 32 neighbouring tokens, feature by feature.

    In this layout what is done to each token by itself (a norm, the largest value, quantization, an activation) is done
    to whole registers of tokens, and sparse int8 layers read and write it without a transpose: a chain of
    `sparse_int8_linear_panels`, `layer_norm_panels` and `attention_panels` stays in it. Each sequence of L tokens
    begins with a panel of its own, ceil(L / 32) of them, and what lies behind its last token is zero. Later ops keep
    lanes apart: what they make of those never reaches another token. No gradient.

    Args:
        x: [..., L, K] float32 or bfloat16, any strides.

    Returns float32 [sequences * ceil(L / 32), K, 32], contiguous. Raises ValueError when shape or dtype do not fit.

    >>> panels = lamina.ops.token_panels(x)  # [2, 100, 768] -> [8, 768, 32]
    >>> rows = lamina.ops.token_rows(panels, x.shape[:-1])
    """
    return _op(x)


def token_rows(panels: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `token_panels`: panels [panels, K, 32] -> tokens [*shape, K].

    Args:
        panels: float32, any distance from panel to panel, features one behind the other.
        shape: of the tokens, [..., L]: the last size is the length of a sequence.

    Returns float32 [*shape, K], contiguous. Raises ValueError when shapes or dtypes do not fit.

    >>> rows = lamina.ops.token_rows(panels, (2, 100))
    """
    return _rows(panels, shape)


def quantize_panels(panels: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of panels: those of `quantize_rows` for each token, bit for bit, in the order the kernels read them.

    Args:
        panels: float32 [panels, K, 32], any distance from panel to panel, features one behind the other.

    Returns (codes, scales): uint8 [panels, ceil(K / 4), 32, 4], the int8 code plus 128, with 128 behind the last
    feature; float32 [panels, 32]. Raises ValueError when shape or dtype do not fit.

    >>> codes, scales = lamina.ops.quantize_panels(lamina.ops.token_panels(x))
    """
    return _codes(panels)
