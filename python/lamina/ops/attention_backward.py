"""attention_backward: the gradients of attention, from its output and log-sum-exp, in one pass over the scores."""

from typing import NamedTuple

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.library import define


def _new_gradient(tensor: Tensor) -> Tensor:
    """Like a tensor [B, H, L, D] whose columns are adjacent, in its memory order where that is [B, L, H, D]."""
    batch, heads, length, size = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty(batch, length, heads, size).transpose(1, 2)
    return tensor.new_empty(batch, heads, length, size)


def _gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """What the kernel writes: for query, key and value, and for mask, slopes and sinks where they are given."""
    floats = torch.float64 if query.dtype is torch.float64 else torch.float32
    rest = [None if t is None else t.new_zeros(t.shape, dtype=floats) for t in (attn_mask, alibi_slopes, sinks)]
    return [_new_gradient(t) for t in (query, key, value)], rest


def _as_four(t: Tensor) -> Tensor:
    return t if t.ndim == 4 else t[(None,) * (4 - t.ndim)]


def _cpu(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    mask_gradient: bool,
    slopes_gradient: bool,
    sinks_gradient: bool,
) -> tuple[Tensor, ...]:
    if not 2 <= query.ndim <= 4 or not query.ndim == key.ndim == value.ndim:
        shapes = ", ".join(str(list(t.shape)) for t in (query, key, value))
        raise ValueError(f"attention_backward: query, key and value are {shapes}, but must have 2, 3 or 4 dimensions")
    shapes = query.shape, key.shape, value.shape
    if query.ndim < 4:
        query, key, value, out, grad_out = map(_as_four, (query, key, value, out, grad_out))
        lse = lse[(None,) * (3 - lse.ndim)]
        grad_lse = None if grad_lse is None else grad_lse[(None,) * (3 - grad_lse.ndim)]
    if scale is None:
        scale = query.shape[3] ** -0.5
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()  # that of a sum is one number, expanded
    tensors, rest = _gradients(
        query,
        key,
        value,
        attn_mask if mask_gradient else None,
        alibi_slopes if slopes_gradient else None,
        sinks if sinks_gradient else None,
    )
    _C.attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        grad_lse,
        attn_mask,
        is_causal,
        scale,
        window_left,
        window_right,
        bottom_right,
        softcap,
        alibi_slopes,
        sinks,
        dropout_p,
        0 if seed is None else int(seed),
        *tensors,
        *rest,
    )
    if mask_gradient:
        rest[0] = rest[0].to(attn_mask.dtype)
    tensors = [t.reshape(shape) for t, shape in zip(tensors, shapes, strict=True)]
    return *tensors, *(query.new_empty(0) if t is None else t for t in rest)


MAX_HEAD_SIZE = 256


def check_on_gpu(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
) -> None:
    """What csrc/ops/attention_inputs.cpp asks of calls on the CPU. Triton kernels check nothing themselves."""

    def check(ok: bool, message: str) -> None:
        if not ok:
            raise ValueError(f"{op}: {message}")

    q, k, v = query.shape, key.shape, value.shape
    names = ", ".join(str(t.dtype).removeprefix("torch.") for t in (query, key, value))
    types = (torch.float32, torch.bfloat16, torch.float16)
    check(query.dtype in types, f"query, key and value are {names}, but must be float32, bfloat16 or float16 on a GPU")
    check(query.dtype == key.dtype == value.dtype, f"query, key and value are {names}, but must be of one dtype")
    check(len(q) == len(k) == len(v) == 4, f"query, key and value are {q}, {k}, {v}, but must have four dimensions")
    check(k[0] == q[0] and k[3] == q[3], f"key has shape {list(k)}, but must be [{q[0]}, *, *, {q[3]}]")
    fits = q[1] % k[1] == 0 if k[1] else q[1] == 0
    check(fits, f"query has {q[1]} heads and key has {k[1]}, but the first must be a multiple of the second")
    check(v[:3] == k[:3], f"value has shape {list(v)}, but must be [{k[0]}, {k[1]}, {k[2]}, *]")
    check(1 <= q[3] <= MAX_HEAD_SIZE, f"query is {list(q)}, but its head size must be 1 to {MAX_HEAD_SIZE}")
    check(v[3] <= MAX_HEAD_SIZE, f"value is {list(v)}, but its head size must be at most {MAX_HEAD_SIZE}")
    if attn_mask is not None:
        types = (torch.bool, torch.float32, query.dtype)
        check(attn_mask.dtype in types, f"attn_mask is {attn_mask.dtype}, but must be one of {types}")
        full = (q[0], q[1], q[2], k[2])
        tail = zip(reversed(attn_mask.shape), reversed(full), strict=False)
        fits = attn_mask.ndim <= 4 and all(n in (1, most) for n, most in tail)
        check(fits, f"attn_mask is {list(attn_mask.shape)}, but must broadcast to {list(full)}")
    check(softcap >= 0, f"softcap is {softcap:g}, but must be positive, or 0 for none")
    check(0 <= dropout_p <= 1, f"dropout_p is {dropout_p:g}, but must be between 0 and 1")
    if alibi_slopes is not None:
        fits = alibi_slopes.dtype is torch.float32 and tuple(alibi_slopes.shape) in ((q[1],), (q[0], q[1]))
        shape = f"{str(alibi_slopes.dtype).removeprefix('torch.')}{list(alibi_slopes.shape)}"
        check(fits, f"alibi_slopes is {shape}, but must be [{q[1]}] or [{q[0]}, {q[1]}] of float32")
    if sinks is not None:
        fits = sinks.dtype is torch.float32 and tuple(sinks.shape) == (q[1],)
        check(fits, f"sinks has shape {list(sinks.shape)}, but must be [{q[1]}] of float32")


