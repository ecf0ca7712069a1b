"""Drop-in attention layers."""

from torch import Tensor, nn

from lamina import ops


class ScaledDotProductAttention(nn.Module):
    """softmax(Q K^T / sqrt(D) + mask) V through `lamina.ops.attention`.

    The drop-in for modules of this name and signature, such as `lamina.models.attention.ScaledDotProductAttention`. It
    has no parameters and no buffers; calls that need gradients go to torch's own op.

    Args of forward:
        query: [B, H, L, D]
        key, value: [B, H, S, D]
        attn_mask: broadcastable to [B, H, L, S]; bool (True = keep) or float (added to the scores).
        is_causal: position i takes only j <= i.

    Returns [B, H, L, D] in the inputs' dtype.

    >>> y = lamina.nn.ScaledDotProductAttention()(q, k, v, is_causal=True)
    """

    @classmethod
    def from_float(cls, module: nn.Module) -> "ScaledDotProductAttention":
        """The layer in the mode (training or not) of the one it replaces."""
        return cls().train(module.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return ops.attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal)
