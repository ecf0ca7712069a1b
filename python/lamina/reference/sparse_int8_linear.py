"""What sparse_int8_linear computes, in plain PyTorch: int8_linear with the dense weight."""

from lamina.reference.int8_linear import int8_linear as sparse_int8_linear

__all__ = ["sparse_int8_linear"]
