"""What attention_decode computes, in plain PyTorch."""

import math

import torch
from torch import Tensor


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output [B, L, H, Dv] and the logarithm of the sum of exponentials [B, H, L], in the query's dtype.

    q [B, L, H, D]; caches [B, S, Hkv, D] and [B, S, Hkv, Dv], or [blocks, block_size, Hkv, D or Dv] with block_table
    [B, max_blocks]. Query i of sequence b is token cache_seqlens[b] - L + i of it and takes the tokens up to itself,
    the last `window` of them.
    """
    batch, queries, heads, size = q.shape
    out = q.new_zeros(batch, queries, heads, v_cache.shape[3])
    lse = q.new_full((batch, heads, queries), -math.inf)
    scale = 1 / math.sqrt(size) if scale is None else scale
    for b, length in enumerate(cache_seqlens.tolist()):
        keys = _tokens(k_cache, k_scale, b, length, block_table, q.dtype)  # [n, Hkv, D]
        values = _tokens(v_cache, v_scale, b, length, block_table, q.dtype)
        group = heads // max(keys.shape[1], 1)
        keys, values = (t.repeat_interleave(group, 1).transpose(0, 1) for t in (keys, values))  # [H, n, D]
        scores = scale * q[b].transpose(0, 1) @ keys.mT  # [H, L, n]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = length - queries + torch.arange(queries, device=q.device)[:, None]
        distance = position - torch.arange(length, device=q.device)
        if alibi_slopes is not None:
            scores = (
                scores
                - (alibi_slopes[b] if alibi_slopes.ndim == 2 else alibi_slopes).to(q.dtype)[:, None, None] * distance
            )
        keep = distance >= 0
        if window is not None:
            keep = keep & (distance < window)
        scores = scores.masked_fill(~keep, -math.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(q.dtype)[:, None, None].expand(heads, queries, 1)), -1)
        lse[b] = torch.logsumexp(scores, -1) if scores.shape[-1] else -math.inf
        weights = torch.exp(scores - lse[b].nan_to_num(neginf=0.0)[..., None])[..., :length]
        # 0 * NaN is NaN: values that are not finite count only for the queries that take them.
        finite = values.isfinite()
        mean = weights @ values.where(finite, 0)
        touched = keep.to(values.dtype) @ (~finite).to(values.dtype) > 0
        out[b] = torch.where(touched, weights @ values, mean).transpose(0, 1)
    return out, lse


def _tokens(
    cache: Tensor, scale: Tensor | None, b: int, length: int, block_table: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The first `length` tokens of sequence b [length, Hkv, D] as floats."""

    def of(t: Tensor) -> Tensor:
        return t[b, :length] if block_table is None else t[block_table[b].long()].flatten(0, 1)[:length]

    if block_table is not None:
        block_table = block_table[:, : -(-length // cache.shape[1])]
    tokens = of(cache).to(dtype)
    return tokens if scale is None else tokens * of(scale).to(dtype)[..., None]
