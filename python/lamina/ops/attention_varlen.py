"""attention_varlen: attention over sequences that lie one after the other, without padding."""

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.attention import _window_sides, attention
from lamina.ops.library import define

_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
    "bool is_causal, float? scale, int window_left, int window_right, float softcap, Tensor? alibi_slopes, "
    "Tensor? sinks)"
)


def _new_output(q: Tensor, v: Tensor) -> Tensor:
    """[total_q, H, Dv], contiguous."""
    if q.ndim != 3 or v.ndim != 3:
        shapes = f"{list(q.shape)} and v {list(v.shape)}"
        raise ValueError(f"attention_varlen: q is {shapes}, but both must have three dimensions")
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _new_lse(q: Tensor) -> Tensor:
    """[H, total_q], float64 where the query is and float32 where it is anything else."""
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(q.shape[1], q.shape[0], dtype=dtype)


def _run(lse: Tensor | None, q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, *rest) -> Tensor:
    out = _new_output(q, v)
    scale = max(q.shape[2], 1) ** -0.5 if scale is None else scale
    _C.attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, *rest, out, lse)
    return out


def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    rest = (is_causal, scale, window_left, window_right, softcap, alibi_slopes, sinks)
    return _run(None, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *rest)


def _lse_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    lse = _new_lse(q)
    rest = (is_causal, scale, window_left, window_right, softcap, alibi_slopes, sinks)
    return _run(lse, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *rest), lse


def _fake(q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
    return _new_output(q, v)


def _lse_fake(q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor]:
    return _new_output(q, v), _new_lse(q)


_attention_varlen = define(f"attention_varlen{_ARGUMENTS} -> Tensor", cpu=_cpu, fake=_fake)
_attention_varlen_with_lse = define(
    f"attention_varlen.with_lse{_ARGUMENTS} -> (Tensor, Tensor)", cpu=_lse_cpu, fake=_lse_fake
)


def _sequence_by_sequence(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, alibi_slopes: Tensor | None, **options
) -> tuple[Tensor, Tensor]:
    """The same through `attention`, for calls that need its gradient."""
    outputs = [q.new_zeros(0, q.shape[1], v.shape[2])]
    lses = [q.new_zeros(q.shape[1], 0, dtype=_new_lse(q).dtype)]
    q_ends, k_ends = cu_q.tolist(), cu_k.tolist()
    for b in range(len(q_ends) - 1):
        queries, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        out, lse = attention(
            *(t.transpose(0, 1)[None] for t in (q[queries], k[keys], v[keys])),
            enable_gqa=k.shape[1] != q.shape[1],
            alibi_slopes=alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[b],
            causal_alignment="bottom_right",
            return_lse=True,
            **options,
        )
        outputs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, 1)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of many sequences of different lengths that lie one after the other, without padding.

    The arguments are those of flash-attn's `flash_attn_varlen_func`. Sequence b is the tokens cu_seqlens[b] to
    cu_seqlens[b + 1] - 1 and looks at nothing else; one of length 0 is fine. Numerics are those of `attention`, whose
    kernels compute it, gradients included.

    Args:
        q: [total_q, H, D], float32, bfloat16, float16 or float64.
        k: [total_k, Hkv, D], H a multiple of Hkv.
        v: [total_k, Hkv, Dv]; D and Dv at most 256.
        cu_seqlens_q: [B + 1] int32 or int64, rising from 0 to total_q.
        cu_seqlens_k: [B + 1], rising from 0 to total_k.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's lengths.
        is_causal: the query that is i-th from the end of its sequence takes no key after the i-th from the end, as in
            flash-attn ("bottom right").
        scale: of the scores, 1 / sqrt(D) by default.
        window: (left, right), how far a query sees from the key level with it; -1 or None for no limit, and a number n
            for (n, n).
        softcap: scores become softcap * tanh(score / softcap).
        alibi_slopes: [H] or [B, H]; -slope * |distance| is added to the scores.
        sinks: [H], a logit of each head that takes weight and gives no value.
        return_lse: also give the logarithm of the sum of exponentials of each query's scores, sinks included.

    Returns [total_q, H, Dv], and with return_lse also [H, total_q] float32 (float64 for float64 inputs); a query
    without keys gives 0 and -inf. Raises ValueError when shapes, dtypes or cumulative lengths do not fit.

    >>> ends = torch.tensor([0, 5, 5, 17], dtype=torch.int32)  # sequences of 5, 0 and 12 tokens
    >>> y = lamina.ops.attention_varlen(q, k, v, ends, ends, 12, 12, is_causal=True)
    """
    sides = _window_sides(window)
    tensors = (q, k, v, alibi_slopes, sinks)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        options = {"is_causal": is_causal, "scale": scale, "window": sides, "softcap": softcap, "sinks": sinks}
        out, lse = _sequence_by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, **options)
        return (out, lse) if return_lse else out
    floats = _new_lse(q).dtype if alibi_slopes is not None or sinks is not None else None
    run = _attention_varlen_with_lse if return_lse else _attention_varlen
    return run(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        is_causal,
        scale,
        *sides,
        softcap or 0.0,
        None if alibi_slopes is None else alibi_slopes.to(floats),
        None if sinks is None else sinks.to(floats),
    )
