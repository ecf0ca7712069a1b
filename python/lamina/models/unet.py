"""U-Net, "U-Net: Convolutional Networks for Biomedical Image Segmentation" (Ronneberger et al. 2015, arXiv:1505.04597).

Two departures, as most code has them: convolutions are padded, so that the output is as large as the image and nothing
is cropped, and batch norm follows each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lamina.models.registry import register


@dataclass(frozen=True)
class UNetConfig:
    """
    in_channels, image_size: the images, [B, in_channels, image_size, image_size]; multiples of 2^levels work in
        forward.
    width: channels at full size, doubled each time the image is halved.
    levels: how often it is.
    num_classes: channels of the output.
    """

    in_channels: int = 1
    image_size: int = 256
    width: int = 64
    levels: int = 4
    num_classes: int = 2


def _block(in_channels: int, channels: int) -> nn.Sequential:
    """[B, in_channels, S, S] -> [B, channels, S, S]."""
    layers: list[nn.Module] = []
    for given in (in_channels, channels):
        conv = nn.Conv2d(given, channels, kernel_size=3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


@register(unet=UNetConfig())
class UNet(nn.Module):
    """Images [B, C, S, S] float32 -> logits of each pixel [B, num_classes, S, S].

    Example:
        >>> UNet(UNetConfig(width=8, levels=2))(torch.rand(4, 1, 32, 32)).shape
        torch.Size([4, 2, 32, 32])
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = [config.width * 2**level for level in range(config.levels + 1)]
        given = [config.in_channels, *widths[:-1]]
        self.down = nn.ModuleList(_block(*sizes) for sizes in zip(given, widths, strict=True))
        self.pool = nn.MaxPool2d(2)
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(2 * width, width, kernel_size=2, stride=2) for width in reversed(widths[:-1])
        )
        self.up = nn.ModuleList(_block(2 * width, width) for width in reversed(widths[:-1]))
        self.head = nn.Conv2d(config.width, config.num_classes, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        kept = [self.down[0](images)]  # [B, width, S, S], [B, 2 * width, S/2, S/2], ...
        for block in self.down[1:]:
            kept.append(block(self.pool(kept[-1])))
        x = kept.pop()
        for enlarge, block in zip(self.enlarge, self.up, strict=True):
            x = block(torch.cat((kept.pop(), enlarge(x)), dim=1))
        return self.head(x)

    @staticmethod
    def example_inputs(config: UNetConfig, batch: int) -> tuple[torch.Tensor]:
        return (torch.rand(batch, config.in_channels, config.image_size, config.image_size),)
