"""SparseInt8Linear: nn.Linear with a block-sparse int8 weight."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from lamina.nn.packed_linear import Int8ProductLinear
from lamina.nn.sparse_weight import kernel_in_words
from lamina.ops.sparse_int8_linear import (
    PackedSparseInt8Weight,
    block_density,
    call_sparse_int8_linear,
    move_sparse_int8_weight,
    pack_sparse_int8_weight,
    traced_sparse_int8_weight,
    unpack_sparse_int8_weight,
)


class SparseInt8Linear(Int8ProductLinear):
    """nn.Linear with a frozen int8 weight of which only the blocks that hold a nonzero are kept and multiplied.

    For weights that were pruned in blocks (`lamina.prune`): at 90% zero blocks of 4x4 it takes 3.2% of the float32
    bytes. Its output is that of Int8Linear with the same weight, bit for bit; so are its state_dict (`weight` int8
    [out, in] with the zeros, `weight_scale` float32 [out], `bias`, `input_scale` if there is one) and its gradients.
    `layer.weight` is the dequantized weight, computed when its values are used.

    Args as in nn.Linear, and
        pattern: the block that is kept or dropped whole, output channels x inputs: "1x4", "2x4", "4x4", "16x16",
            "32x32" or "64x64". Sizes that it does not divide are padded. The CPU multiplies square blocks as the "4x4"
            they are made of; a GPU multiplies those from 16 as they are, and the weight of any other pattern as a dense
            one. Or "2:4", of which only GPUs make use.
        activation, out_dtype: as in Int8Linear.

    Accuracy: that of Int8Linear: weights and activations have 8 bits with one scale per channel and row; sums are
    exact. The weight does not train; the gradient for the input is the straight-through one, so that a model with
    frozen sparse layers fine-tunes.

    >>> layer = lamina.nn.SparseInt8Linear.from_float(pruned, pattern="4x4")
    """

    _packed_type = PackedSparseInt8Weight
    _unpack = staticmethod(unpack_sparse_int8_weight)
    _trace = staticmethod(traced_sparse_int8_weight)
    _call = staticmethod(call_sparse_int8_linear)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: str = "4x4",
        activation: str | None = None,
        out_dtype: torch.dtype | str | None = None,
    ) -> None:
        options = {"activation": activation, "out_dtype": out_dtype, "pattern": pattern}
        super().__init__(in_features, out_features, bias, device, dtype, **options)

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        activation: str | None = None,
        *,
        pattern: str = "4x4",
        input_scale: Tensor | float | None = None,
        out_dtype: torch.dtype | str | None = None,
    ) -> Self:
        """The sparse int8 layer with `module`'s weight and bias. Any weight is taken; one without zeros is not faster.

        Raises ValueError for another pattern, if the weight has NaN or infinity, or if `input_scale` is not finite and
        at least 1e-36.

        >>> model.fc = lamina.nn.SparseInt8Linear.from_float(model.fc, pattern="4x4")
        """
        return super().from_float(module, activation, pattern=pattern, input_scale=input_scale, out_dtype=out_dtype)

    def _set(self, module: nn.Linear, activation: str | None, *, pattern: str = "4x4", **options: Any) -> None:
        self.pattern = pattern
        super()._set(module, activation, **options)

    @property
    def density(self) -> float:
        """The share of blocks that are kept; of values, for 2:4."""
        return block_density(self._codes(), "1x1" if self.pattern == "2:4" else self.pattern)

    def _moved(self, packed: PackedSparseInt8Weight, device: torch.device) -> PackedSparseInt8Weight:
        return move_sparse_int8_weight(packed, self.in_features, device, self.pattern)

    def _pack(self, weight: Tensor, scale: Tensor | None) -> PackedSparseInt8Weight:
        return pack_sparse_int8_weight(weight, scale, pattern=self.pattern)

    def options(self) -> dict[str, str | None]:
        return {**super().options(), "pattern": self.pattern}

    def extra_repr(self) -> str:
        words = f"{super().extra_repr()}, pattern={self.pattern}, density={self.density:.3g}"
        return words + kernel_in_words(self.pattern, self._like.device, dense=self._compensation.ndim == 1)
