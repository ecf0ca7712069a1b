"""Int8Linear: nn.Linear with an int8 weight."""

from typing import Self

import torch
from torch import Tensor, nn

from lamina.nn.packed_linear import Int8PackedLinear
from lamina.ops.int8_linear import PackedInt8Weight, call_int8_linear


class Int8Linear(Int8PackedLinear):
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

    _kept_dtypes = (*Int8PackedLinear._kept_dtypes, "input_scale")

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

    def _set(
        self,
        module: nn.Linear,
        activation: str | None,
        *,
        input_scale: Tensor | float | None = None,
        out_dtype: torch.dtype | str | None = None,
    ) -> None:
        if isinstance(out_dtype, str):
            out_dtype = getattr(torch, out_dtype, out_dtype)
        if out_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"Int8Linear: out_dtype is {out_dtype}, but must be None, torch.float32 or torch.bfloat16")
        self.out_dtype = out_dtype
        super()._set(module, activation)
        self.register_buffer("input_scale", None if input_scale is None else _input_scale(input_scale))

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], float32 or bfloat16."""
        # Straight to the op and past nn.Module.__getattr__: 3 us less, of 10 for a small layer.
        buffers = self._buffers
        return call_int8_linear(
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
        return call_int8_linear(input, *packed, self.bias, activation, None, self.input_scale, None, self.out_dtype)

    def _multiply(self, input: Tensor, packed: PackedInt8Weight, bias: Tensor | None) -> Tensor:
        return call_int8_linear(input, *packed, bias, self._op_activation, None, self.input_scale, None, self.out_dtype)

    def options(self) -> dict[str, str | None]:
        """The constructor's keyword arguments beside the sizes, as `lamina.save` writes them."""
        out_dtype = {} if self.out_dtype is None else {"out_dtype": str(self.out_dtype).removeprefix("torch.")}
        return {**super().options(), **out_dtype}

    def extra_repr(self) -> str:
        scale = "" if self.input_scale is None else f", input_scale={self.input_scale.item():.4g}"
        out_dtype = f", out_dtype={self.out_dtype}" if self.out_dtype else ""
        return f"{super().extra_repr()}{scale}{out_dtype}"

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        name = prefix + "input_scale"
        try:
            scale = None if state_dict.get(name) is None else _input_scale(state_dict[name])
        except ValueError as error:
            errors.append(f"{name}: {error}")
            return
        rest = {k: v for k, v in state_dict.items() if k != name}
        packed, before = self._packed, self._buffers["input_scale"]
        # The buffer is None meanwhile, or torch would miss it.
        self._buffers["input_scale"] = None
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)
        # Weight and static scale belong together: a checkpoint without one makes the layer dynamic.
        self._buffers["input_scale"] = before if self._packed is packed else scale


def _input_scale(scale: Tensor | float) -> Tensor:
    """A copy as float32 []; refused here, so that no later call fails."""
    scale = torch.as_tensor(scale, dtype=torch.float32).detach().clone()
    if scale.shape != ():
        raise ValueError(f"Int8Linear: input_scale has shape {list(scale.shape)}, but must be a scalar []")
    if not 1e-36 <= scale.item() < float("inf"):
        raise ValueError(f"Int8Linear: input_scale is {scale.item():g}, but must be finite and at least 1e-36")
    return scale
