"""What token_panels, token_rows and quantize_panels compute, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.reference.quantize_rows import quantize_rows

PANEL = 32


def token_panels(x: Tensor) -> Tensor:
    """x [..., L, K] -> [sequences * ceil(L / 32), K, 32]; zeros behind the last token of a sequence."""
    length, features = x.shape[-2:]
    each = -(-length // PANEL)
    x = x.reshape(x.shape[:-2].numel(), length, features)
    padded = F.pad(x, (0, 0, 0, each * PANEL - length))
    return padded.view(x.shape[0] * each, PANEL, features).mT.contiguous()


def token_rows(panels: Tensor, shape: Sequence[int]) -> Tensor:
    """panels [sequences * ceil(L / 32), K, 32] and shape [..., L] -> [..., L, K]."""
    features, sequences = panels.shape[1], torch.Size(shape[:-1]).numel()
    each = -(-shape[-1] // PANEL)
    rows = panels.mT.reshape(sequences, each * PANEL, features)
    return rows[:, : shape[-1]].reshape(*shape, features)


def quantize_panels(panels: Tensor) -> tuple[Tensor, Tensor]:
    """panels [P, K, 32] -> (codes + 128 uint8 [P, ceil(K / 4), 32, 4], scales float32 [P, 32])."""
    codes, scales = quantize_rows(panels.mT)  # [P, 32, K]
    padded = F.pad(codes, (0, -panels.shape[1] % 4)).to(torch.int16) + 128
    return padded.to(torch.uint8).unflatten(2, (-1, 4)).transpose(1, 2).contiguous(), scales


def codes_of_panels(codes: Tensor, features: int) -> Tensor:
    """Codes as quantize_panels gives them -> int8 [P, 32, K], one row for each token."""
    return (codes.to(torch.int16) - 128).to(torch.int8).transpose(1, 2).flatten(2)[..., :features]
