"""FCN-8s, "Fully Convolutional Networks for Semantic Segmentation" (Long et al. 2015, arXiv:1411.4038).

VGG's stages, its linear layers as convolutions, and a head that scores every place at strides 32, 16 and 8, adds the
three up from the coarsest and enlarges the sum by transposed convolutions. Convolutions are padded to keep the size of
the image, where the paper pads it by 100 and crops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lamina.models.registry import register
from lamina.models.vgg import VGGConfig, make_stages


@dataclass(frozen=True)
class FCNConfig:
    """
    depths, width, batch_norm: of the VGG stages, at least three.
    in_channels, image_size: the images, [B, in_channels, image_size, image_size]; multiples of 2^stages work in
        forward.
    hidden: channels of the two convolutions that stand for VGG's linear layers.
    hidden_kernel: size of the first one's kernel, odd.
    dropout: after each of the two, in training.
    num_classes: channels of the output.
    """

    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    width: int = 64
    batch_norm: bool = False
    in_channels: int = 3
    image_size: int = 224
    hidden: int = 4096
    hidden_kernel: int = 7
    dropout: float = 0.5
    num_classes: int = 21


@register(fcn8s=FCNConfig())
class FCN(nn.Module):
    """Images [B, C, S, S] float32 -> logits of each pixel [B, num_classes, S, S].

    Example:
        >>> FCN(FCNConfig(depths=(1, 1, 1), width=8, hidden=32, num_classes=5))(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 5, 32, 32])
    """

    def __init__(self, config: FCNConfig):
        super().__init__()
        if len(config.depths) < 3:
            raise ValueError(f"FCN takes the outputs of the last three stages, but depths {config.depths} has fewer")
        self.config = config
        vgg = VGGConfig(config.depths, config.width, config.batch_norm, config.in_channels)
        self.stages, channels = make_stages(vgg)
        self.hidden = nn.Sequential(
            nn.Conv2d(channels[-1], config.hidden, config.hidden_kernel, padding=config.hidden_kernel // 2),
            nn.ReLU(),
            nn.Dropout2d(config.dropout),
            nn.Conv2d(config.hidden, config.hidden, kernel_size=1),
            nn.ReLU(),
            nn.Dropout2d(config.dropout),
        )
        classes = config.num_classes
        self.score_coarse = nn.Conv2d(config.hidden, classes, kernel_size=1)
        self.score_middle = nn.Conv2d(channels[-2], classes, kernel_size=1)
        self.score_fine = nn.Conv2d(channels[-3], classes, kernel_size=1)
        self.enlarge_coarse = _enlarge(classes, 2)
        self.enlarge_middle = _enlarge(classes, 2)
        self.enlarge_sum = _enlarge(classes, 2 ** (len(config.depths) - 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps, x = [], images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        scores = self.score_coarse(self.hidden(x))  # [B, classes, S/32, S/32]
        scores = self.enlarge_coarse(scores) + self.score_middle(maps[-2])  # [B, classes, S/16, S/16]
        scores = self.enlarge_middle(scores) + self.score_fine(maps[-3])  # [B, classes, S/8, S/8]
        return self.enlarge_sum(scores)

    @staticmethod
    def example_inputs(config: FCNConfig, batch: int) -> tuple[torch.Tensor]:
        return (torch.rand(batch, config.in_channels, config.image_size, config.image_size),)


def _enlarge(channels: int, factor: int) -> nn.ConvTranspose2d:
    """[B, C, S, S] -> [B, C, factor * S, factor * S], at first by bilinear interpolation, channel by channel."""
    layer = nn.ConvTranspose2d(channels, channels, 2 * factor, stride=factor, padding=factor // 2, bias=False)
    # A triangle that is 1 above the middle of 2 * factor pixels and 0 a factor away.
    distance = (torch.arange(2 * factor) + 0.5 - factor).abs()
    triangle = 1 - distance / factor
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[range(channels), range(channels)] = triangle[:, None] * triangle
    return layer
