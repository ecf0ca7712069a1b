"""transformers: attn_implementation="lamina"."""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from lamina.ops.attention import drop_in_attention


def register() -> None:
    """Make `attn_implementation="lamina"` known to transformers, with its mask function. Calling it again is harmless.

    Raises ImportError if transformers is not installed.

    >>> lamina.integrations.transformers.register()
    >>> model = AutoModel.from_pretrained(path, attn_implementation="lamina")
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers is not installed; pip install 'lamina[models]'")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("lamina", attention_forward)
    # Without a mask function under the same name, transformers would silently pass no mask at all.
    AttentionMaskInterface.register("lamina", sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, L, D], key and value [B, Hkv, S, D] -> [B, L, H, D].

    position_bias (T5): broadcastable to [B, H, L, S], added to the scores; softcap (Gemma 2): bounds them; s_aux
    (gpt-oss): [H], the logit of each head's sink. A sliding window is in the mask.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # One query sees every key of the cache; a mask, where there is one, already says what is causal.
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias, causal)
        causal = False
    out = drop_in_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        softcap=softcap,
        sinks=s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


def _with_bias(mask: Tensor | None, bias: Tensor, causal: bool) -> Tensor:
    """One mask to be added to the scores: what `mask` and `causal` exclude is -inf."""
    if causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
