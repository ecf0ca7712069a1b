"""How large the inputs of each weight are, over calibration data: what Wanda weighs weights by."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lamina.prune.weights import Weight
from lamina.quant.calibration import check_calibration, run_over


def input_squares(
    model: nn.Module, calibration: Iterable[Any], chosen: list[Weight]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Sums of squares of the inputs of each weight over the calibration data, and why other weights have none.

    The first is fqn -> [groups, 1, 1, inputs] float32, which multiplies [groups, outputs, taps, inputs].
    """
    check_calibration("wanda_: calibration", calibration)
    sums: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    with ExitStack() as stack:
        for weight in chosen:
            see = _observer(weight, sums)
            if isinstance(see, str):
                reasons[weight.fqn] = see
            else:
                handle = weight.module.register_forward_hook(see, with_kwargs=True)
                stack.callback(handle.remove)
        # Or torch's Transformer layers would not call what is in them.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for _ in run_over(model, calibration, "wanda_"):
            pass
    for weight in chosen:
        if weight.fqn in reasons:
            continue
        if weight.fqn not in sums:
            reasons[weight.fqn] = "not called by the calibration inputs"
        elif not torch.isfinite(sums[weight.fqn]).all():
            reasons[weight.fqn] = "its inputs have NaN or infinite values"
    squares = {
        fqn: total.float().reshape(_groups(chosen, fqn), 1, 1, -1) for fqn, total in sums.items() if fqn not in reasons
    }
    return squares, reasons


def _groups(chosen: list[Weight], fqn: str) -> int:
    return next(weight.groups for weight in chosen if weight.fqn == fqn)


def _observer(weight: Weight, sums: dict[str, Tensor]) -> Callable[..., None] | str:
    """A forward hook that adds to `sums`, or why this weight's inputs cannot be seen."""
    module = weight.module
    if isinstance(module, nn.MultiheadAttention):
        return "what its projections read is not seen; split them into layers of their own, or use magnitude_"
    if isinstance(module, nn.RNNCellBase):
        return "the states of a cell are not seen; use magnitude_"
    recurrent = isinstance(module, nn.RNNBase)
    if recurrent and (module.num_layers > 1 or module.bidirectional or module.proj_size):
        return "only recurrent layers of one layer and direction show the inputs of their weights; use magnitude_"
    channels_first = weight.layout in ("conv", "transposed conv")
    dims = weight.stored.dim() - 2  # of the kernel

    def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        # The hidden states that weight_hh reads are what the layer puts out.
        values = output[0] if recurrent and "_hh" in weight.name else next(iter((*args, *kwargs.values())), None)
        if isinstance(values, nn.utils.rnn.PackedSequence):
            values = values.data
        if not isinstance(values, Tensor):
            return
        channel = values.dim() - 1 - dims if channels_first else -1
        squares = values.detach().double().square().movedim(channel, 0).flatten(1).sum(1)
        sums[weight.fqn] = sums[weight.fqn] + squares if weight.fqn in sums else squares

    return see
