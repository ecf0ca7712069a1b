"""attention: scaled dot product attention, forward, in one pass over the keys.

Two overloads: the plain one is what `scaled_dot_product_attention` computes and the cheapest call; `with_lse` takes
everything else as well and gives the log-sum-exp, which a gradient needs.
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lamina import _C
from lamina._backends import has_triton
from lamina.ops.attention_backward import MAX_HEAD_SIZE, call_attention_backward, check_on_gpu
from lamina.ops.library import define
from lamina.ops.token_panels import PANEL, new_codes
from lamina.reference.attention import attention as _composite


def _new_output(query: Tensor, value: Tensor) -> Tensor:
    """[B, H, L, Dv] in the query's memory order, as torch's kernel has it.

    A query that was projected as [B, L, H * D] lies as [B, L, H, D]; then so does the output, and the caller's
    `transpose(1, 2).reshape(B, L, H * Dv)` copies nothing.
    """
    # Same order, and a microsecond less than by hand. Each question put to a tensor costs 0.1 to 0.4 us.
    if (query.is_contiguous() or query.stride(3) == 1) and query.shape[3] == value.shape[3]:
        return torch.empty_like(query)
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
        t = t.expand(*(1,) * (2 - len(lead)), *lead, *t.shape[-2:])
        return t if t.ndim == 4 else t.flatten(0, -4)

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
    shape = query.shape
    if attn_mask is None and len(shape) == 4 and shape == key.shape == value.shape and query.is_contiguous():
        out = torch.empty_like(query)
    else:
        if not _is_plain(query, key, value, attn_mask, enable_gqa):
            query, key, value, attn_mask, leading = _as_plain(query, key, value, attn_mask, enable_gqa)
        out = _new_output(query, value)
    _C.attention(query, key, value, attn_mask, is_causal, shape[-1] ** -0.5 if scale is None else scale, out)
    return out if leading is None else out.reshape(*leading, *out.shape[2:])


def _cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    return _on_gpu(query, key, value, attn_mask, is_causal, scale, enable_gqa, wants_lse=False)[0]


def _on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    wants_lse: bool,
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    from lamina.kernels.attention import attention as launch

    leading = None
    if not _is_plain(query, key, value, attn_mask, enable_gqa):
        query, key, value, attn_mask, leading = _as_plain(query, key, value, attn_mask, enable_gqa)
    rest = (options.get(name) for name in ("alibi_slopes", "sinks"))
    limits = options.get("softcap", 0.0), *rest, options.get("dropout_p", 0.0)
    check_on_gpu("attention", query, key, value, attn_mask, *limits)
    out, lse = _new_output(query, value), _new_lse(query) if wants_lse else None
    scale = query.shape[3] ** -0.5 if scale is None else scale
    launch(query, key, value, attn_mask, out, lse, is_causal=is_causal, scale=scale, **options)
    if leading is not None:
        out = out.reshape(*leading, *out.shape[2:])
        lse = None if lse is None else lse.reshape(*leading, lse.shape[2])
    return out, lse


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
    cuda=_cuda,
)


def _new_lse(query: Tensor) -> Tensor:
    """[B, H, L], float64 where the query is and float32 where it is anything else."""
    return query.new_empty(query.shape[:3], dtype=_floats(query))


def _floats(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype is torch.float64 else torch.float32


def _cpu_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    bfloat16_products: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    int8_scores: bool = False,
) -> tuple[Tensor, Tensor]:
    leading = None
    if not _is_plain(query, key, value, attn_mask, enable_gqa):
        query, key, value, attn_mask, leading = _as_plain(query, key, value, attn_mask, enable_gqa)
    if scale is None:
        scale = query.size(3) ** -0.5
    out, lse = _new_output(query, value), _new_lse(query)
    _C.attention_with_lse(
        query,
        key,
        value,
        attn_mask,
        is_causal,
        scale,
        window_left,
        window_right,
        bottom_right,
        softcap,
        alibi_slopes,
        sinks,
        bfloat16_products,
        dropout_p,
        0 if seed is None else int(seed),
        int8_scores,
        out,
        lse,
    )
    if leading is not None:
        out, lse = out.reshape(*leading, *out.shape[2:]), lse.reshape(*leading, lse.shape[2])
    return out, lse


def _cuda_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    bfloat16_products: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    int8_scores: bool = False,
) -> tuple[Tensor, Tensor]:
    return _on_gpu(
        query,
        key,
        value,
        attn_mask,
        is_causal,
        scale,
        enable_gqa,
        wants_lse=True,
        window_left=window_left,
        window_right=window_right,
        bottom_right=bottom_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        low_precision=bfloat16_products,
        dropout_p=dropout_p,
        seed=seed,
    )


def _fake_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *rest: object,
) -> tuple[Tensor, Tensor]:
    leading = None
    if not _is_plain(query, key, value, attn_mask, enable_gqa):
        query, key, value, attn_mask, leading = _as_plain(query, key, value, attn_mask, enable_gqa)
    out, lse = _new_output(query, value), _new_lse(query)
    if leading is not None:
        out, lse = out.reshape(*leading, *out.shape[2:]), lse.reshape(*leading, lse.shape[2])
    return out, lse


_attention_with_lse = define(
    "attention.with_lse(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale, "
    "bool enable_gqa, int window_left, int window_right, bool bottom_right, float softcap, Tensor? alibi_slopes, "
    "Tensor? sinks, bool bfloat16_products, float dropout_p=0.0, Tensor? seed=None, bool int8_scores=False) "
    "-> (Tensor, Tensor)",
    cpu=_cpu_with_lse,
    fake=_fake_with_lse,
    cuda=_cuda_with_lse,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _runs_here(query: Tensor, value: Tensor, dtypes: tuple[torch.dtype, ...] = _DTYPES) -> bool:
    """Whether lamina's kernels take this call; what they don't take is torch's."""
    return (
        query.dtype in dtypes
        and (query.is_cpu or (query.is_cuda and query.dtype is not torch.float64 and _has_kernels_for(query.device)))
        and 1 <= query.shape[-1] <= MAX_HEAD_SIZE
        and value.shape[-1] <= MAX_HEAD_SIZE
    )


