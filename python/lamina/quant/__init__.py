"""Quantization: scales and codes of weights."""

from lamina.quant.weights import dequantize_weight, quantize_weight

__all__ = ["dequantize_weight", "quantize_weight"]
