"""LeNet-5, "Gradient-Based Learning Applied to Document Recognition" (LeCun et al. 1998), figure 2.

Two departures from 1998, as everybody makes them: ReLU instead of scaled tanh and max pooling instead of trainable
averages. The 28x28 images are padded by two, which gives the paper's 32x32 frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lamina.models.registry import register


@dataclass(frozen=True)
class LeNetConfig:
    """
    in_channels: channels of the images, [B, in_channels, 28, 28].
    num_classes: size of the output.
    """

    in_channels: int = 1
    num_classes: int = 10


@register(lenet=LeNetConfig())
class LeNet(nn.Module):
    """Images [B, C, 28, 28] float32 -> logits [B, num_classes].

    Example:
        >>> LeNet(LeNetConfig())(torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 10])
    """

    def __init__(self, config: LeNetConfig):
        super().__init__()
        self.config = config
        self.features = nn.Sequential(
            nn.Conv2d(config.in_channels, 6, kernel_size=5, padding=2),  # [B, 6, 28, 28]
            nn.ReLU(),
            nn.MaxPool2d(2),  # [B, 6, 14, 14]
            nn.Conv2d(6, 16, kernel_size=5),  # [B, 16, 10, 10]
            nn.ReLU(),
            nn.MaxPool2d(2),  # [B, 16, 5, 5]
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),  # [B, 16, 5, 5] -> [B, 400]
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, config.num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))

    @staticmethod
    def example_inputs(config: LeNetConfig, batch: int) -> tuple[torch.Tensor]:
        return (torch.rand(batch, config.in_channels, 28, 28),)
