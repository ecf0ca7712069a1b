"""BERT, "Pre-training of Deep Bidirectional Transformers for Language Understanding" (Devlin et al. 2019,
arXiv:1810.04805): a post-norm Transformer encoder with a masked-word and a next-sentence head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lamina.models.attention import MultiHeadSelfAttention
from lamina.models.registry import register


@dataclass(frozen=True)
class BERTConfig:
    """
    vocab: size of the vocabulary.
    positions: longest sequence.
    segments: sentence kinds that token_type_ids may name.
    dim: model width.
    layers: encoder layers.
    heads: attention heads, each dim / heads wide.
    ffn: width of the feed-forward layer.
    dropout: after the embeddings and each sublayer, in training.
    norm_eps: epsilon of the layer norms.
    """

    vocab: int = 30522
    positions: int = 512
    segments: int = 2
    dim: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    dropout: float = 0.1
    norm_eps: float = 1e-12


class BERTLayer(nn.Module):
    """Self-attention and feed-forward, each followed by add and norm: [B, L, D] -> [B, L, D]."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.attention = MultiHeadSelfAttention(config.dim, config.heads)
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ffn = nn.Sequential(nn.Linear(config.dim, config.ffn), nn.GELU(), nn.Linear(config.ffn, config.dim))
        self.ffn_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, attn_mask=attn_mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


@register(
    bert_tiny=BERTConfig(dim=128, layers=2, heads=2, ffn=512),
    bert_base=BERTConfig(),
)
class BERT(nn.Module):
    """Tokens [B, L] int64 -> (word logits [B, L, vocab], next-sentence logits [B, 2]).

    Args of forward:
        input_ids: [B, L] int64.
        attention_mask: [B, L], nonzero or True where a token is real; None means all are.
        token_type_ids: [B, L] int64, which sentence a token belongs to; None means all to the first.

    The masked-word head shares its weight with the word embedding.

    Example:
        >>> model = BERT(BERTConfig(vocab=100, dim=32, layers=2, heads=4, ffn=64)).eval()
        >>> words, next_sentence = model(torch.randint(0, 100, (2, 9)))
        >>> words.shape, next_sentence.shape
        (torch.Size([2, 9, 100]), torch.Size([2, 2]))
    """

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.config = config
        self.word_embedding = nn.Embedding(config.vocab, config.dim)
        self.position_embedding = nn.Embedding(config.positions, config.dim)
        self.segment_embedding = nn.Embedding(config.segments, config.dim)
        self.embedding_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(BERTLayer(config) for _ in range(config.layers))
        self.pooler = nn.Sequential(nn.Linear(config.dim, config.dim), nn.Tanh())
        self.next_sentence_head = nn.Linear(config.dim, 2)
        self.word_transform = nn.Sequential(
            nn.Linear(config.dim, config.dim), nn.GELU(), nn.LayerNorm(config.dim, eps=config.norm_eps)
        )
        self.word_head = nn.Linear(config.dim, config.vocab)
        self.apply(_initialise)
        self.word_head.weight = self.word_embedding.weight

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The encoder's output without the heads: [B, L, D]."""
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.word_embedding(input_ids) + self.position_embedding(position) + self.segment_embedding(token_type_ids)
        x = self.dropout(self.embedding_norm(x))  # [B, L, D]
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # [B, 1, 1, L]
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.encode(input_ids, attention_mask, token_type_ids)
        return self.word_head(self.word_transform(x)), self.next_sentence_head(self.pooler(x[:, 0]))

    @staticmethod
    def example_inputs(config: BERTConfig, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        length = min(128, config.positions)
        lengths = torch.randint(length // 2, length + 1, (batch, 1))
        # One sequence of every batch is full, as it is when a batch is padded to its longest.
        lengths[0] = length
        return torch.randint(0, config.vocab, (batch, length)), (torch.arange(length) < lengths).long()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