_HAS_TRITON = has_triton()


@functools.cache
def _is_ampere_or_later(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)


def _has_kernels_for(device: torch.device) -> bool:
    """Whether Triton is there and compiles for the GPU: Ampere (8.0) or later."""
    # Without a GPU only tensors that are not real are on one.
    return _HAS_TRITON and (not torch.cuda.is_initialized() or _is_ampere_or_later(device.index))


# Dynamo cannot trace the question for a capability. What torch.compiler.assume_constant_result sets, which would load
# all of Dynamo when lamina is imported.
_has_kernels_for._dynamo_marked_constant = True


def why_not_fused(query: Tensor, value: Tensor) -> str | None:
    """Why `attention` of a query and a value like these is torch's and not of lamina's kernels; None if it is theirs.

    >>> lamina.ops.why_not_fused(q, v)
    'its head size is 320, and the kernels take 1 to 256'
    """
    dtypes = _DTYPES if query.is_cuda else (*_DTYPES, torch.float64)
    if _runs_here(query, value, dtypes):
        return None
    if not (query.is_cpu or query.is_cuda):
        return f"it is on {query.device.type}, and the kernels are for the CPU and NVIDIA GPUs"
    if query.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"it is {str(query.dtype).removeprefix('torch.')}, and the kernels take {names}"
    size = max(query.shape[-1], value.shape[-1])
    if query.shape[-1] < 1 or size > MAX_HEAD_SIZE:
        return f"its head size is {size}, and the kernels take 1 to {MAX_HEAD_SIZE}"
    return f"{query.device} is older than Ampere, or Triton is not installed"


def torch_has_flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> bool:
    """Whether torch has a flash kernel for this call on a GPU, by the rules of its `can_use_flash_attention`."""
    if not query.is_cuda or attn_mask is not None or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    q, k, v = query.shape, key.shape, value.shape
    return (
        len(q) == len(k) == len(v) == 4
        and q[3] == k[3] == v[3]
        and q[3] <= 256
        and (enable_gqa or q[1] == k[1])
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        # Causal there means that the last query sees the last key: torch keeps it from calls where that differs.
        and not (is_causal and q[2] != k[2])
    )


