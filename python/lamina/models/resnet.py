"""ResNet, "Deep Residual Learning for Image Recognition" (He et al. 2016, arXiv:1512.03385).

Basic blocks (ResNet-18) and bottlenecks (ResNet-50). As in most code, a bottleneck that shrinks the image does so in
its 3x3 convolution, not in the first 1x1 as the paper has it; the parameters are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lamina.models.registry import register


@dataclass(frozen=True)
class ResNetConfig:
    """
    block: "basic" (two 3x3) or "bottleneck" (1x1, 3x3, 1x1 with four times the channels).
    depths: blocks per stage; each stage after the first halves the image and doubles the channels.
    width: channels of the stem and of the first stage.
    stem: "imagenet" (7x7 stride 2 and a max pool: a quarter of the image is left) or "small" (3x3, full size).
    in_channels, image_size: the images, [B, in_channels, image_size, image_size]; any size works in forward.
    num_classes: size of the output.
    """

    block: Literal["basic", "bottleneck"] = "basic"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    stem: Literal["imagenet", "small"] = "imagenet"
    in_channels: int = 3
    image_size: int = 224
    num_classes: int = 1000


class _Residual(nn.Module):
    """ReLU(body(x) + shortcut(x)); the subclasses fill `body` and `shortcut`."""

    expansion: int

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = channels * self.expansion
        self.body = self.make_body(in_channels, channels, stride)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class BasicBlock(_Residual):
    """3x3 (stride), 3x3: [B, in_channels, S, S] -> [B, channels, S/stride, S/stride]."""

    expansion = 1

    @staticmethod
    def make_body(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )


class Bottleneck(_Residual):
    """1x1, 3x3 (stride), 1x1: [B, in_channels, S, S] -> [B, 4 * channels, S/stride, S/stride]."""

    expansion = 4

    @staticmethod
    def make_body(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 4 * channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(4 * channels),
        )


_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


def make_stem(config: ResNetConfig) -> nn.Sequential:
    """[B, in_channels, S, S] -> [B, width, S/4, S/4], or as large as the image with the small stem."""
    if config.stem == "imagenet":
        return nn.Sequential(
            nn.Conv2d(config.in_channels, config.width, kernel_size=7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(config.width),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
    if config.stem == "small":
        return nn.Sequential(
            nn.Conv2d(config.in_channels, config.width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(config.width),
            nn.ReLU(),
        )
    raise ValueError(f"ResNet stem is {config.stem!r}, must be 'imagenet' or 'small'")


def make_stages(config: ResNetConfig) -> tuple[nn.Sequential, int]:
    """The stages behind the stem, and the channels of what they give."""
    block = _BLOCKS[config.block]
    stages = []
    in_channels = config.width
    for stage, depth in enumerate(config.depths):
        channels = config.width * 2**stage
        blocks = []
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(block(in_channels, channels, stride))
            in_channels = channels * block.expansion
        stages.append(nn.Sequential(*blocks))
    return nn.Sequential(*stages), in_channels


@register(
    resnet18=ResNetConfig(),
    resnet50=ResNetConfig(block="bottleneck", depths=(3, 4, 6, 3)),
)
class ResNet(nn.Module):
    """Images [B, C, S, S] float32 -> logits [B, num_classes].

    Example:
        >>> config = ResNetConfig(depths=(1, 1), width=8, stem="small", in_channels=1, num_classes=10)
        >>> ResNet(config)(torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 10])
    """

    def __init__(self, config: ResNetConfig):
        super().__init__()
        if config.block not in _BLOCKS:
            raise ValueError(f"ResNet block is {config.block!r}, must be 'basic' or 'bottleneck'")
        self.config = config
        self.stem = make_stem(config)
        self.stages, channels = make_stages(config)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.pool(self.stages(self.stem(images))).flatten(1)  # [B, channels, 1, 1] -> [B, channels]
        return self.head(features)

    @staticmethod
    def example_inputs(config: ResNetConfig, batch: int) -> tuple[torch.Tensor]:
        return (torch.rand(batch, config.in_channels, config.image_size, config.image_size),)