def _cuda(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    mask_gradient: bool,
    slopes_gradient: bool,
    sinks_gradient: bool,
) -> tuple[Tensor, ...]:
    from lamina.kernels.attention_backward import attention_backward as launch

    shapes = query.shape, key.shape, value.shape
    query, key, value, out, grad_out = map(_as_four, (query, key, value, out, grad_out))
    lse = lse[(None,) * (3 - lse.ndim)]
    grad_lse = None if grad_lse is None else grad_lse[(None,) * (3 - grad_lse.ndim)]
    check_on_gpu("attention_backward", query, key, value, attn_mask, softcap, alibi_slopes, sinks, dropout_p)
    for what, t, shape in (
        ("grad_out", grad_out, (*query.shape[:3], value.shape[3])),
        ("out", out, (*query.shape[:3], value.shape[3])),
        ("lse", lse, query.shape[:3]),
    ):
        if t.shape != shape:
            raise ValueError(f"attention_backward: {what} has shape {list(t.shape)}, but must be {list(shape)}")
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()  # that of a sum is one number, expanded
    tensors = [_new_gradient(t) for t in (query, key, value)]
    rest = launch(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        grad_lse,
        attn_mask,
        *tensors,
        is_causal=is_causal,
        scale=query.shape[3] ** -0.5 if scale is None else scale,
        window_left=window_left,
        window_right=window_right,
        bottom_right=bottom_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
        mask_gradient=mask_gradient,
        slopes_gradient=slopes_gradient,
        sinks_gradient=sinks_gradient,
    )
    if mask_gradient:
        rest = rest[0].to(attn_mask.dtype), *rest[1:]
    tensors = [t.reshape(shape) for t, shape in zip(tensors, shapes, strict=True)]
    return *tensors, *(query.new_empty(0) if t is None else t for t in rest)


def _fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    mask_gradient: bool,
    slopes_gradient: bool,
    sinks_gradient: bool,
) -> tuple[Tensor, ...]:
    shapes = query.shape, key.shape, value.shape
    tensors, rest = _gradients(
        *map(_as_four, (query, key, value)),
        attn_mask if mask_gradient else None,
        alibi_slopes if slopes_gradient else None,
        sinks if sinks_gradient else None,
    )
    if mask_gradient:
        rest[0] = rest[0].to(attn_mask.dtype)
    tensors = [t.reshape(shape) for t, shape in zip(tensors, shapes, strict=True)]
    return *tensors, *(query.new_empty(0) if t is None else t for t in rest)


# Six gradients, always; those of mask, slopes and sinks are empty where they are not wanted.
call_attention_backward = define(
    "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor? grad_lse, Tensor? attn_mask, bool is_causal, float? scale, int window_left, int window_right, "
    "bool bottom_right, float softcap, Tensor? alibi_slopes, Tensor? sinks, float dropout_p, Tensor? seed, "
    "bool mask_gradient, bool slopes_gradient, bool sinks_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)


class AttentionGradients(NamedTuple):
    """One for each input of attention, of its shape and dtype; None for what was not given or has no gradient."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    grad_lse: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_alignment: str = "top_left",
    seed: Tensor | None = None,
) -> AttentionGradients:
    """The gradients of `attention` (which calls this by itself): what it was called with, what it gave, and grad_out.

    Scores are computed again from `lse` and never stored as a whole. Sums are float32 (float64 for float64 inputs),
    rounded once; with bfloat16 inputs the weights and their gradients are rounded to bfloat16 before the products
    where the processor has such, and on a GPU with float16 ones to float16. Each sum has one owner and a fixed order:
    the same inputs give the same bits for every number of threads. Keys that a mask excludes get and give nothing, even
    if they are NaN. There is no second derivative.

    FlashAttention-2 (Dao 2023, arXiv:2307.08691) describes the method.

    Args:
        grad_out: [B, H, L, Dv], or two or three dimensions like the query.
        query: [B, H, L, D], float32, bfloat16, float16 or float64. Nothing but the mask is broadcast.
        key: [B, Hkv, S, D], H a multiple of Hkv.
        value: [B, Hkv, S, Dv].
        out: what attention gave.
        lse: its log-sum-exp [B, H, L].
        attn_mask: as in `attention`; the gradient of an added one is summed over its broadcast dimensions.
        dropout_p: with the forward's `seed`.
        is_causal: as in `attention`.
        scale: as in `attention`.
        grad_lse: gradient of lse, or None.
        window: (left, right), -1 for no limit.
        softcap: 0 for none.
        alibi_slopes: [H] or [B, H], float32.
        sinks: [H], float32.
        causal_alignment: as in `attention`.
        seed: int64 [], as torch.ops.lamina.attention.with_lse takes it.

    Returns the gradients. Raises ValueError when shapes or dtypes do not fit.

    >>> out, lse = lamina.ops.attention(q, k, v, is_causal=True, return_lse=True)
    >>> dq, dk, dv, *_ = lamina.ops.attention_backward(grad, q, k, v, out, lse, is_causal=True)
    """
    wanted = attn_mask is not None and attn_mask.is_floating_point(), alibi_slopes is not None, sinks is not None
    gradients = call_attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        grad_lse,
        attn_mask,
        is_causal,
        scale,
        *window,
        causal_alignment == "bottom_right",
        softcap,
        alibi_slopes,
        sinks,
        dropout_p,
        seed,
        *wanted,
    )
    rest = (t if want else None for t, want in zip(gradients[3:], wanted, strict=True))
    return AttentionGradients(*gradients[:3], *rest)