class _WithGradient(torch.autograd.Function):
    """Four-dimensional inputs, nothing to broadcast but the mask -> output and log-sum-exp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query,
        key,
        value,
        attn_mask,
        alibi_slopes,
        sinks,
        seed,
        is_causal,
        scale,
        window_left,
        window_right,
        bottom_right,
        softcap,
        bfloat16_products,
        dropout_p,
    ):
        sides = window_left, window_right
        options = (*sides, bottom_right, softcap, alibi_slopes, sinks, bfloat16_products, dropout_p, seed)
        return _attention_with_lse(query, key, value, attn_mask, is_causal, scale, True, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.is_causal, ctx.scale, ctx.left, ctx.right, ctx.bottom_right, ctx.softcap, _, ctx.dropout_p = (
            inputs
        )
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        query, key, value, attn_mask, alibi_slopes, sinks, seed, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 15
        wanted = ctx.needs_input_grad[3:6]
        gradients = call_attention_backward(
            torch.zeros_like(out) if grad_out is None else grad_out,
            query,
            key,
            value,
            out,
            lse,
            grad_lse,
            attn_mask,
            ctx.is_causal,
            ctx.scale,
            ctx.left,
            ctx.right,
            ctx.bottom_right,
            ctx.softcap,
            alibi_slopes,
            sinks,
            ctx.dropout_p,
            seed,
            *wanted,
        )
        rest = (t if want else None for t, want in zip(gradients[3:], wanted, strict=True))
        return *gradients[:3], *rest, *(None,) * 9


def _needs_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _window_sides(window: int | tuple[int | None, int | None] | None) -> tuple[int, int]:
    """(left, right); -1 for no limit."""
    if window is None:
        return -1, -1
    sides = (window, window) if isinstance(window, int) else tuple(window)
    if len(sides) != 2 or not all(side is None or side >= -1 for side in sides):
        raise ValueError(
            f"attention: window is {window}, but must be a number of keys or (left, right), -1 or None for no limit"
        )
    left, right = (-1 if side is None else side for side in sides)
    return left, right


def _with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    causal_alignment: str,
    bfloat16_products: bool,
    int8_scores: bool,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of calls with a gradient, dropout, or options that torch has no op for."""
    seed = None
    if dropout_p:
        seed = torch.randint(2**63 - 1, ())  # from the default generator of the CPU
    if _runs_here(query, value, (*_DTYPES, torch.float64)):
        floats = _floats(query)
        alibi_slopes = None if alibi_slopes is None else alibi_slopes.to(floats)
        sinks = None if sinks is None else sinks.to(floats)
        bottom_right = causal_alignment == "bottom_right"
        if not _needs_gradient(query, key, value, attn_mask, alibi_slopes, sinks):
            options = bottom_right, softcap, alibi_slopes, sinks, bfloat16_products, dropout_p, seed, int8_scores
            return _attention_with_lse(query, key, value, attn_mask, is_causal, scale, enable_gqa, *window, *options)
        leading = None
        if not _is_plain(query, key, value, attn_mask, enable_gqa):
            query, key, value, attn_mask, leading = _as_plain(query, key, value, attn_mask, enable_gqa)
        tensors = query, key, value, attn_mask, alibi_slopes, sinks, seed
        out, lse = _WithGradient.apply(
            *tensors, is_causal, scale, *window, bottom_right, softcap, bfloat16_products, dropout_p
        )
        if leading is not None:
            out, lse = out.reshape(*leading, *out.shape[2:]), lse.reshape(*leading, lse.shape[2])
        return out, lse
    wide = torch.promote_types(query.dtype, torch.float32)
    out, lse = _composite(
        query.to(wide),
        key.to(wide),
        value.to(wide),
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        causal_alignment=causal_alignment,
        seed=seed,
        return_lse=True,
    )
    return out.to(query.dtype), lse


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
    compute_dtype: torch.dtype | None = None,
    qk_dtype: torch.dtype | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`torch.nn.functional.scaled_dot_product_attention`: softmax(scale * query @ key^T + mask) @ value, and more.

    Scores are accumulated in float32 and never stored as a whole: memory grows with the sequence length, not with its
    square. bfloat16 inputs are multiplied as they are and their softmax weights are rounded to bfloat16; float16 ones
    are computed in float32 on the CPU, and as bfloat16 ones on a GPU. A key that a mask excludes takes no part even if
    it or its value is NaN, and a query without keys gives 0. The same inputs give the same bits on every run and for
    every number of threads.

    Gradients (`attention_backward`) exist for query, key, value, an added mask, slopes and sinks, once: there is no
    second derivative. A plain call that the kernels do not cover goes to torch's own op: other dtypes than float32,
    bfloat16 and float16, heads larger than 256, other devices than the CPU and NVIDIA GPUs from Ampere on, where the
    kernels are Triton's (`why_not_fused` tells the reason). With the keyword arguments, for which torch has no op, such
    a call is composed of torch's basic ones.

    Args:
        query: [..., H, L, D]; leading dimensions broadcast as in torch.
        key: [..., H, S, D].
        value: [..., H, S, Dv].
        attn_mask: broadcastable to [..., H, L, S]; boolean (True = keep), or float32 or the query's dtype, added to the
            scores. Together with is_causal both hold.
        dropout_p: probability of dropping a weight, to 2^-16. Which weights fall is computed from their place and a
            seed drawn from torch's default generator: the same after `torch.manual_seed`, for any number of threads.
        is_causal: query i takes the keys j <= p, where p is i (see causal_alignment).
        scale: of the scores, 1 / sqrt(D) by default.
        enable_gqa: key and value may have fewer heads, H a multiple of theirs.
        window: (left, right): the query at p takes the keys p - left .. p + right, both included; -1 or None for no
            limit, and a number n for (n, n). With is_causal nothing is taken to the right. As in flash-attn.
        softcap: scores become softcap * tanh(score / softcap), before a mask or ALiBi is added (Gemma 2).
        alibi_slopes: [H] or [B, H]: -slope * |p - j| is added to the scores (Press et al. 2022).
        sinks: [H], a logit of each head that takes weight and gives no value (gpt-oss).
        causal_alignment: "top_left": p = i, as in torch; "bottom_right": p = i + S - L, the last query sees the last
            key, as in flash-attn. Holds for is_causal, window and alibi_slopes.
        compute_dtype: torch.bfloat16 lets float32 inputs be multiplied in bfloat16, at twice the speed where the
            processor can (`lamina.info()["isa"]` is avx512bf16), with its error of 2^-9 in each factor. On a GPU
            products are then of TF32, whose error is 2^-11.
        qk_dtype: torch.int8 lets query @ key^T of float32 and bfloat16 inputs be computed from int8 codes where the
            processor can (AVX-512 VNNI), with a scale for each row and key less the mean of the keys (SageAttention,
            Zhang et al. 2024); a score is then off by about 0.5% of the typical one. Without gradients only; a GPU
            computes them as it does without.
        return_lse: also give log(sum_j exp(score_j)) of every query, sinks included, [..., H, L]: float32, or float64
            for float64 inputs; -inf where a query takes no key. Exact to 3e-4 where products are bfloat16.

    Returns [..., H, L, Dv] in the query's memory order, or that and the log-sum-exp. Raises ValueError when shapes,
    dtypes or options do not fit.

    >>> y = lamina.ops.attention(q, k, v, is_causal=True)
    >>> y, lse = lamina.ops.attention(q, k, v, is_causal=True, window=(1023, 0), softcap=50.0, return_lse=True)
    """
    kind = "cuda" if query.is_cuda else "cpu"
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    plain = (
        not return_lse
        and window is None
        and softcap is None
        and alibi_slopes is None
        and sinks is None
        and compute_dtype is None
        and qk_dtype is None
        and causal_alignment == "top_left"
    )
    if plain and not _runs_here(query, value):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if plain and dropout_p == 0.0 and not _needs_gradient(query, key, value, attn_mask):
        return _attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(
            f"attention: causal_alignment is {causal_alignment!r}, but must be 'top_left' or 'bottom_right'"
        )
    if compute_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"attention: compute_dtype is {compute_dtype}, but must be torch.bfloat16 or None")
    if qk_dtype not in (None, torch.int8):
        raise ValueError(f"attention: qk_dtype is {qk_dtype}, but must be torch.int8 or None")
    out, lse = _with_lse(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        _window_sides(window),
        softcap or 0.0,
        alibi_slopes,
        sinks,
        causal_alignment,
        compute_dtype is torch.bfloat16,
        qk_dtype is torch.int8,
    )
    return (out, lse) if return_lse else out


def drop_in_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attention` for models that called torch's: on a GPU what torch has a flash kernel for stays torch's.

    Those kernels (FlashAttention, cuDNN's) are written in the GPU's own terms, which a compiler like Triton's hardly
    betters. They know no masks, biases, float32 or options: torch sends those to its older kernel, which visits every
    tile of the scores, or composes them (a mask with fewer heads of keys), and lamina's skip what is masked. Whether
    that pays for a model is for `accelerate` to measure. `attention` itself always runs lamina's kernels.
    """
    plain = query.is_cuda and softcap is None and sinks is None
    if plain and torch_has_flash(query, key, value, attn_mask, is_causal, enable_gqa):
        return F.scaled_dot_product_attention(
            query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, softcap=softcap, sinks=sinks
    )


