"""What linear layers with a packed, frozen weight have in common: memory, state_dict, conversion."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lamina.nn.dequantized import DequantizedWeight
from lamina.ops.int8_linear import ACTIVATIONS, PackedInt8Weight, pack_int8_weight, traced_weight, unpack_int8_weight
from lamina.quant.weights import dequantize_weight

# Output channels of a panel of a packed int8 weight.
PANEL = 64


class PackedLinear(nn.Linear, ABC):
    """nn.Linear whose weight does not train and lies packed for the kernels, in buffers that no state_dict shows.

    A subclass defines `forward` and how the weight gets in and out: `_pack`, `_set_packed`, `_saved`, `_dequantize`.
    The state_dict has `weight` and `weight_scale` in a form that is independent of the packing, and `bias`; a float
    `weight`, such as a state_dict of the original model, is quantized when it is loaded.
    """

    # Whether a float weight that is loaded lies as [in, out], as in the layer this one replaced (lamina.nn.linears).
    loads_transposed = False
    # Buffers that .to(dtype) leaves as they are.
    _kept_dtypes: Sequence[str] = ()

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

    @classmethod
    def from_float(cls, module: nn.Linear, activation: str | None = None, **options: Any) -> Self:
        """The quantized layer with `module`'s weight and bias. Raises ValueError if the weight has NaN or infinity.

        >>> model.fc = lamina.nn.Int8Linear.from_float(model.fc)
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(module, activation, **options)
        return layer.train(module.training)

    def _set(self, module: nn.Linear, activation: str | None) -> None:
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(
                f"{type(self).__name__}: activation '{activation}' is unknown; use one of {', '.join(ACTIVATIONS)}"
            )
        self.in_features = module.in_features
        self.out_features = module.out_features
        self.activation = activation
        self._op_activation = activation or "none"
        self._set_packed(self._pack(module.weight, None))
        # Follows .to(dtype), so that the weight has the dtype it would have had.
        self.register_buffer("_like", module.weight.new_empty(0), persistent=False)
        # A copy: the layer must not change with, or keep alive, the module it was made from.
        bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

    @abstractmethod
    def _pack(self, weight: Tensor, scale: Tensor | None) -> tuple:
        """What `_set_packed` takes, from a float weight or from what `_saved` gives; ValueError if it is not valid."""

    @abstractmethod
    def _set_packed(self, packed: tuple) -> None:
        """Keep a packed weight in buffers."""

    @abstractmethod
    def _saved(self) -> tuple[Tensor, Tensor]:
        """The codes and the scales as a state_dict has them."""

    @abstractmethod
    def _dequantize(self, traced: bool) -> Tensor:
        """The weight, float32; `traced`: by an op that graphs can hold."""

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out_features, in_features]; its shape, dtype and device cost nothing."""
        dtype = self._like.dtype
        if torch.compiler.is_compiling():  # a graph can't hold a tensor without values, but drops what it doesn't use
            return self._dequantize(True).to(dtype)
        shape = self.out_features, self.in_features
        return DequantizedWeight(shape, dtype, lambda: self._dequantize(False).to(dtype))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A float weight that is assigned, as transformers' tie_weights() does, is quantized; it is not kept or shared.

        Raises ValueError if it does not fit.
        """
        if name == "weight" and param is not None:
            self._set_packed(self.pack_saved(param.detach(), None))
        else:
            super().register_parameter(name, param)

    def part(self, input: Tensor, rows: slice) -> Tensor:
        """The outputs `rows`, from start to stop, alone."""
        return self(input)[..., rows]

    def pack_saved(self, weight: Tensor, scale: Tensor | None, name: str = "weight") -> tuple:
        """Pack `weight` and `weight_scale` of a state_dict; ValueError says why they do not fit this layer."""
        is_float = weight.is_floating_point()
        if is_float and self.loads_transposed:
            weight = weight.t()
        shape = (
            (self.out_features, self.in_features) if is_float else self.saved_shape(self.out_features, self.in_features)
        )
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"size mismatch for {name}: {list(weight.shape)} in the checkpoint, {list(shape)} in the layer"
            )
        try:
            return self._pack(weight, None if is_float else scale)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def check_saved(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """ValueError says why the tensors of this layer in a state_dict do not fit it."""
        name = f"{prefix}weight"
        self.pack_saved(state[name], state.get(f"{prefix}weight_scale"), name)

    @staticmethod
    def saved_shape(out_features: int, in_features: int) -> tuple[int, int]:
        """The shape of `weight` in the state_dict of a layer of this size."""
        return out_features, in_features

    def options(self) -> dict[str, str | int | None]:
        """The constructor's keyword arguments beside the sizes, as `lamina.save` writes them."""
        return {"activation": self.activation}

    def extra_repr(self) -> str:
        activation = f", activation={self.activation}" if self.activation else ""
        return f"{super().extra_repr()}{activation}"

    def _apply(self, fn, recurse=True):
        kept = {name: self._buffers[name] for name in self._kept_dtypes if self._buffers[name] is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if self._buffers[name].dtype != before.dtype:
                self._buffers[name] = before.to(self._buffers[name].device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"], destination[prefix + "weight_scale"] = self._saved()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        weight = state_dict.get(prefix + "weight")
        scale = state_dict.get(prefix + "weight_scale")
        rest = {k: v for k, v in state_dict.items() if k not in (prefix + "weight", prefix + "weight_scale")}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)
        if weight is None:
            missing.append(prefix + "weight")
            return
        try:
            self._set_packed(self.pack_saved(weight, scale, prefix + "weight"))
        except ValueError as error:
            errors.append(str(error))


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
