"""LoRALinear: a frozen linear layer, float or quantized, and a small trained update of its weight."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.nn.linears import as_linear
from lamina.nn.packed_linear import PackedLinear
from lamina.nn.packed_weight import on_host


class LoRALinear(nn.Module):
    """base(x) + alpha / rank * B A dropout(x), where only A and B train (Hu et al. 2021, arXiv:2106.09685).

    The base is frozen; quantized, it takes a quarter (int8) or an eighth (int4) of the memory (the idea of QLoRA,
    Dettmers et al. 2023, arXiv:2305.14314), and gradients flow through it to the input, straight through the rounding.
    B begins with zeros: at first the layer computes exactly what its base does.

    Args:
        base: nn.Linear (or GPT-2's Conv1D), or one of lamina's quantized layers without a fused activation.
        rank: rows of A, columns of B; at least 1.
        alpha: the update is multiplied by alpha / rank.
        dropout: share of the update's inputs that are dropped in training.

    Parameters: lora_a [rank, in_features] (Kaiming uniform), lora_b [out_features, rank] (zeros), in the base's dtype,
    float32 over a quantized one. Raises ValueError for arguments that do not fit.

    >>> layer = lamina.nn.LoRALinear(lamina.nn.Int8Linear.from_float(nn.Linear(768, 768)), rank=8)
    """

    def __init__(self, base: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRALinear: rank is {rank}, but must be at least 1")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"LoRALinear: dropout is {dropout}, but must be at least 0 and below 1")
        linear = base if isinstance(base, PackedLinear) else as_linear(base)
        if linear is None:
            raise ValueError(
                f"LoRALinear: base is a {type(base).__name__}, but must be nn.Linear or a quantized one of lamina's"
            )
        if getattr(base, "activation", None) is not None:
            raise ValueError(
                f"LoRALinear: base applies {base.activation} inside, but the update belongs before it; "
                "build it with activation=None"
            )
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.alpha = rank, alpha
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        dtype = torch.float32 if isinstance(base, PackedLinear) else linear.weight.dtype
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        # The base that was merged into, and its former weight; in a tuple, or they would count as children.
        self._unmerged: tuple[nn.Module, tuple[Tensor, ...]] | None = None
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """The base's weight, without the update unless it is merged."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def update(self) -> Tensor:
        """What the adapter adds to the weight: alpha / rank * B A, [out_features, in_features]."""
        return self.alpha / self.rank * (self.lora_b @ self.lora_a)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] of the base's output dtype."""
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("LoRALinear: the update is merged, so it cannot train; call unmerge() first")
            return self.base(input)
        output = self.base(input)
        hidden = F.linear(self.dropout(input.to(self.lora_a.dtype)), self.lora_a)
        return output + (F.linear(hidden, self.lora_b) * (self.alpha / self.rank)).to(output.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base's weight: the layer then costs what its base does.

        A quantized weight is quantized anew, so that outputs change by its rounding: in int8, half a step of each
        channel's largest weight / 127 at most. The former weight is kept for `unmerge`. Raises ValueError if the update
        has NaN.
        """
        if self.merged:
            return
        update = self.update()
        if not bool(update.isfinite().all()):
            raise ValueError("LoRALinear: the update has NaN or infinity")
        if isinstance(self.base, PackedLinear):
            # Not base.weight, which is rounded to the model's dtype.
            packed = self.base._pack(on_host(self.base._dequantize(False) + update), None)
            self._unmerged = (self.base, self.base._for_host())
            self.base._place(packed)
        else:
            # A new Parameter: the old one may belong to an embedding as well, and is what unmerge puts back.
            self._unmerged = (self.base, (self.base.weight,))
            update = update if isinstance(self.base, nn.Linear) else update.t()
            self.base.weight = nn.Parameter(self.base.weight + update, requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's weight back, bit for bit. Raises RuntimeError if the base was exchanged meanwhile."""
        if self._unmerged is None:
            return
        base, former = self._unmerged
        if base is not self.base:
            raise RuntimeError("LoRALinear: the base was exchanged after merge(), so there is nothing to put back")
        if isinstance(base, PackedLinear):
            base._place(former)
        else:
            (base.weight,) = former
        self._unmerged = None

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}{', merged' if self.merged else ''}"
