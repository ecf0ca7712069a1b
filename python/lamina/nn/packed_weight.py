"""What layers with a packed, frozen weight have in common: memory, state_dict, conversion."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lamina.nn.dequantized import DequantizedWeight
from lamina.ops.int8_linear import ACTIVATIONS


class PackedWeight(ABC):
    """Before an nn layer in the bases: its weight does not train and lies packed, in buffers that no state_dict shows.

    A subclass defines `forward`, `_set`, `weight_shape`, and how the weight gets in and out: `_pack`, `_set_packed`,
    `_moved`, `_saved`, `_dequantize`. The state_dict has `weight` and `weight_scale` in a form that is independent of
    the packing, and `bias`; a float `weight`, such as a state_dict of the original model, is quantized when it is
    loaded.

    Kernels of a CPU and of a GPU read weights in different forms: a layer that moves from one to the other
    (`.to("cuda")`, `.cpu()`) packs its weight anew, from the same codes. Its state_dict is the same on both.
    """

    # Whether a float weight that is loaded lies as [in, out], as in the layer this one replaced (lamina.nn.linears).
    loads_transposed = False
    # Buffers that .to(dtype) leaves as they are.
    _kept_dtypes: Sequence[str] = ()

    @classmethod
    def from_float(cls, module: nn.Module, activation: str | None = None, **options: Any) -> Self:
        """The quantized layer with `module`'s weight and bias. Raises ValueError if the weight has NaN or infinity.

        >>> model.fc = lamina.nn.Int8Linear.from_float(model.fc)
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(module, activation, **options)
        return layer.train(module.training)

    @abstractmethod
    def _set(self, module: nn.Module, activation: str | None, **options: Any) -> None:
        """Take over everything from the float layer; calls `_keep`."""

    def _keep(self, module: nn.Module, activation: str | None) -> None:
        """Pack the weight of `module`, and copy its bias."""
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(
                f"{type(self).__name__}: activation '{activation}' is unknown; use one of {', '.join(ACTIVATIONS)}"
            )
        self.activation = activation
        self._op_activation = activation or "none"
        # Follows .to(dtype), so that the weight has the dtype it would have had, and says where the layer is.
        self.register_buffer("_like", module.weight.new_empty(0), persistent=False)
        self._place(self._pack(on_host(module.weight), None))
        # A copy: the layer must not change with, or keep alive, the module it was made from.
        bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

    @abstractmethod
    def _pack(self, weight: Tensor, scale: Tensor | None) -> tuple:
        """A weight as the CPU's kernels read it, of a float one or of what `_saved` gives, on the CPU.

        ValueError if it is not valid.
        """

    @abstractmethod
    def _set_packed(self, packed: tuple) -> None:
        """Keep a packed weight in buffers."""

    @abstractmethod
    def _moved(self, packed: tuple, device: torch.device) -> tuple:
        """A packed weight on another device, in the form that the kernels there read."""

    def _place(self, packed: tuple) -> None:
        """Keep a weight that was packed for the CPU, in the form and in the place that this layer's device asks for."""
        device = self._like.device
        self._set_packed(packed if device.type == "cpu" else self._moved(packed, device))

    def _for_host(self) -> tuple:
        """The packed weight as the CPU's kernels read it."""
        return self._moved(self.packed_weight, torch.device("cpu"))

    @property
    @abstractmethod
    def packed_weight(self) -> tuple:
        """What lamina.ops takes, on this layer's device."""

    @abstractmethod
    def _saved(self) -> tuple[Tensor, Tensor | None]:
        """The codes and the scales, if there are any, as a state_dict has them."""

    @abstractmethod
    def _dequantize(self, traced: bool) -> Tensor:
        """The weight, float32; `traced`: by an op that graphs can hold."""

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the float weight."""

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, shaped as the float one; its shape, dtype and device cost nothing."""
        dtype = self._like.dtype
        if torch.compiler.is_compiling():  # a graph can't hold a tensor without values, but drops what it doesn't use
            return self._dequantize(True).to(dtype)
        compute = lambda: self._dequantize(False).to(dtype)  # noqa: E731
        return DequantizedWeight(self.weight_shape, dtype, compute, self._like.device)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A float weight that is assigned, as transformers' tie_weights() does, is quantized; it is not kept or shared.

        Raises ValueError if it does not fit.
        """
        if name == "weight" and param is not None:
            self._place(self.pack_saved(param.detach(), None))
        else:
            super().register_parameter(name, param)

    def pack_saved(self, weight: Tensor, scale: Tensor | None, name: str = "weight") -> tuple:
        """Pack `weight` and `weight_scale` of a state_dict for the CPU; ValueError says why they do not fit here."""
        weight, scale = on_host(weight), None if scale is None else on_host(scale)
        is_float = weight.is_floating_point()
        if is_float and self.loads_transposed:
            weight = weight.t()
        shape = self.weight_shape if is_float else self._saved_weight_shape()
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

    def _saved_weight_shape(self) -> tuple[int, ...]:
        """The shape of `weight` in the state_dict."""
        return self.weight_shape

    def options(self) -> dict[str, str | int | None]:
        """The constructor's keyword arguments beside the sizes, as `lamina.save` writes them."""
        return {"activation": self.activation}

    def _apply(self, fn, recurse=True):
        here, there = self._like.device, fn(self._like).device
        if repacks(here.type, there.type):
            # Without values there is nothing to repack: sizes are what counts.
            packed = self._pack(torch.zeros(self.weight_shape), None) if here.type == "meta" else self.packed_weight
            # On a GPU it is in its place then, and `fn` finds nothing to do; from the CPU `fn` takes it further.
            self._set_packed(self._moved(packed, there if there.type == "cuda" else torch.device("cpu")))
        kept = {name: self._buffers[name] for name in self._kept_dtypes if self._buffers[name] is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if self._buffers[name].dtype != before.dtype:
                self._buffers[name] = before.to(self._buffers[name].device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"], scale = self._saved()
        if scale is not None:
            destination[prefix + "weight_scale"] = scale

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        weight = state_dict.get(prefix + "weight")
        scale = state_dict.get(prefix + "weight_scale")
        rest = {k: v for k, v in state_dict.items() if k not in (prefix + "weight", prefix + "weight_scale")}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)
        if weight is None:
            missing.append(prefix + "weight")
            return
        try:
            self._place(self.pack_saved(weight, scale, prefix + "weight"))
        except ValueError as error:
            errors.append(str(error))


def repacks(here: str, there: str) -> bool:
    """Whether a packed weight changes its form between devices of these types: those of GPUs are of their own."""
    return (here == "cuda") != (there == "cuda")


def on_host(t: Tensor) -> Tensor:
    """A tensor of a GPU on the CPU, where weights are packed; any other as it is."""
    return t.cpu() if t.is_cuda else t
