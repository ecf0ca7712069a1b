"""attention_decode: a few new queries over a cache of keys and values."""

import torch
from torch import Tensor

from lamina import _C
from lamina.ops.attention import _window_sides
from lamina.ops.library import define
from lamina.reference.quantize_rows import quantize_rows as quantize_rows_reference

_ARGUMENTS = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, float? scale, int? window, "
    "float? softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? k_scale, Tensor? v_scale)"
)


def _new_output(q: Tensor, v_cache: Tensor) -> Tensor:
    """[B, L, H, Dv], contiguous."""
    if q.ndim != 4 or v_cache.ndim != 4:
        shapes = f"{list(q.shape)} and v_cache {list(v_cache.shape)}"
        raise ValueError(f"attention_decode: q is {shapes}, but both must have four dimensions")
    return q.new_empty(*q.shape[:3], v_cache.shape[3])


def _new_lse(q: Tensor) -> Tensor:
    """[B, H, L]."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


def _run(lse: Tensor | None, q, k_cache, v_cache, cache_seqlens, block_table, scale, *rest) -> Tensor:
    out = _new_output(q, v_cache)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    _C.attention_decode(q, k_cache, v_cache, cache_seqlens, block_table, scale, *rest, out, lse)
    return out


def _cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    rest = (window, softcap, alibi_slopes, sinks, k_scale, v_scale)
    return _run(None, q, k_cache, v_cache, cache_seqlens, block_table, scale, *rest)


def _lse_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    lse = _new_lse(q)
    rest = (window, softcap, alibi_slopes, sinks, k_scale, v_scale)
    return _run(lse, q, k_cache, v_cache, cache_seqlens, block_table, scale, *rest), lse


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_) -> Tensor:
    return _new_output(q, v_cache)


def _lse_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_) -> tuple[Tensor, Tensor]:
    return _new_output(q, v_cache), _new_lse(q)


def _has_kernels(tensor: Tensor) -> bool:
    return _C.with_cuda and _C.has_code_cuda(tensor.get_device())


def _run_on_cuda(lse: Tensor | None, q, k_cache, v_cache, cache_seqlens, block_table, scale, *rest) -> Tensor:
    out = _new_output(q, v_cache)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not _has_kernels(q):
        return _composite(q, k_cache, v_cache, cache_seqlens, block_table, scale, *rest, out, lse)
    workspace = q.new_empty(_C.attention_decode_workspace_cuda(q, k_cache, v_cache, block_table), dtype=torch.float32)
    _C.attention_decode_cuda(q, k_cache, v_cache, cache_seqlens, block_table, scale, *rest, out, lse, workspace)
    return out


def _cuda(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table, scale, *rest) -> Tensor:
    return _run_on_cuda(None, q, k_cache, v_cache, cache_seqlens, block_table, scale, *rest)


def _lse_cuda(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table, scale, *rest
) -> tuple[Tensor, Tensor]:
    lse = _new_lse(q)
    return _run_on_cuda(lse, q, k_cache, v_cache, cache_seqlens, block_table, scale, *rest), lse


def _composite(
    q, k_cache, v_cache, cache_seqlens, block_table, scale, window, softcap, alibi_slopes, sinks, k_scale, v_scale, out,
    lse,
) -> Tensor:  # fmt: skip
    """The same in PyTorch's operations, for builds without kernels for the device.

    It reads whole caches, but never waits for the device.
    """
    queries, heads = q.shape[1:3]
    if 0 in q.shape[:3] or k_cache.shape[2] == 0:
        if lse is not None:
            lse.fill_(-torch.inf)
        return out.zero_()

    def of_sequences(cache: Tensor, scales: Tensor | None) -> Tensor:
        """[B, S, Hkv, size], float32."""
        if block_table is not None:
            # Entries behind a sequence's end may be anything.
            blocks = block_table.long().clamp(0, max(cache.shape[0] - 1, 0))
            cache = cache[blocks].flatten(1, 2)
            scales = scales if scales is None else scales[blocks].flatten(1, 2)
        return cache.float() if scales is None else cache.float() * scales[..., None]

    keys, values = of_sequences(k_cache, k_scale), of_sequences(v_cache, v_scale)
    group = heads // keys.shape[2]
    token = torch.arange(keys.shape[1], device=q.device)
    position = cache_seqlens.long()[:, None] - queries + torch.arange(queries, device=q.device)  # [B, L]
    distance = position[..., None] - token  # [B, L, S]
    keep = distance >= 0
    if window is not None:
        keep = keep & (distance < window)
    # [B, Hkv, L, group, ...]: the heads of a group meet the same keys.
    scores = torch.einsum("blhgd,bshd->bhlgs", q.float().unflatten(2, (-1, group)) * scale, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(q.shape[0], heads).unflatten(1, (-1, group))
        scores = scores - slopes[:, :, None, :, None] * distance[:, None, :, None]
    keep = keep[:, None, :, None]
    scores = torch.where(keep, scores, -torch.inf)
    if sinks is not None:
        sink = sinks.unflatten(0, (-1, group))[None, :, None, :, None]
        scores = torch.cat((scores, sink.expand(*scores.shape[:-1], 1)), -1)
    total = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    weights = torch.exp(scores - total.nan_to_num(neginf=0.0, nan=torch.nan, posinf=torch.inf)[..., None])
    weights = weights[..., : keys.shape[1]]
    # Zero times a value that is not finite would be NaN where a query does not take it.
    finite = values.isfinite()
    result = torch.einsum("bhlgs,bshd->bhlgd", weights, values.where(finite, 0))
    touched = torch.einsum("bls,bshd->bhld", keep[:, 0, :, 0].float(), (~finite).float()) > 0
    result = torch.where(touched[:, :, :, None], torch.nan, result)
    if lse is not None:
        lse.copy_(total.transpose(2, 3).flatten(1, 2))
    return out.copy_(result.permute(0, 2, 1, 3, 4).flatten(2, 3))


_attention_decode = define(f"attention_decode{_ARGUMENTS} -> Tensor", cpu=_cpu, fake=_fake, cuda=_cuda)
_attention_decode_with_lse = define(
    f"attention_decode.with_lse{_ARGUMENTS} -> (Tensor, Tensor)", cpu=_lse_cpu, fake=_lse_fake, cuda=_lse_cuda
)


def _append_cpu(
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    _C.attention_decode_append(k_cache, v_cache, cache_seqlens, k, v, block_table, k_scale, v_scale)


def _append_cuda(
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    if _has_kernels(k):
        _C.attention_decode_append_cuda(k_cache, v_cache, cache_seqlens, k, v, block_table, k_scale, v_scale)
        return
    token = cache_seqlens.long()[:, None] + torch.arange(k.shape[1], device=k.device)  # [B, L]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if 0 in k.shape[:3] or capacity == 0:
        return
    fits = ((token[:, :1] >= 0) & (token[:, -1:] < capacity)).expand_as(token)
    token = token.clamp(0, capacity - 1)
    first = torch.arange(k.shape[0], device=k.device)[:, None].expand_as(token)
    if block_table is not None:
        first = block_table.long().gather(1, token // k_cache.shape[1])
        fits = fits & (first >= 0) & (first < k_cache.shape[0])
        first, token = first.clamp(0, max(k_cache.shape[0] - 1, 0)), token % k_cache.shape[1]
    # Without waiting for the device nobody knows how many there are to write. What does not fit writes once more what
    # another row does or, where none fits, what is there already.
    fits, first, token = fits.flatten(), first.flatten(), token.flatten()
    another = fits.long().argmax()
    row = torch.where(fits, torch.arange(fits.numel(), device=k.device), another)
    first, token, fits = first[row], token[row], fits[another]
    for cache, scales, new in ((k_cache, k_scale, k), (v_cache, v_scale, v)):
        new = new.flatten(0, 1)[row]
        if scales is not None:
            new, of_rows = quantize_rows_reference(new)
            scales[first, token] = torch.where(fits, of_rows, scales[first, token])
        cache[first, token] = torch.where(fits, new, cache[first, token])


def _append_fake(*_) -> None:
    return None


_append = define(
    "attention_decode.append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor k, Tensor v, "
    "Tensor? block_table, Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()",
    cpu=_append_cpu,
    fake=_append_fake,
    cuda=_append_cuda,
)


def _lengths(cache_seqlens: Tensor | int, q: Tensor) -> Tensor:
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens of each sequence over its cache of keys and values: one step of generation.

    The layouts are those of flash-attn's `flash_attn_with_kvcache`: tokens before heads. A cache that lies with heads
    before tokens, as transformers has it, goes in as a view, `cache.transpose(1, 2)`; nothing is copied. The new
    tokens' own keys and values must be in the cache already (`append_to_cache_`) and count in cache_seqlens.

    Query i of L is token n = cache_seqlens - L + i of its sequence and takes tokens 0 to n.
    What lies in a cache behind cache_seqlens is not read. A query without keys gives 0. Scores, softmax and sums are
    float32; with a bfloat16 cache, softmax weights are rounded to bfloat16 where the processor multiplies such pairs.
    The cache is read in pieces of a fixed number of tokens whose results are merged by their log-sum-exp (Dao et al.,
    "Flash-Decoding for long-context inference", 2023), so the same inputs give the same bits for any number of threads.

    Args:
        q: [B, L, H, D], float32, bfloat16 or float16; L is 1 for one new token, more for several (a draft to verify, a
            prompt in chunks).
        k_cache: [B, S, Hkv, D] with H a multiple of Hkv, any strides, of the query's dtype or int8. With a block_table
            [blocks, block_size, Hkv, D], blocks of any size.
        v_cache: the same with Dv instead of D; D and Dv at most 256.
        cache_seqlens: [B] int32 or int64, the tokens in each sequence's cache, or one number for all.
        block_table: [B, max_blocks] int32; token t of sequence b is token t % block_size of block
            block_table[b, t // block_size]. Entries behind a sequence's end are not looked at.
        scale: of the scores, 1 / sqrt(D) by default.
        window: (left, right) as attention takes it, of which the right side means nothing here: query n takes the
            tokens n - left to n. A number is (left, left); -1 or None for no limit.
        softcap: scores s become softcap * tanh(s / softcap).
        alibi_slopes: [H] or [B, H] float32; slope * (distance in tokens) is subtracted from a score, after the cap.
        sinks: [H] float32, one more score in each head's softmax that has no value.
        k_scale: [B, S, Hkv] or [blocks, block_size, Hkv] float32, what a code of an int8 k_cache is worth.
        v_scale: the same for v_cache.
        return_lse: also return the logarithm of the sum of exponentials of each query's scores, sink included.

    Returns [B, L, H, Dv] of the query's dtype, and with return_lse also [B, H, L] float32 (-inf for a query without
    keys). Raises ValueError when shapes, dtypes, lengths or the block table do not fit, or a gradient is wanted.

    >>> lamina.ops.append_to_cache_(k_cache, v_cache, lengths, k, v)
    >>> y = lamina.ops.attention_decode(q, k_cache, v_cache, lengths + k.shape[1])
    """
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
        raise ValueError("attention_decode: it has no gradient; call it under torch.no_grad(), or train with attention")
    if window is not None:
        left, _ = _window_sides(window)
        window = None if left < 0 else left + 1
    run = _attention_decode_with_lse if return_lse else _attention_decode
    return run(
        q,
        k_cache,
        v_cache,
        _lengths(cache_seqlens, q),
        block_table,
        scale,
        window,
        softcap,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
    )


def append_to_cache_(
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int,
    k: Tensor,
    v: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write new keys and values into a cache, in place, behind what each sequence has there already.

    What flash-attn's `flash_attn_with_kvcache` does with its arguments k and v. cache_seqlens is left as it is: it
    counts the tokens before, and attention_decode wants those after, `cache_seqlens + L`. An int8 cache is given codes
    and scales of each token and head, max |x| / 127, those of `quantize_rows`.

    Args:
        k_cache, v_cache, block_table, k_scale, v_scale: as attention_decode takes them; the caches and, where they are
            int8, the scales are written.
        cache_seqlens: [B] int32 or int64, tokens in the cache before, or one number for all.
        k: [B, L, Hkv, D] of the cache's dtype, or float32 or bfloat16 for an int8 cache; any strides.
        v: [B, L, Hkv, Dv].

    Raises ValueError, before anything is written, when shapes or dtypes do not fit, or a sequence not into its cache;
    on a GPU, which is not waited for, nothing of such a sequence is written instead.

    >>> lamina.ops.append_to_cache_(k_cache, v_cache, lengths, k, v)
    """
    _append(k_cache, v_cache, _lengths(cache_seqlens, k), k, v, block_table, k_scale, v_scale)
