"""GPT-2, "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019): a pre-norm causal Transformer
decoder whose output head is the transposed word embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from lamina.models.attention import MultiHeadSelfAttention
from lamina.models.registry import register


@dataclass(frozen=True)
class GPTConfig:
    """
    vocab: size of the vocabulary.
    positions: longest context.
    dim: model width; the feed-forward layer is four times as wide.
    layers: decoder layers.
    heads: attention heads, each dim / heads wide.
    dropout: after the embeddings and each sublayer, in training.
    """

    vocab: int = 50257
    positions: int = 1024
    dim: int = 768
    layers: int = 12
    heads: int = 12
    dropout: float = 0.1


class GPTLayer(nn.Module):
    """Norm, causal self-attention, add; norm, feed-forward, add: [B, L, D] -> [B, L, D]."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = MultiHeadSelfAttention(config.dim, config.heads)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, 4 * config.dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.dim, config.dim),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), is_causal=True))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


@register(
    gpt_tiny=GPTConfig(vocab=1000, positions=256, dim=128, layers=4, heads=4),
    gpt2=GPTConfig(),
)
class GPT(nn.Module):
    """Tokens [B, L] int64 -> logits [B, L, vocab] float32 of the token after each.

    Example:
        >>> model = GPT(GPTConfig(vocab=100, positions=32, dim=32, layers=2, heads=4)).eval()
        >>> model(torch.randint(0, 100, (2, 9))).shape
        torch.Size([2, 9, 100])
        >>> model.generate(torch.randint(0, 100, (2, 9)), max_new_tokens=3).shape
        torch.Size([2, 12])
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.word_embedding = nn.Embedding(config.vocab, config.dim)
        self.position_embedding = nn.Embedding(config.positions, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(GPTLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        self.apply(_initialise)
        # Section 2.3 of the paper: each residual branch starts smaller, so that their sum does not grow with depth.
        for layer in self.layers:
            for branch_end in (layer.attention.out, layer.ffn[-1]):
                nn.init.normal_(branch_end.weight, std=0.02 / math.sqrt(2 * config.layers))
        self.head.weight = self.word_embedding.weight

    def encode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The decoder's output without the head: [B, L, D]."""
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.dropout(self.word_embedding(input_ids) + self.position_embedding(position))  # [B, L, D]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encode(input_ids))

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Appends the likeliest token max_new_tokens times: [B, L] -> [B, L + max_new_tokens] int64.

        Every step reads the last `positions` tokens anew; there is no cache of keys and values.
        """
        for _ in range(max_new_tokens):
            context = input_ids[:, -self.config.positions :]
            token = self.head(self.encode(context)[:, -1]).argmax(-1, keepdim=True)  # [B, 1]
            input_ids = torch.cat((input_ids, token), dim=1)
        return input_ids

    @staticmethod
    def example_inputs(config: GPTConfig, batch: int) -> tuple[torch.Tensor]:
        return (torch.randint(0, config.vocab, (batch, min(128, config.positions))),)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
