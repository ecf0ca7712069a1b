"""What linear layers with a packed, frozen weight have in common."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lamina.nn.packed_weight import PackedWeight
from lamina.ops.int8_linear import PackedInt8Weight, pack_int8_weight, traced_weight, unpack_int8_weight
from lamina.quant.weights import dequantize_weight

# Output channels of a panel of a packed int8 weight.
PANEL = 64


class PackedLinear(PackedWeight, nn.Linear):
    """nn.Linear with a packed weight; see PackedWeight."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        **options: Any,
    ) -> None:
        float_linear = nn.Linear(in_features, out_features, bias, device, dtype)
        nn.Module.__init__(self)
        self._set(float_linear, activation, **options)

    def _set(self, module: nn.Linear, activation: str | None) -> None:
        self.in_features = module.in_features
        self.out_features = module.out_features
        self._keep(module, activation)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def part(self, input: Tensor, rows: slice) -> Tensor:
        """The outputs `rows`, from start to stop, alone."""
        return self(input)[..., rows]

    @staticmethod
    def saved_shape(out_features: int, in_features: int) -> tuple[int, int] | None:
        """The shape of `weight` in the state_dict of a layer of this size; None where the size does not tell it."""
        return out_features, in_features

    def _saved_weight_shape(self) -> tuple[int, int]:
        return self.saved_shape(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        activation = f", activation={self.activation}" if self.activation else ""
        return f"{super().extra_repr()}{activation}"


class Int8PackedLinear(PackedLinear):
    """PackedLinear with int8 codes and one scale per output channel; saved as int8 [out, in] and float32 [out]."""

    # .to(bfloat16) and .half() concern activations: in bfloat16 scales, outputs would lose three digits.
    _kept_dtypes = ("_scale",)

    def _pack(self, weight: Tensor, scale: Tensor | None) -> PackedInt8Weight:
        return pack_int8_weight(weight, scale)

    def _set_packed(self, packed: PackedInt8Weight) -> None:
        for name, value in zip(("_packed", "_scale", "_compensation"), packed, strict=True):
            self.register_buffer(name, value, persistent=False)

    def _saved(self) -> tuple[Tensor, Tensor]:
        return unpack_int8_weight(self.packed_weight, self.in_features), self._scale.detach()

    @property
    def packed_weight(self) -> PackedInt8Weight:
        return PackedInt8Weight(self._packed, self._scale, self._compensation)

    @abstractmethod
    def _multiply(self, input: Tensor, packed: PackedInt8Weight, bias: Tensor | None) -> Tensor:
        """The product with a packed weight."""

    def part(self, input: Tensor, rows: slice) -> Tensor:
        inputs = self.in_features
        if inputs % 4 or rows.start % PANEL or (rows.stop % PANEL and rows.stop != self.out_features):
            return super().part(input, rows)
        # Whole panels of the packed weight, which lie one behind the other.
        data = self._packed[rows.start * inputs : (rows.stop + -rows.stop % 16) * inputs]
        packed = PackedInt8Weight(data, self._scale[rows], self._compensation[rows.start : rows.stop + -rows.stop % 16])
        return self._multiply(input, packed, None if self.bias is None else self.bias[rows])

    def _dequantize(self, traced: bool) -> Tensor:
        if traced:
            return traced_weight(self.packed_weight, self.in_features)
        return dequantize_weight(unpack_int8_weight(self.packed_weight, self.in_features), self._scale)
