"""What attention computes, in plain PyTorch."""

import math

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query @ key^T + mask) @ value over [..., H, L, D], [..., Hkv, S, D], [..., Hkv, S, Dv].

    A key that a mask excludes (False, -inf, or later than the query when causal) takes no part, whatever it and its
    value hold; a query without keys gives 0.
    """
    if dropout_p:
        raise ValueError("the reference of attention has no dropout")
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scale * (query @ key.mT)  # [..., H, L, S]

    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if is_causal:
        keep = keep.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = keep & attn_mask
    elif attn_mask is not None:
        attn_mask = attn_mask.to(scores.dtype)
        keep = keep & (attn_mask != -math.inf)
        scores = scores + attn_mask
    keep = keep.expand(scores.shape)
    scores = scores.masked_fill(~keep, -math.inf)
    weights = torch.softmax(scores, dim=-1).masked_fill(~keep.any(-1, keepdim=True), 0)

    # 0 * NaN is NaN: values that are not finite count only in the rows that keep their key.
    finite = value.isfinite()
    out = weights @ value.where(finite, 0)
    touched = keep.to(value.dtype) @ (~finite).to(value.dtype) > 0
    return torch.where(touched, weights @ value, out)
