"""torch.nn.attention: lamina as a provider of the fused kernel behind `scaled_dot_product_attention`."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lamina.ops.attention import attention, torch_has_flash, why_not_fused
from lamina.ops.library import Override

# What scaled_dot_product_attention runs on CPU tensors wherever it does not compose the answer.
_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
_WHOLE = "scaled_dot_product_attention"
_KEYS_OF_GPU = "AutogradCUDA", "CUDA"


def register() -> None:
    """Make "lamina" known to `torch.nn.attention.activate_flash_attention_impl`. Calling it again is harmless.

    Once activated, calls of scaled_dot_product_attention in the process are served by lamina, inside
    nn.MultiheadAttention as well, until `torch.nn.attention.restore_flash_attention_impl()`: on the CPU every one that
    torch serves with its fused kernel, with torch's gradients from lamina's log-sum-exp; on a GPU those that torch has
    no flash kernel for (masks, float32), with lamina's gradients, unless `torch.nn.attention.sdpa_kernel` excludes
    flash attention. For one model alone use `lamina.swap_(model, lamina.FusedAttention())`, which also saves the
    microseconds of torch's dispatcher.

    >>> lamina.integrations.sdpa.register()
    >>> torch.nn.attention.activate_flash_attention_impl("lamina")
    """
    torch.nn.attention.register_flash_attention_impl("lamina", register_fn=_override)


def _override() -> Override:
    # On a GPU the op itself, above its gradient: the choice among torch's kernels is made below, where a mask with
    # fewer heads of keys has none, and each of them wants its own form of the log-sum-exp. Without the key of autograd
    # a tensor made in inference mode arrives at that of the device.
    return Override({(_KERNEL, "CPU"): _kernel, **{(_WHOLE, key): _on_gpu for key in _KEYS_OF_GPU}})


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


def _on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if _is_torchs(query, key, value, attn_mask, is_causal, enable_gqa):
        return torch.ops.aten.scaled_dot_product_attention.default.decompose(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _is_torchs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> bool:
    """Whether a call on a GPU stays what it was. `drop_in_attention` says why those with a flash kernel do."""
    tensors = query, key, value
    return (
        torch_has_flash(query, key, value, attn_mask, is_causal, enable_gqa)
        or why_not_fused(query, value) is not None
        # Its error, in its words.
        or any(t.dtype != query.dtype or t.device != query.device for t in tensors)
        or (is_causal and attn_mask is not None)
        # Somebody asked for one of the other kernels.
        or not torch.backends.cuda.flash_sdp_enabled()
        # Distributed and other composed tensors, and torch.func, know torch's kernels and not lamina's.
        or any(is_traceable_wrapper_subclass(t) for t in tensors)
        or torch._C._are_functorch_transforms_active()
    )
