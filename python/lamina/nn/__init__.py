"""Drop-in layers. Each mirrors a torch.nn class and is built from one by `from_float`."""

from lamina.nn.attention import ScaledDotProductAttention
from lamina.nn.int8_linear import Int8Linear

__all__ = ["Int8Linear", "ScaledDotProductAttention"]
