"""What counts as a convolution that the int8 layers can take the place of."""

from torch import nn

Conv = nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d


def as_conv(module: nn.Module) -> Conv | None:
    """`module` if it is one of torch's own; None for subclasses, which may compute something else, and all others."""
    return module if type(module) in (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d) else None
