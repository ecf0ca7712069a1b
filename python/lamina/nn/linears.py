"""What counts as a linear layer: nn.Linear, and the types that compute the same from a weight stored otherwise.

Whoever builds a layer from a float one asks here, so that no handler and no file format knows another package's types.
"""

import sys

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


def as_linear(module: nn.Module) -> nn.Linear | None:
    """`module` as an nn.Linear over the same memory; None if its type computes no linear layer, or perhaps more.

    nn.Linear is returned as it is, and so is the out_proj of nn.MultiheadAttention. GPT-2's layer in transformers,
    `transformers.pytorch_utils.Conv1D` with its weight [in, out], becomes an nn.Linear over a transposed view.
    Subclasses of these may compute something else and are not taken.

    >>> linear = as_linear(gpt2.transformer.h[0].mlp.c_fc)
    """
    if type(module) in (nn.Linear, NonDynamicallyQuantizableLinear):
        return module
    if not _is_conv1d(module):
        return None
    linear = nn.Linear(module.nx, module.nf, device="meta")
    linear.weight = nn.Parameter(module.weight.t(), requires_grad=module.weight.requires_grad)
    linear.bias = module.bias
    return linear.train(module.training)


def stand_in(layer: nn.Module, module: nn.Module) -> nn.Module:
    """`layer`, which takes `module`'s place, made to load float weights in the original's layout; returns it.

    Without that, a square [in, out] weight of the original would be taken for [out, in] and loaded in silence.
    """
    layer.loads_transposed = _is_conv1d(module) or getattr(module, "loads_transposed", False)
    return layer


def _is_conv1d(module: nn.Module) -> bool:
    home = sys.modules.get("transformers.pytorch_utils")  # a layer of it cannot exist before the import
    return home is not None and type(module) is home.Conv1D
