"""Vision Transformer, "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lamina.models.attention import MultiHeadSelfAttention
from lamina.models.registry import register


@dataclass(frozen=True)
class ViTConfig:
    """
    in_channels, image_size: the images, [B, in_channels, image_size, image_size].
    patch: side of the square patches, divides image_size.
    dim: model width.
    layers: encoder layers.
    heads: attention heads, each dim / heads wide.
    ffn: width of the feed-forward layer.
    dropout: after the position embedding and each sublayer, in training.
    num_classes: size of the output.
    """

    in_channels: int = 3
    image_size: int = 224
    patch: int = 16
    dim: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    dropout: float = 0.0
    num_classes: int = 1000


class ViTLayer(nn.Module):
    """Norm, self-attention, add; norm, feed-forward, add: [B, L, D] -> [B, L, D]."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.attention = MultiHeadSelfAttention(config.dim, config.heads)
        self.ffn_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(config.dim, config.ffn), nn.GELU(), nn.Linear(config.ffn, config.dim))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


@register(
    vit_mnist=ViTConfig(in_channels=1, image_size=28, patch=7, dim=128, layers=4, heads=4, ffn=512, num_classes=10),
    vit_base=ViTConfig(),
)
class ViT(nn.Module):
    """Images [B, C, S, S] float32 -> logits [B, num_classes], read from the class token.

    Example:
        >>> ViT(ViTConfig(in_channels=1, image_size=28, patch=7, dim=32, layers=2, heads=4, ffn=64, num_classes=10))(
        ...     torch.rand(4, 1, 28, 28)
        ... ).shape
        torch.Size([4, 10])
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        if config.image_size % config.patch:
            raise ValueError(f"ViT patch {config.patch} does not divide image_size {config.image_size}")
        self.config = config
        patches = (config.image_size // config.patch) ** 2
        self.patch_embedding = nn.Conv2d(config.in_channels, config.dim, kernel_size=config.patch, stride=config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.position_embedding = nn.Parameter(torch.randn(1, patches + 1, config.dim) * 0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # [B, D, S/P, S/P] -> [B, (S/P)^2, D]
        x = torch.cat((self.class_token.expand(images.shape[0], -1, -1), patches), dim=1)  # [B, L, D]
        x = self.dropout(x + self.position_embedding)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))

    @staticmethod
    def example_inputs(config: ViTConfig, batch: int) -> tuple[torch.Tensor]:
        return (torch.rand(batch, config.in_channels, config.image_size, config.image_size),)
