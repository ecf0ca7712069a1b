"""SparseLinear: nn.Linear with a weight that is mostly zeros."""

from typing import Self

import torch
from torch import Tensor, nn

from lamina.nn.packed_linear import PackedLinear
from lamina.nn.sparse_weight import SparseWeight
from lamina.ops.sparse_linear import call_sparse_linear


class SparseLinear(SparseWeight, PackedLinear):
    """nn.Linear with a frozen weight of which only the blocks that hold a value other than zero are stored.

    For pruned models: memory and time go with the number of blocks. Outputs equal those of the dense layer to float32
    rounding; zeros that are not stored multiply nothing, so that infinity and NaN at their inputs leave no trace. The
    weight does not train; gradients flow to the input and the bias, which lets what is around the layer be fine-tuned.
    `layer.weight` is the dense weight, computed when its values are used.

    The state_dict has `weight`, uint8: the packed bytes, whose header names pattern, version, dtype and sizes, and
    `bias`. A float `weight`, such as a state_dict of the pruned model, is packed in the layer's pattern when it is
    loaded; a packed one brings its own. Foreign, damaged and newer bytes are refused, by `lamina.load_` with
    FormatError.

    Args as in nn.Linear, and
        activation: None, "relu", "relu6", "gelu", "gelu_tanh", "quick_gelu", "silu", "hardswish" or "tanh", applied
            inside the op.
        pattern: output channels x inputs of a block: "unstructured" (1 x 1), "2x1", "4x1", "16x16", "32x32" or
            "64x64"; or "2:4". Any shape holds any block: what it has beyond the weight's edge counts as zeros. The CPU
            multiplies square blocks as the "4x1" they are made of, and 2:4 as "unstructured"; a GPU multiplies them as
            they are, and the weight of any other pattern as a dense one.

    >>> lamina.prune.magnitude_(linear, sparsity=0.9, pattern="4x1")
    >>> layer = lamina.nn.SparseLinear.from_float(linear, pattern="4x1")
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
        pattern: str = "unstructured",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, activation=activation, pattern=pattern)

    @classmethod
    def from_float(cls, module: nn.Linear, activation: str | None = None, *, pattern: str = "unstructured") -> Self:
        """The sparse layer with `module`'s weight, float32 or bfloat16 on the CPU, and bias.

        The zeros are those of the weight. Raises ValueError for another pattern, dtype or device.

        >>> model.fc = lamina.nn.SparseLinear.from_float(model.fc, pattern="4x1")
        """
        return super().from_float(module, activation, pattern=pattern)

    def _set(self, module: nn.Linear, activation: str | None, *, pattern: str = "unstructured") -> None:
        self._set_pattern(pattern)
        super()._set(module, activation)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], float32 or bfloat16."""
        # Straight to the op and past nn.Module.__getattr__, as in Int8Linear.
        buffers, bias = self._buffers, self._parameters["bias"]
        if (index := buffers["_index"]) is None:
            return call_sparse_linear(input, buffers["_packed"], bias, self.out_features, self._op_activation)
        return call_sparse_linear(input, buffers["_packed"], bias, self.out_features, self._op_activation, index)

    @property
    def rows_shape(self) -> tuple[int, int]:
        return self.weight_shape

    def _as_rows(self, weight: Tensor) -> Tensor:
        return weight

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows

    @staticmethod
    def saved_shape(out_features: int, in_features: int) -> None:
        """The packed bytes are as many as the blocks take."""
        return
