"""What int8 layers have in common at their ends: the static scale of their input, and the dtype of their output."""

import torch
from torch import Tensor

from lamina.nn.packed_weight import PackedWeight


class Int8Input(PackedWeight):
    """`input_scale`: a buffer, None for scales that each call finds, or a float32 scalar tensor []. `out_dtype`."""

    _kept_dtypes = ("_scale", "input_scale")

    def _set_input(self, input_scale: Tensor | float | None, out_dtype: torch.dtype | str | None) -> None:
        """Checks and keeps them; ValueError says why not."""
        name = type(self).__name__
        if isinstance(out_dtype, str):
            out_dtype = getattr(torch, out_dtype, out_dtype)
        if out_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"{name}: out_dtype is {out_dtype}, but must be None, torch.float32 or torch.bfloat16")
        self.out_dtype = out_dtype
        scale = None if input_scale is None else _input_scale(name, input_scale).to(self._scale.device)
        if scale is not None and self._scale.numel() and not (scale * self._scale).isfinite().all():
            raise ValueError(
                f"{name}: input_scale {scale.item():g} times the largest weight scale {self._scale.max().item():g} is "
                "too large for float32"
            )
        self.register_buffer("input_scale", scale)

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
            scale = None if state_dict.get(name) is None else _input_scale(type(self).__name__, state_dict[name])
        except ValueError as error:
            errors.append(f"{name}: {error}")
            return
        rest = {k: v for k, v in state_dict.items() if k != name}
        packed, before = self._packed, self._buffers["input_scale"]
        # The buffer is None meanwhile, or torch would miss it.
        self._buffers["input_scale"] = None
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)
        # Weight and static scale belong together: a checkpoint without one makes the layer dynamic.
        if self._packed is packed:
            scale = before
        self._buffers["input_scale"] = None if scale is None else scale.to(self._packed.device)


def _input_scale(layer: str, scale: Tensor | float) -> Tensor:
    """A copy as float32 []; refused here, so that no later call fails."""
    scale = torch.as_tensor(scale, dtype=torch.float32).detach().clone()
    if scale.shape != ():
        raise ValueError(f"{layer}: input_scale has shape {list(scale.shape)}, but must be a scalar []")
    if not 1e-36 <= scale.item() < float("inf"):
        raise ValueError(f"{layer}: input_scale is {scale.item():g}, but must be finite and at least 1e-36")
    return scale
