"""Int8WeightOnlyLinear and Int4WeightOnlyLinear: nn.Linear with a quantized weight and float activations."""

from typing import Self

import torch
from torch import Tensor, nn

from lamina.nn.packed_linear import DenseInt8Linear, PackedLinear
from lamina.ops.int8_linear import PackedInt8Weight
from lamina.ops.weight_only_linear import (
    PackedInt4Weight,
    call_weight_only_linear,
    move_int4_weight,
    pack_int4_weight,
    traced_int4_weight,
    unpack_int4_weight,
)
from lamina.quant.weights import dequantize_weight_groups, pack_nibbles, unpack_nibbles


class Int8WeightOnlyLinear(DenseInt8Linear):
    """nn.Linear with a frozen int8 weight and activations in full precision.

    For few rows, as in decoding, where reading the weight is what takes the time: 26% of the float32 bytes. The weight
    has one scale per output channel; activations are not rounded beyond float32. State_dict, packing and memory are
    those of Int8Linear, which quantizes activations too and is faster for many rows. `layer.weight` is the dequantized
    weight, computed when its values are used; it does not train, gradients flow to the input and the bias.

    Args as in nn.Linear, and
        activation: None, "relu", "relu6", "gelu", "gelu_tanh", "quick_gelu", "silu", "hardswish" or "tanh", applied
            inside the op.

    >>> layer = lamina.nn.Int8WeightOnlyLinear.from_float(nn.Linear(4096, 4096))
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], float32 or bfloat16."""
        # Straight to the op and past nn.Module.__getattr__, as in Int8Linear.
        buffers = self._buffers
        return call_weight_only_linear(
            input,
            buffers["_packed"],
            buffers["_scale"],
            buffers["_compensation"],
            self._parameters["bias"],
            self.out_features,
            0,
            self._op_activation,
        )

    def _multiply(self, input: Tensor, packed: PackedInt8Weight, bias: Tensor | None) -> Tensor:
        return call_weight_only_linear(input, *packed, bias, packed.scale.shape[0], 0, self._op_activation)


class Int4WeightOnlyLinear(PackedLinear):
    """nn.Linear with a frozen int4 weight and activations in full precision.

    Each group of `group_size` inputs of a channel has a bfloat16 scale: at 32 the weight takes 14.1% of the float32
    bytes, at 128 12.9%. The state_dict has `weight` (uint8 [out, ceil(in / 2)], see `lamina.quant.pack_nibbles`),
    `weight_scale` (bfloat16 [out, groups]) and `bias`; a float `weight` is quantized when it is loaded. `layer.weight`
    is the dequantized weight, computed when its values are used; it does not train, gradients flow to the input and
    the bias.

    Args as in nn.Linear, and
        activation: None, "relu", "relu6", "gelu", "gelu_tanh", "quick_gelu", "silu", "hardswish" or "tanh", applied
            inside the op.
        group_size: a multiple of 32; smaller groups are more accurate. Where it does not divide `in_features`, the last
            group is shorter.

    Accuracy: about 22 dB in groups of 32, 20 dB in groups of 128. Large models mostly bear that, small ones less.

    >>> layer = lamina.nn.Int4WeightOnlyLinear.from_float(nn.Linear(4096, 4096), group_size=64)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        group_size: int = 32,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, activation=activation, group_size=group_size)

    @classmethod
    def from_float(cls, module: nn.Linear, activation: str | None = None, *, group_size: int = 32) -> Self:
        """The int4 layer with `module`'s weight and bias. Raises ValueError if the weight has NaN or infinity.

        >>> model.fc = lamina.nn.Int4WeightOnlyLinear.from_float(model.fc)
        """
        return super().from_float(module, activation, group_size=group_size)

    def _set(self, module: nn.Linear, activation: str | None, *, group_size: int = 32) -> None:
        self.group_size = group_size
        super()._set(module, activation)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], float32 or bfloat16."""
        return call_weight_only_linear(
            input,
            self._buffers["_packed"],
            None,
            None,
            self._parameters["bias"],
            self.out_features,
            self.group_size,
            self._op_activation,
        )

    def _pack(self, weight: Tensor, scale: Tensor | None) -> PackedInt4Weight:
        if not weight.is_floating_point():
            if weight.dtype != torch.uint8:
                raise ValueError(f"an int4 weight is saved as uint8, two codes a byte, but this is {weight.dtype}")
            weight = unpack_nibbles(weight, self.in_features)
        return pack_int4_weight(weight, scale, group_size=self.group_size)

    def _set_packed(self, packed: PackedInt4Weight) -> None:
        self.register_buffer("_packed", packed.data, persistent=False)

    def _moved(self, packed: PackedInt4Weight, device: torch.device) -> PackedInt4Weight:
        return move_int4_weight(packed, self.in_features, device)

    def _codes(self) -> tuple[Tensor, Tensor]:
        codes, scale = unpack_int4_weight(self._for_host(), self.in_features)
        return codes.to(self._like.device), scale.to(self._like.device)

    def _saved(self) -> tuple[Tensor, Tensor]:
        codes, scale = self._codes()
        return pack_nibbles(codes), scale

    @staticmethod
    def saved_shape(out_features: int, in_features: int) -> tuple[int, int]:
        return out_features, (in_features + 1) // 2

    @property
    def packed_weight(self) -> PackedInt4Weight:
        return PackedInt4Weight(self._packed, self.out_features, self.group_size)

    def _dequantize(self, traced: bool) -> Tensor:
        if traced:
            return traced_int4_weight(self.packed_weight, self.in_features)
        return dequantize_weight_groups(*self._codes(), self.group_size)

    def options(self) -> dict[str, str | int | None]:
        return {**super().options(), "group_size": self.group_size}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"
