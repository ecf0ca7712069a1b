"""What counts as a convolution that lamina's layers can take the place of."""

import functools

from torch import nn

Conv = nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d

# What a convolution is, beside its weight and bias.
ATTRIBUTES = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding"),
    *("groups", "padding_mode", "_reversed_padding_repeated_twice"),
)

_CLASSES = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
# What a class may define without changing what its layers compute.
_HARMLESS = {
    *("__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__constants__", "__parameters__"),
    *("__firstlineno__", "__static_attributes__", "extra_repr", "reset_parameters"),
}


def conv_class(module: nn.Module) -> type[Conv] | None:
    """Which of torch's convolutions `module` is, or computes exactly; None for all else.

    Besides torch's own, a subclass that brings a constructor and nothing that a call would meet, as EfficientNet's
    depthwise convolution in transformers does. Any other may compute something else.
    """
    kind = next((kind for kind in _CLASSES if isinstance(module, kind)), None)
    if kind is None or type(module) is kind:
        return kind
    order = type(module).__mro__
    if any(vars(derived).keys() - _HARMLESS for derived in order[: order.index(kind)]):
        return None
    plain = _plain(kind)
    holds = "_parameters", "_buffers", "_modules"
    if any(getattr(module, held).keys() != getattr(plain, held).keys() for held in holds):
        return None
    # Private ones, such as those that transformers marks its modules with, are nobody's to read.
    own = vars(module).keys() - vars(plain).keys()
    return None if any(not name.startswith("_") for name in own) else kind


@functools.cache
def _plain(kind: type[Conv]) -> Conv:
    return kind(1, 1, 1, device="meta")


def as_conv(module: nn.Module) -> Conv | None:
    """`module` if it is a convolution that computes what one of torch's own does; None for all else."""
    return None if conv_class(module) is None else module
