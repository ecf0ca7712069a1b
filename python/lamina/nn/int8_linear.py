"""Int8Linear: nn.Linear with an int8 weight."""

from typing import Self

import torch
from torch import Tensor, nn

from lamina.nn.dequantized import DequantizedWeight
from lamina.ops.int8_linear import (
    ACTIVATIONS,
    PackedInt8Weight,
    call_int8_linear,
    pack_int8_weight,
    traced_weight,
    unpack_int8_weight,
)
from lamina.quant.weights import dequantize_weight


class Int8Linear(nn.Linear):
    """nn.Linear with a frozen int8 weight: activations are quantized per row inside the op.

    The layer holds one copy of its weight, packed for the kernels: about a quarter of the float32 bytes. Its state_dict
    has `weight` (int8 [out, in]), `weight_scale` (float32 [out]), `bias` and, if there is one, `input_scale`,
    independent of the packing; a float `weight`, such as a state_dict of the original model, is quantized when it is
    loaded. `layer.weight` is the dequantized weight in the dtype of the original, computed when its values are used.

    Args as in nn.Linear, and
        activation: None, "relu", "gelu", "gelu_tanh", "quick_gelu", "silu" or "tanh", applied inside the op.
        out_dtype: torch.float32 or torch.bfloat16, or its name; None for the input's dtype.

    `input_scale` is a buffer: None, for a scale per row that each call finds, or a float32 scalar tensor [], the static
    scale that calibration found: codes are clamped to [-127, 127] and the rows need not be searched.

    Accuracy: weights and activations have 8 bits with one scale per channel and row; sums are exact. The weight does
    not train; the gradient for the input is the straight-through one, as if nothing had been rounded.

    >>> layer = lamina.nn.Int8Linear.from_float(nn.Linear(768, 3072))
    """

    # Whether a float weight that is loaded lies as [in, out], as in the layer this one replaced (lamina.nn.linears).
    loads_transposed = False

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
        float_linear = nn.Linear(in_features, out_features, bias, device, dtype)
        nn.Module.__init__(self)
        self._set(float_linear, activation, None, out_dtype)

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
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(module, activation, input_scale, out_dtype)
        return layer.train(module.training)

    def _set(
        self,
        module: nn.Linear,
        activation: str | None,
        input_scale: Tensor | float | None,
        out_dtype: torch.dtype | str | None,
    ) -> None:
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"Int8Linear: activation '{activation}' is unknown; use one of {', '.join(ACTIVATIONS)}")
        if isinstance(out_dtype, str):
            out_dtype = getattr(torch, out_dtype, out_dtype)
        if out_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"Int8Linear: out_dtype is {out_dtype}, but must be None, torch.float32 or torch.bfloat16")
        self.in_features = module.in_features
        self.out_features = module.out_features
        self.activation = activation
        self.out_dtype = out_dtype
        self._op_activation = activation or "none"
        self._set_packed(pack_int8_weight(module.weight))
        # Follows .to(dtype), so that the weight has the dtype it would have had.
        self.register_buffer("_like", module.weight.new_empty(0), persistent=False)
        # A copy: the layer must not change with, or keep alive, the module it was made from.
        bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)
        self.register_buffer("input_scale", None if input_scale is None else _input_scale(input_scale))

    def _set_packed(self, packed: PackedInt8Weight) -> None:
        for name, value in zip(("_packed", "_scale", "_compensation"), packed, strict=True):
            self.register_buffer(name, value, persistent=False)

    @property
    def packed_weight(self) -> PackedInt8Weight:
        return PackedInt8Weight(self._packed, self._scale, self._compensation)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out_features, in_features]; its shape, dtype and device cost nothing."""
        packed, k, dtype = self.packed_weight, self.in_features, self._like.dtype
        if torch.compiler.is_compiling():  # a graph can't hold a tensor without values, but drops what it doesn't use
            return traced_weight(packed, k).to(dtype)

        def compute() -> Tensor:
            return dequantize_weight(unpack_int8_weight(packed, k), packed.scale).to(dtype)

        return DequantizedWeight((self.out_features, k), dtype, compute)

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

    def options(self) -> dict[str, str | None]:
        """The constructor's keyword arguments beside the sizes, as `lamina.save` writes them."""
        out_dtype = {} if self.out_dtype is None else {"out_dtype": str(self.out_dtype).removeprefix("torch.")}
        return {"activation": self.activation, **out_dtype}

    def extra_repr(self) -> str:
        activation = f", activation={self.activation}" if self.activation else ""
        scale = "" if self.input_scale is None else f", input_scale={self.input_scale.item():.4g}"
        out_dtype = f", out_dtype={self.out_dtype}" if self.out_dtype else ""
        return f"{super().extra_repr()}{activation}{scale}{out_dtype}"

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) and .half() concern activations: scales stay float32, or outputs would lose three digits.
        kept = {name: self._buffers[name] for name in ("_scale", "input_scale")}
        super()._apply(fn, recurse)
        for name, scale in kept.items():
            if scale is not None and self._buffers[name].dtype != torch.float32:
                self._buffers[name] = scale.to(self._buffers[name].device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = unpack_int8_weight(self.packed_weight, self.in_features)
        destination[prefix + "weight_scale"] = self._scale.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        own = {prefix + name for name in ("weight", "weight_scale", "input_scale")}
        weight = state_dict.get(prefix + "weight")
        scale = state_dict.get(prefix + "weight_scale")
        input_scale = state_dict.get(prefix + "input_scale")
        rest = {k: v for k, v in state_dict.items() if k not in own}
        # The buffer is None meanwhile, or torch would miss it.
        before, self._buffers["input_scale"] = self._buffers["input_scale"], None
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)
        self._buffers["input_scale"] = before
        if weight is None:
            missing.append(prefix + "weight")
            return
        if self.loads_transposed and weight.is_floating_point():
            weight = weight.t()
        if tuple(weight.shape) != (self.out_features, self.in_features):
            errors.append(
                f"size mismatch for {prefix}weight: {list(weight.shape)} in the checkpoint, "
                f"[{self.out_features}, {self.in_features}] in the layer"
            )
            return
        try:
            input_scale = None if input_scale is None else _input_scale(input_scale)
            self._set_packed(pack_int8_weight(weight, None if weight.is_floating_point() else scale))
            # Weight and static scale belong together: a checkpoint without one makes the layer dynamic.
            self._buffers["input_scale"] = input_scale
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}")


def _input_scale(scale: Tensor | float) -> Tensor:
    """A copy as float32 []; refused here, so that no later call fails."""
    scale = torch.as_tensor(scale, dtype=torch.float32).detach().clone()
    if scale.shape != ():
        raise ValueError(f"Int8Linear: input_scale has shape {list(scale.shape)}, but must be a scalar []")
    if not 1e-36 <= scale.item() < float("inf"):
        raise ValueError(f"Int8Linear: input_scale is {scale.item():g}, but must be finite and at least 1e-36")
    return scale
