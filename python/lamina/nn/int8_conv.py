"""Int8Conv1d, Int8Conv2d, Int8ConvTranspose2d: torch's convolutions with an int8 weight."""

import copy
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lamina.nn.convs import ATTRIBUTES, Conv, conv_class
from lamina.nn.int8_input import Int8Input
from lamina.ops.int8_conv2d import (
    PackedInt8ConvTransposeWeight,
    PackedInt8ConvWeight,
    call_int8_conv2d,
    four_paddings,
    from_phases,
    int8_conv_transpose2d,
    move_int8_conv_weight,
    pack_int8_conv_transpose_weight,
    pack_int8_conv_weight,
    traced_conv_weight,
    unpack_int8_conv_transpose_weight,
    unpack_int8_conv_weight,
)
from lamina.quant.weights import dequantize_weight


class _Int8Conv(Int8Input):
    """What the three have in common."""

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Whether a layer of this class can take the place of `module`: the torch class it mirrors, or its own."""
        return type(module) is cls or conv_class(module) is cls.__bases__[1]

    @classmethod
    def from_float(
        cls,
        module: Conv,
        activation: str | None = None,
        *,
        batch_norm: nn.modules.batchnorm._BatchNorm | None = None,
        input_scale: Tensor | float | None = None,
        out_dtype: torch.dtype | str | None = None,
    ) -> Self:
        """The int8 layer with `module`'s weight and bias, and with the `batch_norm` behind it folded into them.

        Raises ValueError if the weight has NaN or infinity, or if `input_scale` is not finite and at least 1e-36.

        >>> model.conv1 = lamina.nn.Int8Conv2d.from_float(model.conv1, "relu", batch_norm=model.bn1)
        """
        if batch_norm is not None:
            pair = (copy.deepcopy(layer).eval() for layer in (module, batch_norm))
            module = fuse_conv_bn_eval(*pair, transpose=module.transposed).train(module.training)
        return super().from_float(module, activation, input_scale=input_scale, out_dtype=out_dtype)

    def _set(
        self,
        module: Conv,
        activation: str | None,
        *,
        input_scale: Tensor | float | None = None,
        out_dtype: torch.dtype | str | None = None,
    ) -> None:
        for name in ATTRIBUTES:
            setattr(self, name, getattr(module, name))
        self._keep(module, activation)
        self._set_input(input_scale, out_dtype)

    def _pack(self, weight: Tensor, scale: Tensor | None) -> PackedInt8ConvWeight:
        return pack_int8_conv_weight(weight, scale, groups=self.groups)

    def _set_packed(self, packed: PackedInt8ConvWeight) -> None:
        self.register_buffer("_packed", packed.data, persistent=False)
        self.register_buffer("_scale", packed.scale, persistent=False)
        self.register_buffer("_compensation", packed.compensation, persistent=False)
        self._size = packed.size

    @property
    def packed_weight(self) -> PackedInt8ConvWeight | PackedInt8ConvTransposeWeight:
        """What lamina.ops takes."""
        return self._plain()

    def _plain(self) -> PackedInt8ConvWeight:
        """The weight of the plain convolution that computes the layer."""
        buffers = self._buffers
        return PackedInt8ConvWeight(
            buffers["_packed"], buffers["_scale"], buffers["_compensation"], self._size, self.groups
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _moved(self, packed: PackedInt8ConvWeight, device: torch.device) -> PackedInt8ConvWeight:
        return move_int8_conv_weight(packed, device)

    def _saved(self) -> tuple[Tensor, Tensor]:
        codes = unpack_int8_conv_weight(self._for_host()).reshape(self.weight_shape)
        return codes.to(self._like.device), self._scale.detach()

    def _dequantize(self, traced: bool) -> Tensor:
        if traced:
            return traced_conv_weight(self.packed_weight).reshape(self.weight_shape)
        return dequantize_weight(*self._saved())

    def extra_repr(self) -> str:
        activation = f", activation={self.activation}" if self.activation else ""
        return f"{super().extra_repr()}{activation}"

    def _padded(self, input: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
        """The input, padded already in other modes than zeros, and how the op pads it."""
        if self.padding_mode != "zeros":
            return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0, 0, 0)
        one = len(self.kernel_size) == 1
        sizes = ((1, *each) if one else each for each in (self.kernel_size, self.stride, self.dilation))
        padding = (0, *self.padding) if one and not isinstance(self.padding, str) else self.padding
        return input, four_paddings(padding, *sizes)

    def _call(self, input: Tensor, stride: tuple, padding: tuple, dilation: tuple) -> Tensor:
        return call_int8_conv2d(
            input,
            self.packed_weight,
            self._parameters["bias"],
            stride,
            padding,
            dilation,
            self._op_activation,
            x_scale=self._buffers["input_scale"],
            out_dtype=self.out_dtype,
        )


class Int8Conv2d(_Int8Conv, nn.Conv2d):
    """nn.Conv2d with a frozen int8 weight: activations are quantized per image inside the op.

    Takes the place of nn.Conv2d with all of its arguments. Outputs lie in memory as torch.channels_last; inputs that do
    need no turning. The layer holds one copy of its weight, packed for the kernels: about a quarter of the float32
    bytes. Its state_dict has `weight` (int8), `weight_scale` (float32 [out]), `bias` and, if there is one,
    `input_scale`, independent of the packing; a float `weight` is quantized when it is loaded.

    Args as in nn.Conv2d, and
        activation: None, "relu", "relu6", "gelu", "gelu_tanh", "quick_gelu", "silu", "hardswish" or "tanh", applied
            inside the op.
        out_dtype: torch.float32 or torch.bfloat16, or its name; None for the input's dtype.

    `input_scale` is a buffer: None, for a scale of each image that each call finds, or a float32 scalar tensor [], the
    static scale that calibration found: codes are clamped to [-127, 127] and images need not be searched.

    The weight does not train; the gradient for the input is the straight-through one, as if nothing had been rounded.

    >>> layer = lamina.nn.Int8Conv2d.from_float(nn.Conv2d(64, 128, 3, padding=1))
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
        out_dtype: torch.dtype | str | None = None,
    ) -> None:
        arguments = in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        float_conv = nn.Conv2d(*arguments, device, dtype)
        nn.Module.__init__(self)
        self._set(float_conv, activation, out_dtype=out_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[images, channels, height, width] or [channels, height, width] -> the same of the output, float."""
        input, padding = self._padded(input)
        return self._call(input, self.stride, padding, self.dilation)


class Int8Conv1d(_Int8Conv, nn.Conv1d):
    """nn.Conv1d with a frozen int8 weight; all else as in Int8Conv2d, of images one row high.

    >>> layer = lamina.nn.Int8Conv1d.from_float(nn.Conv1d(512, 512, 3, stride=2))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: str | int | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        out_dtype: torch.dtype | str | None = None,
    ) -> None:
        arguments = in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        float_conv = nn.Conv1d(*arguments, device, dtype)
        nn.Module.__init__(self)
        self._set(float_conv, activation, out_dtype=out_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[batch, channels, length] or [channels, length] -> the same of the output, float."""
        input, padding = self._padded(input)
        return self._call(input.unsqueeze(-2), (1, *self.stride), padding, (1, *self.dilation)).squeeze(-2)


class Int8ConvTranspose2d(_Int8Conv, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with a frozen int8 weight; all else as in Int8Conv2d.

    >>> layer = lamina.nn.Int8ConvTranspose2d.from_float(nn.ConvTranspose2d(64, 32, 2, stride=2))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        out_dtype: torch.dtype | str | None = None,
    ) -> None:
        arguments = in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation
        float_conv = nn.ConvTranspose2d(*arguments, padding_mode, device, dtype)
        nn.Module.__init__(self)
        self._set(float_conv, activation, out_dtype=out_dtype)

    def _pack(self, weight: Tensor, scale: Tensor | None) -> PackedInt8ConvTransposeWeight:
        geometry = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        return pack_int8_conv_transpose_weight(weight, scale, **geometry)

    def _set_packed(self, packed: PackedInt8ConvTransposeWeight) -> None:
        super()._set_packed(packed.conv)

    @property
    def packed_weight(self) -> PackedInt8ConvTransposeWeight:
        return PackedInt8ConvTransposeWeight(self._plain(), self.kernel_size, self.stride, self.dilation)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size

    def _moved(self, packed: PackedInt8ConvTransposeWeight, device: torch.device) -> PackedInt8ConvTransposeWeight:
        return packed._replace(conv=move_int8_conv_weight(packed.conv, device))

    def _saved(self) -> tuple[Tensor, Tensor]:
        codes, scale = unpack_int8_conv_transpose_weight(self._for_host())
        return codes.to(self._like.device), scale.to(self._like.device)

    def _dequantize(self, traced: bool) -> Tensor:
        packed = self.packed_weight
        if traced:
            return from_phases(traced_conv_weight(packed.conv), packed)
        codes, scale = self._saved()
        per_input = scale.reshape(self.groups, -1).repeat_interleave(self.in_channels // self.groups, 0)
        return codes * per_input[:, :, None, None]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[images, channels, height, width] or [channels, height, width] -> the same of the output, float."""
        output_padding: Any = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return int8_conv_transpose2d(
            input,
            self.packed_weight,
            self._parameters["bias"],
            self.padding,
            output_padding,
            activation=self.activation,
            x_scale=self._buffers["input_scale"],
            out_dtype=self.out_dtype,
        )


def conv_arguments_of(module: nn.Module) -> dict[str, Any]:
    """The constructor's keyword arguments of a convolution, ours or torch's."""
    names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
    arguments = {name: getattr(module, name) for name in names}
    if module.transposed:
        arguments["output_padding"] = module.output_padding
    return {**arguments, "bias": module.bias is not None, "dtype": module.weight.dtype}
