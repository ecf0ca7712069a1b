"""Reference models: plain PyTorch, written from the papers, one file per family.

They are what lamina is trained, tested and measured on: a model out of every kind people serve on a CPU, with nothing
in it that knows of lamina. Each file registers its named configs (registry.py) and is found here by itself.

    >>> from lamina import models
    >>> model = models.create("bert_tiny").eval()
    >>> words, next_sentence = model(*models.example_inputs("bert_tiny", batch=2))
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch
from torch import nn

from lamina.models.registry import lookup, registered_names

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")

__all__ = ["create", "example_inputs", "names"]


def names() -> list[str]:
    """The names that `create` knows, sorted.

    Example:
        >>> "resnet18" in names()
        True
    """
    return registered_names()


def create(name: str, **overrides: Any) -> nn.Module:
    """Builds a freshly initialised float32 model in training mode, as every nn.Module starts; call `.eval()` to infer.

    Weights are drawn from torch's global generator: the same `torch.manual_seed` gives the same model.

    Args:
        name: one of `names()`.
        overrides: fields of the family's config to replace.

    Raises:
        ValueError: unknown name or config field; the message lists the known ones.

    Example:
        >>> model = create("resnet18", num_classes=10, in_channels=1, width=8)
    """
    entry = lookup(name, overrides)
    return entry.model(entry.config)


def example_inputs(name: str, batch: int = 1, **overrides: Any) -> tuple[torch.Tensor, ...]:
    """Random positional inputs for `create(name, **overrides)`: float32 images or int64 tokens, batch first.

    Example:
        >>> example_inputs("lenet", batch=8)[0].shape
        torch.Size([8, 1, 28, 28])
    """
    entry = lookup(name, overrides)
    return entry.model.example_inputs(entry.config, batch)
