"""torch.nn.attention: lamina as a provider of the fused kernel behind `scaled_dot_product_attention`."""

import torch
from torch import Tensor

from lamina.ops.attention import attention
from lamina.ops.library import Override

# What scaled_dot_product_attention runs on CPU tensors wherever it does not compose the answer.
_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"


def register() -> None:
    """Make "lamina" known to `torch.nn.attention.activate_flash_attention_impl`. Calling it again is harmless.

    Once activated, every call of scaled_dot_product_attention in the process that torch serves on the CPU with its
    fused kernel is served by lamina, inside nn.MultiheadAttention as well, until
    `torch.nn.attention.restore_flash_attention_impl()`; gradients are torch's, from lamina's log-sum-exp. For one model
    alone use `lamina.swap_(model, lamina.FusedAttention())`, which also saves the microseconds of torch's dispatcher.

    >>> lamina.integrations.sdpa.register()
    >>> torch.nn.attention.activate_flash_attention_impl("lamina")
    """
    torch.nn.attention.register_flash_attention_impl("lamina", register_fn=lambda: Override(_KERNEL, _kernel))


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """[B, H, L, D], [B, H, S, D], [B, H, S, D] -> [B, H, L, D] and the log-sum-exp [B, H, L]."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):  # torch has cast before, and differentiates around this
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, return_lse=True)
