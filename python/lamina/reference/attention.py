"""What attention computes, in plain PyTorch."""

import math

import torch
from torch import Tensor

from lamina.reference.token_panels import PANEL, token_panels, token_rows


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
    seed: Tensor | int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T + mask) @ value over [..., H, L, D], [..., Hkv, S, D], [..., Hkv, S, Dv].

    A key that a mask excludes (False, -inf, or outside of the query's window) takes no part, whatever it and its value
    hold; a query without keys gives 0. The arguments after `enable_gqa` are those of `lamina.ops.attention`; `seed`
    decides which weights dropout keeps.
    """
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
        scores = scores - alibi_slopes[..., None, None].to(scores.dtype) * distance.abs()
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

    if dropout_p:
        batch = weights.reshape(-1, *weights.shape[-3:]) if weights.ndim > 2 else weights[None, None]
        kept = dropout_mask(int(seed), batch.shape, dropout_p).to(scores.device).view(weights.shape)
        weights = weights * kept / kept_share(dropout_p) if kept_share(dropout_p) else weights * 0

    # 0 * NaN is NaN: values that are not finite count only in the rows that keep their key.
    finite = value.isfinite()
    out = weights @ value.where(finite, 0)
    if not finite.all():
        touched = keep.to(value.dtype) @ (~finite).to(value.dtype) > 0
        out = torch.where(touched, weights @ value, out)
    return (out, torch.logsumexp(scores, -1)) if return_lse else out


def attention_panels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    length: int,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Self-attention of sequences in panels (see token_panels): query, key [P, H D, 32], value [P, H Dv, 32]."""
    sequences = query.shape[0] // -(-length // PANEL)
    q, k, v = (
        token_rows(panels, (sequences, length)).unflatten(2, (heads, -1)).transpose(1, 2)
        for panels in (query, key, value)
    )
    mask = None if mask is None else mask[:, None, None, :]
    return token_panels(attention(q, k, v, mask, scale=scale).transpose(1, 2).flatten(2))


def kept_share(dropout_p: float) -> float:
    """The probability with which dropout keeps a weight: 1 - dropout_p to the nearest multiple of 2^-16."""
    return round((1 - dropout_p) * 65536) / 65536


def dropout_mask(seed: int, shape: tuple[int, ...], dropout_p: float) -> Tensor:
    """Which weights [B, H, L, S] dropout keeps.

    Philox4x32 with 7 rounds (Salmon et al., SC 2011), key = seed, counter = (query, key / 8, head, batch): 16 bits for
    each of the 8 keys of a block, the lower half of a word first; kept where they are below 2^16 * kept_share.
    """
    batch, heads, queries, keys = shape
    low = 0xFFFFFFFF
    blocks = (keys + 7) // 8
    counter = torch.meshgrid(*map(torch.arange, (batch, heads, queries, blocks)), indexing="ij")
    c2, c3, c0, c1 = counter[1], counter[0], counter[2], counter[3]
    k0, k1 = seed & low, seed >> 32 & low

    def product(c: Tensor, factor: int) -> tuple[Tensor, Tensor]:
        """High and low half of a 64-bit product, by 16 bits of the factor at a time."""
        upper, lower = c * (factor >> 16), c * (factor & 0xFFFF)
        carried = upper + (lower >> 16)
        return carried >> 16, (carried << 16 | lower & 0xFFFF) & low

    for _ in range(7):
        (high0, low0), (high2, low2) = product(c0, 0xD2511F53), product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    halves = [half for word in (c0, c1, c2, c3) for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(halves, -1).flatten(-2)[..., :keys]
    return bits < round((1 - dropout_p) * 65536)
