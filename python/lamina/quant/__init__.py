"""Quantization in Python: weights, observers and calibration, SmoothQuant, error reports, training.

Names are imported when they are first used: the ops need `weights`, and what needs the ops stands beside it.
"""

from importlib import import_module
from typing import Any

from lamina.quant.weights import (
    dequantize_weight,
    dequantize_weight_groups,
    pack_nibbles,
    quantize_weight,
    quantize_weight_groups,
    unpack_nibbles,
)

_HOME = {
    "Calibration": "calibration",
    "LayerError": "ranking",
    "MSEObserver": "observers",
    "MinMaxObserver": "observers",
    "Observer": "observers",
    "PercentileObserver": "observers",
    "QuantizationReport": "ranking",
    "SmoothReport": "smooth",
    "SmoothedLayer": "smooth",
    "add_lora_": "lora",
    "calibrate": "calibration",
    "convert_": "qat",
    "load_lora_": "lora",
    "merge_lora_": "lora",
    "prepare_qat_": "qat",
    "report": "ranking",
    "save_lora": "lora",
    "smooth_": "smooth",
}

__all__ = [
    *_HOME,
    "dequantize_weight",
    "dequantize_weight_groups",
    "pack_nibbles",
    "quantize_weight",
    "quantize_weight_groups",
    "unpack_nibbles",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lamina.quant' has no attribute '{name}'")
    return getattr(import_module(f"lamina.quant.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
