"""Drop-in convolution layers."""

from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from lamina import ops
from lamina.nn.convs import conv_class
from lamina.ops.conv2d import winograd_tile

# Outputs (height x width) from which F(4x4) beats F(2x2): below, its 36 products of weights wait for memory.
_LARGE_MAP = 400


class Conv2d(nn.Conv2d):
    """Drop-in for nn.Conv2d: the same arguments, parameters, inputs and gradients, through `lamina.ops.conv2d`.

    Every option of nn.Conv2d is honoured, padding modes and groups included. float32 and bfloat16 on the CPU are
    lamina's; other devices and dtypes, and autocast, are torch's. The layout of the output is torch's rule:
    channels_last if the input or the weight is.

    Args as in nn.Conv2d, and
        activation: None, "relu", "relu6", "gelu", "gelu_tanh", "quick_gelu", "silu", "hardswish" or "tanh", applied
            inside the op.
        winograd: outputs a side of a tile for 3 x 3 kernels of stride 1. 2, F(2x2), is as exact as the direct sum; 4
            allows F(4x4) where the output is large enough for it to be faster, which loses about a digit; 0 is the
            direct sum.

    >>> layer = lamina.nn.Conv2d.from_float(nn.Conv2d(64, 64, 3, padding=1))
    >>> y = layer(torch.randn(1, 64, 56, 56))
    """

    def __init__(self, *args, activation: str | None = None, winograd: int = 2, **kwargs):
        super().__init__(*args, **kwargs)
        self._set(activation, winograd)

    def _set(self, activation: str | None, winograd: int) -> None:
        if winograd not in (0, 2, 4):
            raise ValueError(f"Conv2d: winograd is {winograd}, but must be 0, 2 or 4")
        self.activation, self.winograd = activation, winograd

    @classmethod
    def from_float(cls, module: nn.Conv2d, *, activation: str | None = None, winograd: int = 2) -> Self:
        """The layer with the parameters (shared, not copied) and in the mode of a torch layer.

        Raises TypeError if `module` is no nn.Conv2d, or a subclass that may compute something else.
        """
        if conv_class(module) is not nn.Conv2d:
            raise TypeError(f"{cls.__name__}.from_float: expected nn.Conv2d, got {type(module).__name__}")
        names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
        arguments = {name: getattr(module, name) for name in names}
        layer = cls(**arguments, bias=module.bias is not None, device="meta", activation=activation, winograd=winograd)
        for name, parameter in module.named_parameters(recurse=False):
            setattr(layer, name, parameter)
        return layer.train(module.training)

    def extra_repr(self) -> str:
        extra = "" if self.activation is None else f", activation={self.activation}"
        return f"{super().extra_repr()}{extra}, winograd={self.winograd}"

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] or [C, H, W] -> [B, N, H', W'] or [N, H', W'], in input's dtype."""
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return ops.conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            winograd=self._tile(input),
        )

    def _tile(self, input: Tensor) -> int:
        tile = winograd_tile(self.weight, self.stride, self.dilation, self.groups) if self.winograd else 0
        large = self.winograd == 4 and input.shape[-1] * input.shape[-2] >= _LARGE_MAP
        return 4 if tile and large else tile
