"""A small convolutional network: two 3x3 convolutions and two linear layers, the layout of PyTorch's MNIST example.

The 3x3 kernels and doubling widths are VGG's ("Very Deep Convolutional Networks", Simonyan & Zisserman 2015,
arXiv:1409.1556); most of its weights sit in the first linear layer, unlike LeNet's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lamina.models.registry import register


@dataclass(frozen=True)
class CNNConfig:
    """
    in_channels, image_size: the images, [B, in_channels, image_size, image_size]; image_size a multiple of 4.
    width: channels of the first convolution, half of the second's.
    hidden: width of the hidden linear layer.
    num_classes: size of the output.
    """

    in_channels: int = 1
    image_size: int = 28
    width: int = 32
    hidden: int = 128
    num_classes: int = 10


@register(cnn=CNNConfig())
class CNN(nn.Module):
    """Images [B, C, S, S] float32 -> logits [B, num_classes].

    Example:
        >>> CNN(CNNConfig())(torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 10])
    """

    def __init__(self, config: CNNConfig):
        super().__init__()
        self.config = config
        self.features = nn.Sequential(
            nn.Conv2d(config.in_channels, config.width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # [B, width, S/2, S/2]
            nn.Conv2d(config.width, 2 * config.width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # [B, 2 * width, S/4, S/4]
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),  # [B, 2 * width, S/4, S/4] -> [B, 2 * width * (S/4)^2]
            nn.Linear(2 * config.width * (config.image_size // 4) ** 2, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))

    @staticmethod
    def example_inputs(config: CNNConfig, batch: int) -> tuple[torch.Tensor]:
        return (torch.rand(batch, config.in_channels, config.image_size, config.image_size),)
