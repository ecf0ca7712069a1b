"""attention_varlen: attention over sequences that lie one after the other, without padding."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamina import _C
from lamina.ops.attention import _needs_gradient, _runs_here, _window_sides, attention
from lamina.ops.attention_backward import call_attention_backward, check_on_gpu
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


def _as_batch(t: Tensor) -> Tensor:
    """[total, H, D] -> [1, H, total, D]."""
    return t.transpose(0, 1)[None]


def _ends_on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, int, int]:
    """Checks what can be known without waiting for the device: of the lengths, their shape and dtype."""
    if not q.ndim == k.ndim == v.ndim == 3:
        shapes = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        raise ValueError(f"attention_varlen: q, k and v are {shapes}, but must have three dimensions")
    for name, ends in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if ends.dtype not in (torch.int32, torch.int64):
            dtype = str(ends.dtype).removeprefix("torch.")
            raise ValueError(f"attention_varlen: {name} is {dtype}, but must be int32 or int64")
        if ends.ndim != 1 or ends.shape[0] < 1 or ends.shape != cu_q.shape:
            count = cu_q.shape[0] if cu_q.ndim == 1 else "B + 1"
            raise ValueError(f"attention_varlen: {name} has shape {list(ends.shape)}, but must be [{count}]")
    batch = cu_q.shape[0] - 1
    if alibi_slopes is not None and alibi_slopes.ndim == 2:
        if alibi_slopes.shape != (batch, q.shape[1]):
            shape = f"{list(alibi_slopes.shape)}, but must be {[batch, q.shape[1]]}"
            raise ValueError(f"attention_varlen: alibi_slopes has shape {shape}")
        alibi_slopes = None
    check_on_gpu("attention_varlen", *map(_as_batch, (q, k, v)), None, softcap, alibi_slopes, sinks, 0.0)
    return cu_q.to(q.device).contiguous(), cu_k.to(q.device).contiguous(), max_q, max_k


def _on_gpu(
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    from lamina.kernels.attention import attention as launch

    ends = _ends_on_gpu(q, k, v, cu_q, cu_k, max_q, max_k, softcap, alibi_slopes, sinks)
    out = _new_output(q, v)
    launch(
        *map(_as_batch, (q, k, v)),
        None,
        _as_batch(out),
        None if lse is None else lse[None],
        is_causal=is_causal,
        scale=q.shape[2] ** -0.5 if scale is None else scale,
        window_left=window_left,
        window_right=window_right,
        bottom_right=True,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        ends=ends,
    )
    return out


def _cuda(q: Tensor, *rest) -> Tensor:
    return _on_gpu(None, q, *rest)


def _lse_cuda(q: Tensor, *rest) -> tuple[Tensor, Tensor]:
    lse = _new_lse(q)
    return _on_gpu(lse, q, *rest), lse


def _fake(q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
    return _new_output(q, v)


def _lse_fake(q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor]:
    return _new_output(q, v), _new_lse(q)


_attention_varlen = define(f"attention_varlen{_ARGUMENTS} -> Tensor", cpu=_cpu, fake=_fake, cuda=_cuda)
_attention_varlen_with_lse = define(
    f"attention_varlen.with_lse{_ARGUMENTS} -> (Tensor, Tensor)", cpu=_lse_cpu, fake=_lse_fake, cuda=_lse_cuda
)


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    slopes_gradient: bool,
    sinks_gradient: bool,
) -> list[Tensor]:
    """Five, always; those of slopes and sinks are empty where they are not wanted."""
    rest = (
        lse.new_zeros(t.shape if want else 0) for t, want in ((alibi_slopes, slopes_gradient), (sinks, sinks_gradient))
    )
    return [*(t.new_empty(t.shape) for t in (q, k, v)), *rest]


def _backward_cpu(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
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
    slopes_gradient: bool,
    sinks_gradient: bool,
) -> tuple[Tensor, ...]:
    gradients = _gradients(q, k, v, lse, alibi_slopes, sinks, slopes_gradient, sinks_gradient)
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_ends) - 1):
        queries, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        of_each = alibi_slopes is not None and alibi_slopes.ndim == 2
        parts = call_attention_backward(
            *map(_as_batch, (grad_out[queries], q[queries], k[keys], v[keys], out[queries])),
            lse[None, :, queries],
            None if grad_lse is None else grad_lse[None, :, queries],
            None,
            is_causal,
            scale,
            window_left,
            window_right,
            True,
            softcap,
            alibi_slopes[b] if of_each else alibi_slopes,
            sinks,
            0.0,
            None,
            False,
            slopes_gradient,
            sinks_gradient,
        )
        for whole, part, rows in zip(gradients, parts, (queries, keys, keys), strict=False):
            whole[rows] = part[0].transpose(0, 1)
        if slopes_gradient:
            (gradients[3][b] if of_each else gradients[3]).add_(parts[4])
        if sinks_gradient:
            gradients[4].add_(parts[5])
    return tuple(gradients)


def _backward_cuda(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
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
    slopes_gradient: bool,
    sinks_gradient: bool,
) -> tuple[Tensor, ...]:
    from lamina.kernels.attention_backward import attention_backward as launch

    longest = max_seqlen_q, max_seqlen_k
    ends = _ends_on_gpu(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, softcap, alibi_slopes, sinks)
    grad_out = grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()
    gradients = [t.new_empty(t.shape) for t in (q, k, v)]
    _, *rest = launch(
        *map(_as_batch, (grad_out, q, k, v, out)),
        lse[None],
        None if grad_lse is None else grad_lse[None],
        None,
        *map(_as_batch, gradients),
        is_causal=is_causal,
        scale=q.shape[2] ** -0.5 if scale is None else scale,
        window_left=window_left,
        window_right=window_right,
        bottom_right=True,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        ends=ends,
        slopes_gradient=slopes_gradient,
        sinks_gradient=sinks_gradient,
    )
    return *gradients, *(lse.new_empty(0) if t is None else t for t in rest)


def _backward_fake(grad_out, q, k, v, out, lse, grad_lse, *rest) -> tuple[Tensor, ...]:
    return tuple(_gradients(q, k, v, lse, *rest[-4:]))


_backward = define(
    "attention_varlen.backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? grad_lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, bool is_causal, "
    "float? scale, int window_left, int window_right, float softcap, Tensor? alibi_slopes, Tensor? sinks, "
    "bool slopes_gradient, bool sinks_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=_backward_fake,
    cuda=_backward_cuda,
)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, alibi_slopes, sinks, *options):
        max_q, max_k, is_causal, scale, left, right, softcap = options
        limits = is_causal, scale, left, right, softcap
        out, lse = _attention_varlen_with_lse(q, k, v, cu_q, cu_k, max_q, max_k, *limits, alibi_slopes, sinks)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, alibi_slopes, sinks)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * 14
        q, k, v, out, lse, cu_q, cu_k, alibi_slopes, sinks = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        wanted = ctx.needs_input_grad[5:7]
        tensors = grad_out, q, k, v, out, lse, grad_lse, cu_q, cu_k
        *gradients, slopes, sink = _backward(*tensors, *ctx.options, alibi_slopes, sinks, *wanted)
        rest = (t if want else None for t, want in zip((slopes, sink), wanted, strict=True))
        return *gradients, None, None, *rest, *(None,) * 7


def _sequence_by_sequence(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, alibi_slopes: Tensor | None, **options
) -> tuple[Tensor, Tensor]:
    """The same through `attention`, for calls that no kernel takes."""
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
    if not q.is_cpu and not _runs_here(q, v):
        options = {"is_causal": is_causal, "scale": scale, "window": sides, "softcap": softcap, "sinks": sinks}
        out, lse = _sequence_by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, **options)
        return (out, lse) if return_lse else out
    if alibi_slopes is not None or sinks is not None:
        floats = torch.float64 if q.dtype is torch.float64 else torch.float32
        alibi_slopes = None if alibi_slopes is None else alibi_slopes.to(floats)
        sinks = None if sinks is None else sinks.to(floats)
    tensors = q, k, v, cu_seqlens_q, cu_seqlens_k
    longest, limits = (max_seqlen_q, max_seqlen_k), (is_causal, scale, *sides, softcap or 0.0)
    if _needs_gradient(q, k, v, alibi_slopes, sinks):
        out, lse = _WithGradient.apply(*tensors, alibi_slopes, sinks, *longest, *limits)
        return (out, lse) if return_lse else out
    run = _attention_varlen_with_lse if return_lse else _attention_varlen
    return run(*tensors, *longest, *limits, alibi_slopes, sinks)
