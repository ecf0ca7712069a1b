"""Multi-layer perceptron with one hidden layer: 784-128-10, the smallest model that classifies MNIST well
("Gradient-Based Learning Applied to Document Recognition", LeCun et al. 1998, section III.C.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lamina.models.registry import register


@dataclass(frozen=True)
class MLPConfig:
    """
    in_channels, image_size: the images, [B, in_channels, image_size, image_size].
    hidden: width of the hidden layer.
    num_classes: size of the output.
    """

    in_channels: int = 1
    image_size: int = 28
    hidden: int = 128
    num_classes: int = 10


@register(mlp=MLPConfig())
class MLP(nn.Module):
    """Images [B, C, S, S] float32 -> logits [B, num_classes].

    Example:
        >>> MLP(MLPConfig())(torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 10])
    """

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(
            nn.Flatten(),  # [B, C, S, S] -> [B, C * S * S]
            nn.Linear(config.in_channels * config.image_size**2, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)

    @staticmethod
    def example_inputs(config: MLPConfig, batch: int) -> tuple[torch.Tensor]:
        return (torch.rand(batch, config.in_channels, config.image_size, config.image_size),)
