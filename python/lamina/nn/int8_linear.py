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
    has `weight` (int8 [out, in]), `weight_scale` (float32 [out]) and `bias`, independent of the packing; a float
    `weight`, such as a state_dict of the original model, is quantized when it is loaded. `layer.weight` is the
    dequantized weight in the dtype of the original, computed when its values are used.

    Args as in nn.Linear, and `activation`: None, "relu", "gelu", "gelu_tanh" or "silu", applied inside the op.

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
    ) -> None:
        float_linear = nn.Linear(in_features, out_features, bias, device, dtype)
        nn.Module.__init__(self)
        self._set(float_linear, activation)

    @classmethod
    def from_float(cls, module: nn.Linear, activation: str | None = None) -> Self:
        """The int8 layer with `module`'s weight and bias. Raises ValueError if the weight has NaN or infinity.

        >>> model.fc = lamina.nn.Int8Linear.from_float(model.fc)
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(module, activation)
        return layer.train(module.training)

    def _set(self, module: nn.Linear, activation: str | None) -> None:
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"Int8Linear: activation '{activation}' is unknown; use one of {', '.join(ACTIVATIONS)}")
        self.in_features = module.in_features
        self.out_features = module.out_features
        self.activation = activation
        self._op_activation = activation or "none"
        self._set_packed(pack_int8_weight(module.weight))
        # Follows .to(dtype), so that the weight has the dtype it would have had.
        self.register_buffer("_like", module.weight.new_empty(0), persistent=False)
        # A copy: the layer must not change with, or keep alive, the module it was made from.
        bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

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
        )

    def options(self) -> dict[str, str | None]:
        """The constructor's keyword arguments beside the sizes, as `lamina.save` writes them."""
        return {"activation": self.activation}

    def extra_repr(self) -> str:
        activation = f", activation={self.activation}" if self.activation else ""
        return f"{super().extra_repr()}{activation}"

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) and .half() concern activations: scales stay float32, or outputs would lose three digits.
        scale = self._scale
        super()._apply(fn, recurse)
        if self._scale.dtype != torch.float32:
            self._scale = scale.to(self._scale.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = unpack_int8_weight(self.packed_weight, self.in_features)
        destination[prefix + "weight_scale"] = self._scale.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        weight = state_dict.get(prefix + "weight")
        scale = state_dict.get(prefix + "weight_scale")
        rest = {k: v for k, v in state_dict.items() if k not in (prefix + "weight", prefix + "weight_scale")}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)
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
            self._set_packed(pack_int8_weight(weight, None if weight.is_floating_point() else scale))
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}")
