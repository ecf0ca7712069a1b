"""Int8Linear: nn.Linear with an int8 weight."""

from typing import Self

import torch
from torch import Tensor, nn

from lamina.nn.packed_linear import DenseInt8Linear, Int8ProductLinear
from lamina.ops.int8_linear import PackedInt8Weight


class Int8Linear(Int8ProductLinear, DenseInt8Linear):
    """nn.Linear with a frozen int8 weight: activations are quantized per row inside the op.

    The layer holds one copy of its weight, packed for the kernels: about a quarter of the float32 bytes. Its state_dict
    has `weight` (int8 [out, in]), `weight_scale` (float32 [out]), `bias` and, if there is one, `input_scale`,
    independent of the packing; a float `weight`, such as a state_dict of the original model, is quantized when it is
    loaded. `layer.weight` is the dequantized weight in the dtype of the original, computed when its values are used.

    Args as in nn.Linear, and
        activation: None, "relu", "relu6", "gelu", "gelu_tanh", "quick_gelu", "silu", "hardswish" or "tanh", applied
            inside the op.
        out_dtype: torch.float32 or torch.bfloat16, or its name; None for the input's dtype.

    `input_scale` is a buffer: None, for a scale per row that each call finds, or a float32 scalar tensor [], the static
    scale that calibration found: codes are clamped to [-127, 127] and the rows need not be searched.

    Accuracy: weights and activations have 8 bits with one scale per channel and row; sums are exact. The weight does
    not train; the gradient for the input is the straight-through one, as if nothing had been rounded.

    >>> layer = lamina.nn.Int8Linear.from_float(nn.Linear(768, 3072))
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
        out_dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, activation=activation, out_dtype=out_dtype)

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        activation: str | None = None,
        *,
        input_scale: Tensor | float | None = None,
        out_dtype: torch.dtype | str | None = None,
    ) -> Self:
        """The int8 layer with `module`'s weight and bias.

        Raises ValueError if the weight has NaN or infinity, or if `input_scale` is not finite and at least 1e-36.

        >>> model.fc = lamina.nn.Int8Linear.from_float(model.fc)
        """
        return super().from_float(module, activation, input_scale=input_scale, out_dtype=out_dtype)

    def _multiply(self, input: Tensor, packed: PackedInt8Weight, bias: Tensor | None) -> Tensor:
        return self._call(input, *packed, bias, self._op_activation, None, self.input_scale, None, self.out_dtype)
