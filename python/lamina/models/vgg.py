"""VGG, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (Simonyan & Zisserman 2015,
arXiv:1409.1556), configurations A, D and E of table 1: stages of 3x3 convolutions with a max pool behind each, and
three linear layers that hold most of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lamina.models.registry import register


@dataclass(frozen=True)
class VGGConfig:
    """
    depths: convolutions per stage; each stage ends by halving the image.
    width: channels of the first stage, doubled by each next one up to eight times.
    batch_norm: whether batch norm follows each convolution (not in the paper).
    in_channels, image_size: the images, [B, in_channels, image_size, image_size]; image_size a multiple of 2^stages.
    hidden: width of the two hidden linear layers.
    dropout: after each of them, in training.
    num_classes: size of the output.
    """

    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    width: int = 64
    batch_norm: bool = False
    in_channels: int = 3
    image_size: int = 224
    hidden: int = 4096
    dropout: float = 0.5
    num_classes: int = 1000


def make_stages(config: VGGConfig) -> tuple[nn.ModuleList, list[int]]:
    """The stages, [B, C, S, S] -> [B, channels, S/2, S/2] each, and the channels behind them."""
    stages, channels = nn.ModuleList(), []
    in_channels = config.in_channels
    for stage, depth in enumerate(config.depths):
        out_channels = config.width * min(2**stage, 8)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers.append(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1))
            layers += [nn.BatchNorm2d(out_channels)] if config.batch_norm else []
            layers.append(nn.ReLU())
            in_channels = out_channels
        stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        channels.append(out_channels)
    for module in stages.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return stages, channels


@register(
    vgg11=VGGConfig(depths=(1, 1, 2, 2, 2)),
    vgg16=VGGConfig(),
    vgg16_bn=VGGConfig(batch_norm=True),
    vgg19=VGGConfig(depths=(2, 2, 4, 4, 4)),
)
class VGG(nn.Module):
    """Images [B, C, S, S] float32 -> logits [B, num_classes].

    Example:
        >>> config = VGGConfig(depths=(1, 1), width=8, image_size=28, in_channels=1, hidden=32, num_classes=10)
        >>> VGG(config)(torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 10])
    """

    def __init__(self, config: VGGConfig):
        super().__init__()
        side, rest = divmod(config.image_size, 2 ** len(config.depths))
        if rest:
            raise ValueError(
                f"VGG image_size {config.image_size} cannot be halved {len(config.depths)} times, once a stage"
            )
        self.config = config
        stages, channels = make_stages(config)
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Sequential(
            nn.Flatten(),  # [B, C, S, S] -> [B, C * S^2]
            nn.Linear(channels[-1] * side**2, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))

    @staticmethod
    def example_inputs(config: VGGConfig, batch: int) -> tuple[torch.Tensor]:
        return (torch.rand(batch, config.in_channels, config.image_size, config.image_size),)