def _panels_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    length: int,
    heads: int,
    scale: float,
    bfloat16_products: bool = False,
) -> Tensor:
    _check_panels(query, value)
    out = query.new_empty((query.shape[0], value.shape[1], PANEL))
    _C.attention_panels(query, key, value, mask, length, heads, scale, bfloat16_products, out, None, None)
    return out


def _panels_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    length: int,
    heads: int,
    scale: float,
    bfloat16_products: bool = False,
) -> Tensor:
    torch._check(query.ndim == 3 and value.ndim == 3, lambda: "attention_panels: query must be [panels, H * D, 32]")
    return query.new_empty((query.shape[0], value.shape[1], PANEL))


def _codes_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    length: int,
    heads: int,
    scale: float,
    bfloat16_products: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_panels(query, value)
    codes, scales = new_codes(query, value.shape[1])
    _C.attention_panels(query, key, value, mask, length, heads, scale, bfloat16_products, None, codes, scales)
    return codes, scales


def _codes_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    length: int,
    heads: int,
    scale: float,
    bfloat16_products: bool = False,
) -> tuple[Tensor, Tensor]:
    torch._check(query.ndim == 3 and value.ndim == 3, lambda: "attention_panels: query must be [panels, H * D, 32]")
    return new_codes(query, value.shape[1])


