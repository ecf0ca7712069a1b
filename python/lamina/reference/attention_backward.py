"""What attention_backward computes: the derivative of the reference of attention, by PyTorch's autograd."""

import math

import torch
from torch import Tensor

from lamina.reference.attention import attention


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    grad_lse: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: object,
) -> list[Tensor]:
    """The gradients of query, key, value, and of an added mask, of slopes and of sinks where they are given.

    `options` are those of the reference of attention. A query without keys has a gradient of 0, that of its lse too.
    """
    inputs = [query, key, value, attn_mask, alibi_slopes, sinks]
    inputs = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    query, key, value, attn_mask, alibi_slopes, sinks = inputs
    with torch.enable_grad():
        out, lse = attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa=query.ndim > 2 and query.shape[-3] != key.shape[-3],
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            return_lse=True,
            **options,
        )
        total = (out * grad_out).sum()
        if grad_lse is not None:
            total = total + (lse.masked_fill(lse == -math.inf, 0) * grad_lse).sum()
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients, strict=True)]
