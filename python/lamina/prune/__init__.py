"""Pruning: patterns of zeros that lamina's sparse layers are fast with, one-shot, while training, by whole channels."""

from importlib import import_module
from typing import Any

_HOME = {
    "GradualPruner": "gradual",
    "LayerSensitivity": "scan",
    "Mask": "weights",
    "PATTERNS": "patterns",
    "PruneReport": "weights",
    "SensitivityReport": "scan",
    "WeightReport": "weights",
    "bake_": "gradual",
    "channels_": "channels",
    "distillation_loss": "distillation",
    "hold_": "gradual",
    "magnitude_": "magnitude",
    "random_": "magnitude",
    "report": "weights",
    "sensitivity": "scan",
    "verify": "gradual",
    "wanda_": "magnitude",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lamina.prune' has no attribute '{name}'")
    return getattr(import_module(f"lamina.prune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
