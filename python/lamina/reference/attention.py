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
    *,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T + mask) @ value over [..., H, L, D], [..., Hkv, S, D], [..., Hkv, S, Dv].

    A key that a mask excludes (False, -inf, or outside of the query's window) takes no part, whatever it and its value
    hold; a query without keys gives 0. The arguments after `enable_gqa` are those of `lamina.ops.attention`.
    """
    if dropout_p:
        raise ValueError("the reference of attention has no dropout")
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scale * (query @ key.mT)  # [..., H, L, S]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)

    queries, keys = scores.shape[-2:]
    shift = keys - queries if causal_alignment == "bottom_right" else 0
    position = torch.arange(queries, device=scores.device)[:, None] + shift
    distance = torch.arange(keys, device=scores.device) - position  # [L, S]: how far a key is to the right
    left, right = window if isinstance(window, tuple) else (window, window)
    keep = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        keep &= distance <= 0
    if left is not None and left >= 0:
        keep &= distance >= -left
    if right is not None and right >= 0:
        keep &= distance <= right

    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * distance.abs()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = keep & attn_mask
    elif attn_mask is not None:
        attn_mask = attn_mask.to(scores.dtype)
        keep = keep & (attn_mask != -math.inf)
        scores = scores + attn_mask
    keep = keep.expand(scores.shape)
    scores = scores.masked_fill(~keep, -math.inf)
    takes = keep.any(-1, keepdim=True)
    if sinks is not None:  # a key that every query takes, with a value of 0
        scores = torch.cat([scores, sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
        takes = takes | (sinks[:, None, None] != -math.inf)
    # Rows without keys are kept out of softmax, whose gradient there is NaN.
    weights = torch.softmax(scores.masked_fill(~takes, 0), dim=-1).masked_fill(~takes, 0)[..., :keys]

    # 0 * NaN is NaN: values that are not finite count only in the rows that keep their key.
    finite = value.isfinite()
    out = weights @ value.where(finite, 0)
    if not finite.all():
        touched = keep.to(value.dtype) @ (~finite).to(value.dtype) > 0
        out = torch.where(touched, weights @ value, out)
    return (out, torch.logsumexp(scores, -1)) if return_lse else out