def _check_panels(query: Tensor, value: Tensor) -> None:
    for name, panels in (("query", query), ("value", value)):
        if panels.ndim != 3:
            raise ValueError(
                f"attention_panels: {name} has shape {list(panels.shape)}, but must be [panels, H * D, {PANEL}]"
            )


_PANEL_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, SymInt length, int heads, float scale, "
    "bool bfloat16_products=False"
)
_panels = define(f"attention.panels({_PANEL_ARGUMENTS}) -> Tensor", cpu=_panels_cpu, fake=_panels_fake)
_panel_codes = define(
    f"attention.panel_codes({_PANEL_ARGUMENTS}) -> (Tensor codes, Tensor scales)", cpu=_codes_cpu, fake=_codes_fake
)


def attention_panels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    length: int,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
    compute_dtype: torch.dtype | None = None,
    quantize: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention of sequences whose tokens lie in panels: see `token_panels`.

    The features of a head lie one behind the other, heads one behind the other, as a linear layer gives them; query,
    key and value may be parts of one tensor. A key that the mask excludes takes no part even if it or its value is NaN,
    and a query without keys gives 0. No gradient.

    Args:
        query: float32 [sequences * ceil(length / 32), heads * D, 32], D at most 256.
        key: the same.
        value: the same with heads * Dv.
        length: tokens of a sequence.
        heads: number of heads.
        mask: [1 or sequences, length], which keys every query takes: boolean (True = keep), or float32, added to the
            scores.
        scale: of the scores, 1 / sqrt(D) by default.
        compute_dtype: torch.bfloat16 lets products be of bfloat16, as in `attention`.
        quantize: give the codes and scales of the result, for a layer behind it, instead of the result.

    Returns float32 [panels, heads * Dv, 32], or its (codes, scales) as `quantize_panels` makes them. Raises ValueError
    when shapes, dtypes or options do not fit.

    >>> q, k, v = lamina.ops.sparse_int8_linear_panels(*codes, qkv_weight).split(768, 1)
    >>> attended = lamina.ops.attention_panels(q, k, v, length=128, heads=12, quantize=True)
    """
    if compute_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"attention_panels: compute_dtype is {compute_dtype}, but must be torch.bfloat16 or None")
    if scale is None:
        scale = (query.shape[1] / max(heads, 1)) ** -0.5 if query.ndim == 3 and query.shape[1] else 1.0
    op = _panel_codes if quantize else _panels
    return op(query, key, value, mask, length, heads, scale, compute_dtype is torch.bfloat16)
