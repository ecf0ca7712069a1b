"""What linear layers with a packed, frozen weight have in common."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lamina.nn.int8_input import Int8Input
from lamina.nn.packed_weight import PackedWeight
from lamina.ops.int8_linear import (
    PackedInt8Weight,
    call_int8_linear,
    move_int8_weight,
    pack_int8_weight,
    traced_weight,
    unpack_int8_weight,
)
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
    """PackedLinear with int8 codes and one scale per output channel; saved as int8 [out, in] and float32 [out].

    The class attributes are those of the packed weight's op: its type, (packed, in_features) -> codes, the same as the
    dequantized weight by an op that graphs can hold, and (packed, in_features, device) -> packed for that device.
    """

    # .to(bfloat16) and .half() concern activations: in bfloat16 scales, outputs would lose three digits.
    _kept_dtypes = ("_scale",)

    _packed_type: Callable[..., Any] = PackedInt8Weight
    _unpack = staticmethod(unpack_int8_weight)
    _trace = staticmethod(traced_weight)
    _move = staticmethod(move_int8_weight)

    def _pack(self, weight: Tensor, scale: Tensor | None) -> Any:
        return pack_int8_weight(weight, scale)

    def _set_packed(self, packed: Any) -> None:
        for name, value in zip(("_packed", "_scale", "_compensation"), packed, strict=True):
            self.register_buffer(name, value, persistent=False)

    def _moved(self, packed: Any, device: torch.device) -> Any:
        return self._move(packed, self.in_features, device)

    def _codes(self) -> Tensor:
        return self._unpack(self._for_host(), self.in_features)

    def _saved(self) -> tuple[Tensor, Tensor]:
        return self._codes().to(self._like.device), self._scale.detach()

    @property
    def packed_weight(self) -> Any:
        return self._packed_type(self._packed, self._scale, self._compensation)

    def _dequantize(self, traced: bool) -> Tensor:
        if traced:
            return self._trace(self.packed_weight, self.in_features)
        return dequantize_weight(*self._saved())


class DenseInt8Linear(Int8PackedLinear):
    """Int8PackedLinear with the weight of int8_linear, of which whole panels are weights of their own."""

    @abstractmethod
    def _multiply(self, input: Tensor, packed: PackedInt8Weight, bias: Tensor | None) -> Tensor:
        """The product with a packed weight."""

    def part(self, input: Tensor, rows: slice) -> Tensor:
        inputs = self.in_features
        if inputs % 4 or rows.start % PANEL or (rows.stop % PANEL and rows.stop != self.out_features):
            return super().part(input, rows)
        # Whole panels of the packed weight, which lie one behind the other; on a GPU its rows.
        panels = slice(rows.start * inputs, (rows.stop + -rows.stop % 16) * inputs)
        data = self._packed[rows if self._packed.ndim == 2 else panels]
        packed = PackedInt8Weight(data, self._scale[rows], self._compensation[rows.start : rows.stop + -rows.stop % 16])
        return self._multiply(input, packed, None if self.bias is None else self.bias[rows])


class Int8ProductLinear(Int8Input, Int8PackedLinear):
    """Int8PackedLinear whose input is quantized too; `_call` is the op, on loose tensors (see Int8Product)."""

    _call = staticmethod(call_int8_linear)

    def _set(
        self,
        module: nn.Linear,
        activation: str | None,
        *,
        input_scale: Tensor | float | None = None,
        out_dtype: torch.dtype | str | None = None,
    ) -> None:
        super()._set(module, activation)
        self._set_input(input_scale, out_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], float32 or bfloat16."""
        # Straight to the op and past nn.Module.__getattr__: 3 us less, of 10 for a small layer.
        buffers = self._buffers
        return self._call(
            input,
            buffers["_packed"],
            buffers["_scale"],
            buffers["_compensation"],
            self._parameters["bias"],
            self._op_activation,
            None,
            buffers["input_scale"],
            None,
            self.out_dtype,
        )

    def activated(self, input: Tensor, activation: str) -> Tensor:
        """The activation of the output, computed inside the op."""
        packed = self.packed_weight
        return self._call(input, *packed, self.bias, activation, None, self.input_scale, None, self.out_dtype)
