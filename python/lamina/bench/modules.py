"""What any nn.Module tells about itself: how to call it, its operations, its first output."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lamina.running import tensors


def caller(model: torch.nn.Module, example_inputs: tuple | dict) -> Callable[[], Any]:
    """A closure without arguments that runs a model on its example inputs in inference mode."""
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (example_inputs, {})

    def call() -> Any:
        with torch.inference_mode():
            return model(*args, **kwargs)

    return call


def first_tensor(output: Any) -> torch.Tensor:
    """The first tensor of a model's output, whether a tensor, a tuple, a dict or a dataclass."""
    found = tensors(output)
    if not found:
        raise ValueError(f"the model returned {type(output).__name__} with no tensor in it")
    return found[0]


def count_flops(model: torch.nn.Module, example_inputs: tuple | dict) -> int:
    """Operations of one call of an eager model, 2 per multiply-add, elementwise work not counted.

    torch's own counter does the matrix products and convolutions; torch 2.13 has no formula for the CPU attention
    kernel and none for recurrent layers, so those two are added here.
    """
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={cpu_attention: _attention_flops})
    recurrent = 0
    before: dict[torch.nn.Module, int] = {}

    def enter(module: torch.nn.RNNBase, args: tuple) -> None:
        before[module] = counter.get_total_flops()

    def leave(module: torch.nn.RNNBase, args: tuple, output: Any) -> None:
        # A recurrent layer that decomposes into products has been counted already: only the difference is added.
        nonlocal recurrent
        recurrent += _recurrent_flops(module, args[0]) - (counter.get_total_flops() - before[module])

    hooks = []
    for module in model.modules():
        if isinstance(module, torch.nn.RNNBase):
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    # The fused inference path of nn.TransformerEncoderLayer is one opaque op; without it the products are visible.
    fused_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (example_inputs, {})
    try:
        # no_grad, not inference_mode: the counter works below autograd and sees nothing in inference mode.
        with torch.no_grad(), counter:
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_path)
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() + recurrent


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:  # torch passes shapes here
    return sdpa_flop_count(query, key, value)


def _recurrent_flops(module: torch.nn.RNNBase, x: torch.Tensor) -> int:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    directions = 2 if module.bidirectional else 1
    steps = x.shape[0] * (x.shape[1] if x.dim() == 3 else 1)
    width = module.proj_size or module.hidden_size
    flops = 0
    for layer in range(module.num_layers):
        inputs = module.input_size if layer == 0 else width * directions
        per_step = gates * module.hidden_size * (inputs + width) + module.hidden_size * module.proj_size
        flops += 2 * directions * steps * per_step
    return flops
