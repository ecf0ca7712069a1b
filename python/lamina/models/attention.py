"""Attention: every softmax(Q K^T / sqrt(D)) V of the reference models goes through one leaf module.

A leaf, because lamina's swap replaces modules: a model that calls the functional inside a bigger block offers nothing
to take hold of.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ScaledDotProductAttention(nn.Module):
    """softmax(Q K^T / sqrt(D) + mask) V, "Attention Is All You Need" (Vaswani et al. 2017, arXiv:1706.03762), eq. 1.

    Args of forward:
        query: [B, H, L, D]
        key, value: [B, H, S, D]
        attn_mask: broadcastable to [B, H, L, S]; bool (True = may look) or float (added to the scores).
        is_causal: position i sees only j <= i; not together with attn_mask.

    Returns [B, H, L, D] in the inputs' dtype.

    Example:
        >>> q = k = v = torch.randn(2, 4, 10, 32)
        >>> ScaledDotProductAttention()(q, k, v, is_causal=True).shape
        torch.Size([2, 4, 10, 32])
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal)


class AdditiveAttention(nn.Module):
    """softmax(v^T tanh(W q + U k) + mask) V, "Neural Machine Translation by Jointly Learning to Align and Translate"
    (Bahdanau et al. 2015, arXiv:1409.0473), appendix A.1.2. Called like `ScaledDotProductAttention`, one head wide.

    Args:
        dim: size D of queries and keys, and of the hidden layer that scores them.

    Example:
        >>> query, memory = torch.randn(2, 1, 5, 16), torch.randn(2, 1, 9, 16)
        >>> AdditiveAttention(16)(query, memory, memory).shape
        torch.Size([2, 1, 5, 16])
    """

    def __init__(self, dim: int):
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.score = nn.Linear(dim, 1, bias=False)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden = self.query(query).unsqueeze(3) + self.key(key).unsqueeze(2)  # [B, H, L, S, D]
        scores = self.score(torch.tanh(hidden)).squeeze(-1)  # [B, H, L, S]
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        return scores.softmax(dim=-1) @ value  # [B, H, L, D]


class MultiHeadSelfAttention(nn.Module):
    """Multi-head self-attention with plain nn.Linear projections, Vaswani et al. 2017, section 3.2.2.

    Args:
        dim: model width; a multiple of heads.
        heads: number of heads H, each dim / heads wide.
        bias: whether the four projections have a bias.

    Example:
        >>> MultiHeadSelfAttention(64, heads=4)(torch.randn(2, 10, 64), is_causal=True).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, dim: int, heads: int, bias: bool = True):
        super().__init__()
        if dim % heads:
            raise ValueError(f"self-attention of width {dim} does not divide into {heads} heads")
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.attention = ScaledDotProductAttention()
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, L, dim] -> [B, H, L, D]
            for project in (self.query, self.key, self.value)
        )
        mixed = self.attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal)
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, H, L, D] -> [B, L, dim]
