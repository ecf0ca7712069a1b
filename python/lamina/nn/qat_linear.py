"""QATLinear: nn.Linear that trains with the rounding of the quantized layer it will become."""

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.quant.fake import fake_quantize_groups, fake_quantize_rows, fake_quantize_static, fake_quantize_weight


class QATLinear(nn.Linear):
    """nn.Linear whose weight and input pass through the codes of a quantized layer, with straight-through gradients.

    The forward pass gives what `Int8Linear`, or a weight-only layer, gives, up to the order of float32 sums; in the
    backward pass rounding is the identity (Bengio et al. 2013, arXiv:1308.3432). The input is quantized per row, or,
    with `input_scale`, with one static scale whose logarithm is learned (Esser et al. 2020, arXiv:1902.08153; Jain et
    al. 2020, arXiv:1903.08066): values beyond 127 steps are clipped and get no gradient. Sums run in float32 also for
    bfloat16.

    Args as in nn.Linear, and
        input_scale: the step of the input's codes to begin with, a positive number; None quantizes rows one by one.
        weight_only: the input is not quantized, as in `Int8WeightOnlyLinear`.
        group_size: with weight_only, int4 weights in groups of so many inputs, as in `Int4WeightOnlyLinear`.

    >>> layer = lamina.nn.QATLinear.from_float(nn.Linear(768, 3072))
    """

    # Set by lamina.nn.linears.stand_in: checkpoints hold the weight as the original does, [in, out].
    loads_transposed = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_scale: float | None = None,
        weight_only: bool = False,
        group_size: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set(input_scale, weight_only, group_size)

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        input_scale: float | None = None,
        *,
        weight_only: bool = False,
        group_size: int | None = None,
    ) -> Self:
        """The layer over `module`'s own parameters: an optimizer that holds them goes on training them."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = module.in_features, module.out_features
        layer.weight, layer.bias = module.weight, module.bias
        layer._set(input_scale, weight_only, group_size)
        return layer.train(module.training)

    def _set(self, input_scale: float | None, weight_only: bool, group_size: int | None) -> None:
        if weight_only and input_scale is not None:
            raise ValueError("QATLinear: input_scale is for a quantized input, but weight_only asks for a float one")
        if group_size is not None and not weight_only:
            raise ValueError("QATLinear: group_size is for int4 weights, which take a float input: weight_only=True")
        self.weight_only, self.group_size = weight_only, group_size
        if input_scale is not None and not (input_scale > 0 and math.isfinite(input_scale)):
            raise ValueError(f"QATLinear: input_scale is {input_scale}, but must be positive and finite")
        # The logarithm: a step of the optimizer is relative, and no step makes the scale negative.
        log_scale = None if input_scale is None else nn.Parameter(torch.tensor(math.log(input_scale)))
        self.register_parameter("log_input_scale", log_scale)

    @property
    def input_scale(self) -> Tensor | None:
        """The static step of the input's codes, float32 []; None if rows are quantized one by one."""
        return None if self.log_input_scale is None else self.log_input_scale.float().exp()

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] of the input's dtype."""
        if self.weight_only:
            x = input.float()
        elif (scale := self.input_scale) is None:
            x = fake_quantize_rows(input)
        else:
            x = fake_quantize_static(input, scale)
        if self.group_size is None:
            weight = fake_quantize_weight(self.weight)
        else:
            weight = fake_quantize_groups(self.weight, self.group_size)
        bias = None if self.bias is None else self.bias.float()
        # Autocast would round the codes' values once more.
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(x, weight, bias).to(input.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.loads_transposed:
            destination[prefix + "weight"] = destination[prefix + "weight"].t()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        if self.loads_transposed and prefix + "weight" in state_dict:
            state_dict = {**state_dict, prefix + "weight": state_dict[prefix + "weight"].t()}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        static = "rows" if self.log_input_scale is None else "static"
        weight = "int8" if self.group_size is None else f"int4, group_size={self.group_size}"
        return f"{super().extra_repr()}, input={'float' if self.weight_only else static}, weight={weight}"
