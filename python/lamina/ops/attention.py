"""attention: scaled dot product attention, forward, in one pass over the keys."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina import _C
from lamina.ops.library import define

MAX_HEAD_SIZE = 256


def _new_output(query: Tensor, value: Tensor) -> Tensor:
    """[B, H, L, Dv] in the query's memory order, as torch's kernel has it.

    A query that was projected as [B, L, H * D] lies as [B, L, H, D]; then so does the output, and the caller's
    `transpose(1, 2).reshape(B, L, H * Dv)` copies nothing.
    """
    if query.stride(3) == 1 and query.size(3) == value.size(3):
        return torch.empty_like(query)  # same order, and a microsecond less than by hand
    batch, heads, length, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
    return query.new_empty(batch, heads, length, value.shape[3])


def _is_plain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool) -> bool:
    """Whether the inputs are [B, H, L, D] each, with nothing to broadcast but the mask."""
    q, k, v = query.shape, key.shape, value.shape
    if q == k == v and len(q) == 4 and attn_mask is None:
        return True
    return (
        len(q) == len(k) == len(v) == 4
        and q[0] == k[0] == v[0]
        and k[1] == v[1]
        and (enable_gqa or q[1] == k[1])
        and (attn_mask is None or attn_mask.ndim <= 4)
    )


def _as_plain(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, torch.Size]:
    """torch's broadcasting rules -> four dimensions each, and the leading dimensions [..., H] of the output."""
    tensors = (query, key, value)
    if min(t.ndim for t in tensors) < 2:
        shapes = ", ".join(str(list(t.shape)) for t in tensors)
        raise ValueError(f"attention: query, key and value are {shapes}, but must have at least two dimensions")
    if enable_gqa:
        if min(t.ndim for t in tensors) < 3:
            raise ValueError("attention: enable_gqa needs a dimension of heads in query, key and value")
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
        leading = [(*batch, t.shape[-3]) for t in tensors]
    else:
        leading = [torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))] * 3

    def plain(t: Tensor, lead: tuple[int, ...]) -> Tensor:
        t = t.expand(*lead, *t.shape[-2:])
        if t.ndim == 4:
            return t
        return t[(None,) * (4 - t.ndim)] if t.ndim < 4 else t.flatten(0, -4)

    lead = leading[0]
    if attn_mask is not None and len(lead) > 2:
        attn_mask = attn_mask.expand(*lead, query.shape[-2], key.shape[-2]).flatten(0, -4)
    query, key, value = (plain(t, lead) for t, lead in zip(tensors, leading, strict=True))
    return query, key, value, attn_mask, torch.Size(lead)


def _cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    leading = None
    if not _is_plain(query, key, value, attn_mask, enable_gqa):
        query, key, value, attn_mask, leading = _as_plain(query, key, value, attn_mask, enable_gqa)
    if scale is None:
        scale = query.size(3) ** -0.5
    out = _new_output(query, value)
    _C.attention(query, key, value, attn_mask, is_causal, scale, out)
    return out if leading is None else out.reshape(*leading, *out.shape[2:])


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    leading = None
    if not _is_plain(query, key, value, attn_mask, enable_gqa):
        query, key, value, attn_mask, leading = _as_plain(query, key, value, attn_mask, enable_gqa)
    out = _new_output(query, value)
    return out if leading is None else out.reshape(*leading, *out.shape[2:])


_attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale, "
    "bool enable_gqa) -> Tensor",
    cpu=_cpu,
    fake=_fake,
)


def _runs_here(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> bool:
    """Whether lamina's kernels take this call; what they don't take is torch's."""
    if query.dtype is not torch.float32 and query.dtype is not torch.bfloat16:
        return False
    if not query.is_cpu or not 1 <= query.shape[-1] <= MAX_HEAD_SIZE or value.shape[-1] > MAX_HEAD_SIZE:
        return False
    return not torch.is_grad_enabled() or not (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (attn_mask is not None and attn_mask.requires_grad)
    )


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
    """`torch.nn.functional.scaled_dot_product_attention`: softmax(scale * query @ key^T + mask) @ value.

    Scores are accumulated in float32 and never stored as a whole: memory grows with the sequence length, not with its
    square. bfloat16 inputs are multiplied as they are and their softmax weights are rounded to bfloat16. A key that a
    mask excludes takes no part even if it or its value is NaN, and a query without keys gives 0. The same inputs give
    the same bits on every run and for every number of threads.

    What the kernels do not cover goes to torch's own op: dropout, calls that need gradients, dtypes other than float32
    and bfloat16, other devices than the CPU, heads larger than 256.

    Args:
        query: [..., H, L, D]; leading dimensions broadcast as in torch.
        key: [..., H, S, D].
        value: [..., H, S, Dv].
        attn_mask: broadcastable to [..., H, L, S]; boolean (True = keep), or float32 or the query's dtype, added to the
            scores. Together with is_causal both hold.
        dropout_p: probability of dropping a weight.
        is_causal: query i takes the keys j <= i.
        scale: of the scores, 1 / sqrt(D) by default.
        enable_gqa: key and value may have fewer heads, H a multiple of theirs.

    Returns [..., H, L, Dv] in the query's memory order. Raises ValueError when shapes or dtypes do not fit.

    >>> y = lamina.ops.attention(q, k, v, is_causal=True)
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    if dropout_p == 0.0 and _runs_here(query, key, value, attn_mask):
        return _attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
