"""SparseConv2d: nn.Conv2d with a weight that is mostly zeros."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.nn.convs import ATTRIBUTES
from lamina.nn.sparse_weight import SparseWeight
from lamina.ops.int8_conv2d import four_paddings
from lamina.ops.sparse_conv2d import call_sparse_conv2d, from_window_rows, window_rows


class SparseConv2d(SparseWeight, nn.Conv2d):
    """nn.Conv2d with a frozen weight of which only the blocks that hold a value other than zero are stored.

    Any kernel, stride, padding, padding mode and dilation, one group. Outputs lie in memory as torch.channels_last;
    inputs that do need no turning. All else as in `SparseLinear`: gradients flow to the input and the bias, the
    state_dict has the packed `weight` and `bias`, `layer.weight` is the dense weight.

    Args as in nn.Conv2d, and
        activation: None, "relu", "relu6", "gelu", "gelu_tanh", "quick_gelu", "silu", "hardswish" or "tanh", applied
            inside the op.
        pattern: output channels x inputs of a block: "unstructured" (1 x 1), "2x1" or "4x1". Any shape holds any.

    >>> layer = lamina.nn.SparseConv2d.from_float(pruned_conv, pattern="4x1")
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        pattern: str = "unstructured",
    ) -> None:
        arguments = in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        float_conv = nn.Conv2d(*arguments, device, dtype)
        nn.Module.__init__(self)
        self._set(float_conv, activation, pattern=pattern)

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Whether a layer of this class can take the place of `module`."""
        return type(module) in (cls, nn.Conv2d)

    @classmethod
    def from_float(cls, module: nn.Conv2d, activation: str | None = None, *, pattern: str = "unstructured") -> Self:
        """The sparse layer with `module`'s weight, float32 or bfloat16 on the CPU, and bias.

        Raises ValueError for groups, and for another pattern, dtype or device.

        >>> model.conv1 = lamina.nn.SparseConv2d.from_float(model.conv1, pattern="4x1")
        """
        return super().from_float(module, activation, pattern=pattern)

    def _set(self, module: nn.Conv2d, activation: str | None, *, pattern: str = "unstructured") -> None:
        if module.groups != 1:
            raise ValueError(f"it has {module.groups} groups, and sparse convolutions take one")
        self._set_pattern(pattern)
        for name in ATTRIBUTES:
            setattr(self, name, getattr(module, name))
        zeros = self.padding_mode == "zeros"
        padding = four_paddings(self.padding if zeros else 0, self.kernel_size, self.stride, self.dilation)
        self._geometry = (*self.kernel_size, *self.stride, *self.dilation, *padding)
        self._keep(module, activation)

    def forward(self, input: Tensor) -> Tensor:
        """[images, channels, height, width] or [channels, height, width] -> the same of the output."""
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        bias = self._parameters["bias"]
        return call_sparse_conv2d(
            input, self._buffers["_packed"], bias, self.out_channels, self._geometry, self._op_activation
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels, *self.kernel_size

    @property
    def rows_shape(self) -> tuple[int, int]:
        kh, kw = self.kernel_size
        return self.out_channels, self.in_channels * kh * kw

    def _as_rows(self, weight: Tensor) -> Tensor:
        return window_rows(weight)

    def _from_rows(self, rows: Tensor) -> Tensor:
        return from_window_rows(rows, self.kernel_size)
