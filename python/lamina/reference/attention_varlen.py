"""What attention_varlen computes, in plain PyTorch."""

import torch
from torch import Tensor

from lamina.reference.attention import attention


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """attention of each sequence by itself: q [total_q, H, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv].

    Sequence b is the tokens cu_seqlens[b] to cu_seqlens[b + 1]; the last query of one is level with its last key.
    Returns [total_q, H, Dv] and the logarithm of the sum of exponentials [H, total_q].
    """
    outputs = [q.new_zeros(0, q.shape[1], v.shape[2])]
    lses = [q.new_zeros(q.shape[1], 0)]
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_ends) - 1):
        queries, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        out, lse = attention(
            *(t.transpose(0, 1) for t in (q[queries], k[keys], v[keys])),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[b],
            sinks=sinks,
            causal_alignment="bottom_right",
            return_lse=True,
        )
        outputs.append(out.transpose(0, 1))
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses, 1)
